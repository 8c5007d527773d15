"""The press's list of experts. It is built from what a user gave, and entries can be read and set by index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

from kvpress_moe.errors import SettingError
from kvpress_moe.experts.custom import ApplyCompression, CustomExpert
from kvpress_moe.experts.expert import Expert
from kvpress_moe.experts.registry import make_expert


def make_experts(specs: Sequence[Any], custom: ApplyCompression | None = None) -> list[Expert]:
    """
    Build experts from what a user gave.

    Parameters
    ----------
    specs : sequence
        Names, kvpress scorers, functions or experts.
    custom : callable, optional
        Scores the strategies whose names are not in the registry: ``_apply_expert_compression`` of a subclass.

    Raises
    ------
    SettingError
        If the sequence is empty, or if an entry is wrong.
    """
    if not specs:
        raise SettingError("experts", specs, "at least one expert", "None takes the default experts.")
    return [_make(spec, custom) for spec in specs]


def _make(spec: Any, custom: ApplyCompression | None) -> Expert:
    try:
        return make_expert(spec)
    except SettingError:
        if custom is None or not isinstance(spec, str):
            raise
    return CustomExpert(spec, custom)


class ExpertStrategies(MutableMapping[int, str]):
    """
    Index -> name of the expert. Setting an entry replaces the expert. The number of experts cannot change here.

    Parameters
    ----------
    experts : callable
        Takes no arguments and returns the experts in use.
    set_experts : callable
        Called with the specs of all experts.
    """

    def __init__(self, experts: Callable[[], Sequence[Expert]], set_experts: Callable[[Sequence[Any]], None]):
        self._experts = experts
        self._set_experts = set_experts

    def __getitem__(self, index: int) -> str:
        experts = self._experts()
        if index not in range(len(experts)):
            raise KeyError(f"expert {index}: there are {len(experts)} experts, numbered from 0")
        return experts[index].name

    def __setitem__(self, index: int, expert: object) -> None:
        self[index]  # a wrong index fails here
        self._set_experts([expert if i == index else other.spec for i, other in enumerate(self._experts())])

    def __delitem__(self, index: int) -> None:
        raise TypeError("experts cannot be deleted one by one; build a press with fewer")

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._experts())))

    def __len__(self) -> int:
        return len(self._experts())

    def __repr__(self) -> str:
        return repr(dict(self))
