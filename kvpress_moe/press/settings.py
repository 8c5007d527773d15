"""The settings of the press. They are checked whenever they are set, and what depends on them is updated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kvpress_moe.experts.custom import CustomStrategies
from kvpress_moe.experts.expert import Expert
from kvpress_moe.experts.expert_list import ExpertStrategies, make_experts
from kvpress_moe.experts.registry import expert_specs
from kvpress_moe.model.kvpress_host import teach_kvpress
from kvpress_moe.press.setting_checks import (
    CHECKS,
    check_number_of_experts,
    check_promise,
    check_strategies,
    check_top_k_fits,
    check_tracking,
)
from kvpress_moe.routers import Routers
from kvpress_moe.routers.active import set_in_routers

DEFAULT_TOP_K = 2
_OF_PROMISE = ("compression_ratio", "budget", "track_misses", "max_kl", "max_bytes", "min_bytes")


class Following:
    """
    A setting that follows other settings while it is ``None``. Reading it gives the number in use.

    This is a descriptor. A dataclass accepts it as the default of a field.

    Parameters
    ----------
    derive : callable
        press -> the number to use if none was given.
    default : int, optional
        Default of the dataclass's field. A subclass may give a number here.
    """

    def __init__(self, derive: Callable[[Any], int | None], default: int | None = None):
        self._derive = derive
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._given = f"_given_{name}"

    def __get__(self, press: Any, owner: type) -> int | None:
        if press is None:
            return self._default  # the dataclass asks for the field's default
        given: int | None = getattr(press, self._given)
        return self._derive(press) if given is None else given

    def __set__(self, press: Any, value: int | None) -> None:
        setattr(press, self._given, value)


def following(derive: Callable[[Any], int | None]) -> Any:
    """Make a :class:`Following`. Returns ``Any``, so that a field can declare the type of the value that is read."""
    return Following(derive)


class Settings(CustomStrategies):
    """
    What all settings of a press have in common. The press itself declares the settings.

    Every setting is checked whenever it is set. A setting that is refused changes nothing. If experts, ``num_experts``
    or ``top_k`` were not given, they follow the trained routers in use.
    """

    num_experts: int
    top_k: int
    experts: Any
    track_misses: bool
    budget: str | None
    precision: Any
    cache_aware: bool
    max_kl: float | None
    routers: Any
    reset_stats: Callable[[], None]
    _experts: list[Expert]
    _given_num_experts: int | None
    _eager: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """If a subclass gives a number as the default of a :class:`Following`, the setting stays a Following."""
        super().__init_subclass__(**kwargs)
        for name, default in list(vars(cls).items()):
            inherited = next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), None)
            if isinstance(inherited, Following) and (default is None or isinstance(default, int)):
                setting = Following(inherited._derive, default)
                setting.__set_name__(cls, name)
                setattr(cls, name, setting)

    def __post_init__(self) -> None:
        teach_kvpress()
        number, top_k = self.num_experts, self.top_k  # None if not given
        specs = expert_specs(self.experts, number)
        if number is not None:
            check_number_of_experts(number, len(specs), given=self.experts is not None)
        experts = self._make_experts(specs)
        if top_k is not None:
            check_top_k_fits(top_k, len(experts))
        check_tracking(self.track_misses, self.budget, self.precision)
        check_promise({name: getattr(self, name) for name in _OF_PROMISE}, self._default_ratio)
        self._experts = experts

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "precision" and isinstance(value, Iterable) and not isinstance(value, str):
            value = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)  # an iterator ends
        if name in CHECKS:
            CHECKS[name](value)
            if name == "experts" and value is not None and not isinstance(value, str):
                value = tuple(value)
            if hasattr(self, "_experts"):  # the press is complete, so other state depends on the setting
                value = self._change(name, value)
        super().__setattr__(name, value)

    def _change(self, name: str, value: Any) -> Any:
        """Update what depends on a setting, and return the value to store. Raises before anything has changed."""
        if name in _OF_PROMISE:
            settings = {other: getattr(self, other) for other in _OF_PROMISE}
            check_promise({**settings, name: value}, self._default_ratio)
        if name == "top_k" and value is not None:
            check_top_k_fits(value, self.num_experts)
        elif name == "num_experts":
            if value == self.num_experts:
                return self._given_num_experts
            specs = expert_specs(self.experts, value)
            check_number_of_experts(len(specs) if value is None else value, len(specs), given=self.experts is not None)
            self._set_experts(specs)
        elif name == "experts":
            self._set_experts(expert_specs(value, None))
            self._given_num_experts = None
        elif name == "budget":
            check_tracking(self.track_misses, value, self.precision)
        elif name == "track_misses":
            check_tracking(value, self.budget, self.precision)
        elif name == "precision":
            check_tracking(self.track_misses, self.budget, value)
        elif name in ("router", "router_type"):
            del self.routers
        elif name == "dropout":
            set_in_routers(self.routers, name, value)
        elif name in ("cache_aware", "max_kl"):
            now = {"cache_aware": self.cache_aware, "max_kl": self.max_kl, name: value}
            set_in_routers(self.routers, "cache_aware", now["cache_aware"] and now["max_kl"] is None)
        return value

    @property
    def _default_ratio(self) -> float | None:
        """``compression_ratio`` if none is given; a dataclass that is a subclass may have another one."""
        ratio: float | None = type(self).__dataclass_fields__["compression_ratio"].default  # type: ignore[attr-defined]
        return ratio

    @property
    def _uses_feedback(self) -> bool:
        """Whether hit rates change the routing. Not with a promise: it was calibrated without feedback."""
        return self.cache_aware and self.max_kl is None

    # ── experts ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def expert_strategies(self) -> ExpertStrategies:
        """Index -> name of the expert. Entries can be set: ``press.expert_strategies[0] = "ultra_aggressive"``."""
        return ExpertStrategies(lambda: self._experts, lambda specs: setattr(self, "experts", specs))

    @expert_strategies.setter
    def expert_strategies(self, strategies: Mapping[int, object]) -> None:
        check_strategies(strategies, self.num_experts)
        self.experts = [strategies[index] for index in range(self.num_experts)]

    def _make_experts(self, specs: Sequence[Any]) -> list[Expert]:
        return make_experts(specs, self._own_compression)

    @property
    def _expert_names(self) -> list[str]:
        return [expert.name for expert in self._experts]

    def _set_experts(self, specs: Sequence[Any]) -> None:
        """Use other experts. Routers and counts belong to the old experts, so they start anew."""
        experts = self._make_experts(specs)
        check_top_k_fits(self.top_k, len(experts))
        self._experts = experts
        self.reset_stats()
        del self.routers

    @property
    def _follows_routers(self) -> bool:
        """Whether no experts were given. Then the press uses the experts of the trained routers."""
        return self.experts is None and self._given_num_experts is None

    def _follow(self, trained: Routers | None) -> None:
        """Use the experts of trained routers, or the default experts if there are no trained routers."""
        if not self._follows_routers:
            return
        names = expert_specs(None, None) if trained is None else trained.config.experts
        if list(names) != self._expert_names:
            self._experts = self._make_experts(names)
            self.reset_stats()

    @property
    def scope(self) -> str:
        """Which heads share the budget: ``budget`` if it was set, else what the routers in use allow."""
        if self.budget is not None:
            return self.budget
        calibrated = self.routers is not None and bool(self.routers.config.num_heads)
        return "global" if calibrated and not self.track_misses and not self._eager else "uniform"


def number_of_experts(press: Settings) -> int | None:
    """``num_experts`` if none was given. None while the press is being made."""
    return len(press._experts) if hasattr(press, "_experts") else None


def default_top_k(press: Settings) -> int | None:
    """``top_k`` if none was given: that of the trained routers whose experts the press uses, else at most 2."""
    if not hasattr(press, "_experts"):
        return None
    if press._follows_routers and press.routers is not None and press.routers.config.trained:
        top_k: int = press.routers.config.top_k
        return top_k
    return min(DEFAULT_TOP_K, len(press._experts))
