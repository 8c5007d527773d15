"""The methods that a benchmark compares: a name, a group, and how to make the press."""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Literal, cast

import kvpress
from kvpress import ScorerPress
from kvpress.presses.base_press import BasePress
from transformers import PreTrainedModel

from kvpress_moe.benchmark.quantised_caches import QUANTISED
from kvpress_moe.codes.precision import Precision, menu_of
from kvpress_moe.errors import SettingError
from kvpress_moe.experts.kvpress_scorers import KVPRESS_EXPERTS
from kvpress_moe.press.moe_router_press import MoERouterPress

Protect = Callable[[ScorerPress], ScorerPress]
Group = Literal["reference", "baseline", "kvpress", "budget", "multi-pass", "bytes", "quantised", "ours", "third-party"]
Budget = Literal["uniform", "layer", "global"]
BUDGETS: tuple[Budget, ...] = ("uniform", "layer", "global")
ENTRY_POINTS = "kvpress_moe.methods"


@dataclass(frozen=True)
class Method:
    """
    One way to compress a cache.

    Attributes
    ----------
    name : str
    group : str
        ``reference`` (the full cache), ``baseline`` (random), ``kvpress`` (a press as kvpress ships it), ``budget``
        (such a press's scores with a budget that heads share), ``multi-pass`` (needs additional passes over the
        prompt), ``bytes`` (pairs are evicted or coded, under a byte budget), ``quantised`` (every pair is coded, with a
        fixed number of bits), ``ours``, ``third-party``.
    make : callable
        ``make(protect)`` returns a new press. It applies ``protect`` to the scorer that decides.
    budget : {"uniform", "layer", "global"} or None
        Budget of a press that only scores: every head keeps the same number of pairs, or the heads of each layer, or
        all heads share. None: the press selects in its own ``compress``.
    scorer : str
        Methods with the same scorer name share their scores.
    own_prefill : bool
        Whether the press needs its own prefill, because it changes the prefill or processes the prompt again.
    eager : bool
        Whether that prefill needs eager attention.
    precision : Precision, "own", "rdkv", "weighed" or None
        How kept pairs are stored: as they are (None), all with one precision, by the press's own rule, by RDKV's, or by
        our rule with constants, where a pair's score is what its eviction costs.
    fixed_share : float or None
        Share of a 16-bit cache's bytes that the method always takes.
    follows_press : bool
        Whether the budget is that of a :class:`MoERouterPress`, which knows it when it has seen the model; see
        :func:`as_in_model`.
    revision : str
        What was changed in the method since earlier records. Records with another revision are not continued.
    """

    name: str
    group: Group
    make: Callable[[Protect], BasePress | None]
    budget: Budget | None = None
    scorer: str = ""
    own_prefill: bool = False
    eager: bool = False
    precision: Precision | str | None = None
    fixed_share: float | None = None
    follows_press: bool = False
    revision: str = ""


def _scored(
    name: str, make: Callable[[], ScorerPress], group: Group, budget: Budget = "uniform", scorer: str = ""
) -> Method:
    return Method(name, group, lambda protect: protect(make()), budget, scorer or name)


def _wrapped(
    name: str, wrap: Callable[[ScorerPress], BasePress], inner: Callable[[], ScorerPress], group: Group
) -> Method:
    return Method(name, group, lambda protect: wrap(protect(inner())))


def _critical(protect: Protect, inner: Callable[[], ScorerPress]) -> BasePress:
    return protect(kvpress.CriticalKVPress(inner()))


def _built_in() -> Iterator[Method]:
    yield Method("full", "reference", lambda protect: None)
    yield _scored("random", KVPRESS_EXPERTS["random"], "baseline")

    needs_more = ("random", "observed_attention", "pyramidkv")
    singles = {name: make for name, make in KVPRESS_EXPERTS.items() if name not in needs_more}
    for name, make in singles.items():
        yield _scored(name, make, "kvpress")
    yield Method("pyramidkv", "kvpress", lambda protect: protect(kvpress.PyramidKVPress()))  # has its own budget
    observed = partial(kvpress.ObservedAttentionPress)
    yield Method("observed_attention", "kvpress", lambda p: p(observed()), own_prefill=True, eager=True)
    yield Method("kvcompose", "multi-pass", lambda p: kvpress.KVComposePress(), own_prefill=True, eager=True)

    strong = {name: singles[name] for name in ("expected_attention", "snapkv", "cur", "leverage", "keydiff")}
    for name, make in strong.items():
        yield _wrapped(f"adakv_{name}", kvpress.AdaKVPress, make, "kvpress")
    for name in ("expected_attention", "snapkv"):
        make = singles[name]
        yield Method(f"criticalkv_{name}", "kvpress", partial(_critical, inner=make), "uniform", f"criticalkv_{name}")
        yield _wrapped(f"criticaladakv_{name}", kvpress.CriticalAdaKVPress, make, "kvpress")
    for name in ("cur", "leverage"):
        make = singles[name]
        yield _wrapped(f"chunk_{name}", partial(kvpress.ChunkPress, chunk_length=256), make, "kvpress")
        yield _wrapped(f"chunkkv_{name}", kvpress.ChunkKVPress, make, "kvpress")
        yield _wrapped(f"rerotated_{name}", kvpress.KeyRerotationPress, make, "kvpress")
        yield _wrapped(f"merging_{name}", kvpress.MergingPress, make, "kvpress")
    yield _wrapped("entropy_chunkkv_snapkv", kvpress.EntropyGatedChunkKVPress, singles["snapkv"], "kvpress")
    yield _wrapped("block_keydiff", partial(kvpress.BlockPress, block_size=256), singles["keydiff"], "kvpress")

    for name, make in (strong | {"non_causal": singles["non_causal"], "tova": singles["tova"]}).items():
        yield _scored(f"{name}_layer", make, "budget", "layer", name)
        yield _scored(f"{name}_global", make, "budget", "global", name)
    kvzip = Method("kvzip", "multi-pass", lambda p: kvpress.KVzipPress(), None, "kvzip", own_prefill=True)
    kvzip = replace(kvzip, revision="the beginning of the chat template is judged like the mean token")
    for budget in BUDGETS:
        yield replace(kvzip, name=f"kvzip_{budget}", budget=budget)

    for name, (share, _) in QUANTISED.items():
        yield Method(name, "quantised", lambda protect: None, fixed_share=share)
    yield Method("rdkv", "bytes", lambda protect: kvpress.SnapKVPress(), "global", "rdkv", precision="rdkv")

    yield from _ours()


def _ours() -> Iterator[Method]:
    sets: dict[str, dict[str, Any]] = {
        "guide": {"num_experts": 4},  # named, so that no shipped routers are used
        "guide8": {"num_experts": 8},
        "strong": {"experts": "strong"},
    }
    for name, settings in sets.items():
        yield _scored(f"moe_{name}", partial(MoERouterPress, **settings), "ours")
    mixture = partial(MoERouterPress, experts="strong", top_k=4)
    yield _scored("uniform_mix", mixture, "ours")
    for budget in BUDGETS:  # the routers that ship with the package for this model
        yield _scored(f"moe_trained_{budget}", MoERouterPress, "ours", budget, "moe_trained")
    yield Method(
        "moe_mixed", "ours", lambda protect: MoERouterPress(precision="mixed"), "global", "moe_mixed", precision="own"
    )
    yield _wrapped("adakv_uniform_mix", kvpress.AdaKVPress, mixture, "ours")
    yield _wrapped("chunkkv_uniform_mix", kvpress.ChunkKVPress, mixture, "ours")


def registered() -> dict[str, Method]:
    """All methods that have a name: the built-in ones, then those of installed packages (``kvpress_moe.methods``)."""
    methods = {method.name: method for method in _built_in()}
    for entry in entry_points(group=ENTRY_POINTS):
        methods[entry.name] = from_press(entry.name, entry.load())
    return methods


#: Left out unless they are named: each of them costs several prefills, or needs a package that may not be there.
SLOW = ("observed_attention", "kvcompose", *QUANTISED)


def find_methods(names: Iterable[str] | None) -> dict[str, Method]:
    """
    Methods by name. ``None``: all registered methods but the slow ones.

    Parameters
    ----------
    names : iterable of str
        Registered names; ``name+k8v4`` for a method whose press only scores, with keys of 8 and values of 4 bits;
        ``kvzip_global+mixed`` for KVzip's scores with our codes; or your own presses as ``module:Class(argument=1)``.
        A name before it is possible: ``mine=package.module:MyPress(alpha=0.5)``.

    Raises
    ------
    SettingError
        If a name is unknown (with the nearest known ones), or a press cannot be made.
    """
    known = registered()
    if names is None:
        return {name: method for name, method in known.items() if name not in SLOW}
    found = {}
    for name in names:
        method = known.get(name) or _coded(name, known) or (_third_party(name) if ":" in name else None)
        if method is None:
            near = difflib.get_close_matches(name, known, n=3)
            remedy = f"Did you mean {' or '.join(near)}?" if near else "`kvpress-moe bench --list` shows all."
            raise SettingError("methods", name, "a registered method or module:Class(arguments)", remedy)
        found[method.name] = method
    return found


def _coded(name: str, known: Mapping[str, Method]) -> Method | None:
    """
    A method that only scores, whose kept pairs are coded: ``"keydiff_global+k8v4"``. None for other names.

    ``+mixed`` is for KVzip alone: its scores are attention, which weighs pairs of all heads alike.
    """
    base = known.get(name.removesuffix("+mixed"))
    if name.endswith("+mixed") and base is not None:
        if base.scorer != "kvzip":
            raise SettingError(
                "methods",
                name,
                "+mixed after one of KVzip's methods, for example kvzip_global+mixed",
                "Other scores do not weigh the pairs of all heads alike. Use one code, for example +k8v4.",
            )
        return replace(base, name=name, group="bytes", precision="weighed")
    match = re.fullmatch(r"(?P<base>[\w.-]+)\+k(?P<key>\d+)v(?P<value>\d+)", name)
    base = known.get(match["base"]) if match else None
    if match is None or base is None or base.budget is None or base.precision is not None:
        return None
    (precision,) = menu_of([(int(match["key"]), int(match["value"]))])
    return replace(base, name=name, group="ours" if base.group == "ours" else "bytes", precision=precision)


def touches_windows(method: Method) -> str | None:
    """
    Why a method cannot leave sliding-window layers alone; None if it can.

    In a model with such layers only the others are compressed. If keys were rotated to new positions in some layers
    only, the layers would disagree about the position of the next token. The shares of PyramidKV add up to the ratio
    only over all layers.
    """
    if method.fixed_share is not None:
        return None
    if method.own_prefill and method.scorer != "kvzip":
        return "hooks all layers in a prefill of its own"
    press = method.make(lambda scorer: scorer) if not method.own_prefill else None
    if isinstance(press, kvpress.KeyRerotationPress):
        return "turns keys to new positions"
    return "shares a budget of all layers" if isinstance(press, kvpress.PyramidKVPress) else None


def from_press(name: str, make: Callable[[], BasePress], group: Group = "third-party") -> Method:
    """A method from a function that makes a press. The press shows whether it only scores, or selects too."""
    press = make()
    if isinstance(press, MoERouterPress):
        if press.max_kl is not None:
            raise SettingError(
                "max_kl",
                press.max_kl,
                "None in a benchmark, which sets the ratio itself",
                "Promises are checked by python -m experiments.promise.",
            )
        own = press.precision is not None
        made = Method(name, "ours", lambda protect: make() if own else protect(make()), "uniform", name)
        return replace(made, precision="own" if own else None, follows_press=True)
    if isinstance(press, ScorerPress):
        plain = type(press).compress is ScorerPress.compress
        return Method(name, group, lambda protect: protect(make()), "uniform" if plain else None, name)
    own = type(press).__call__ is not BasePress.__call__ or type(press).forward_hook is not BasePress.forward_hook

    def protected(protect: Protect) -> BasePress:
        press = make()
        if isinstance(getattr(press, "press", None), ScorerPress):
            protect(press.press)
        return press

    return Method(name, group, protected, own_prefill=own)


def as_in_model(method: Method, model: PreTrainedModel, min_share: float) -> Method:
    """
    A method with the budget that its press has with this model.

    Raises
    ------
    SettingError
        If the press has another ``min_share`` than the run, which sets it for all methods.
    """
    press = method.make(lambda press: press) if method.follows_press else None
    if not isinstance(press, MoERouterPress):
        return method
    if press.min_share not in (min_share, MoERouterPress.min_share):
        raise SettingError(
            "min_share",
            press.min_share,
            f"{min_share:g}, the setting of the run, in the press {method.name}",
            "Leave it out there, and name --min-share. It holds for all methods.",
        )
    press.post_init_from_model(model)
    return replace(method, budget=cast(Budget, press.scope))


def _third_party(spec: str) -> Method:
    expected = "[name=]module:Class(argument=1)"
    match = re.fullmatch(r"(?:(?P<name>[\w.-]+)=)?(?P<module>[\w.]+):(?P<attribute>\w+)(?P<call>\(.*\))?", spec)
    if match is None:
        raise SettingError("methods", spec, expected, "Arguments are Python literals.")
    try:
        call: Any = ast.parse(f"f{match['call'] or '()'}", mode="eval").body
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        factory = getattr(importlib.import_module(match["module"]), match["attribute"])
        return from_press(match["name"] or spec, partial(factory, *args, **kwargs))
    except Exception as error:  # the module of somebody else may raise anything
        raise SettingError("methods", spec, expected, f"{type(error).__name__}: {error}") from error
