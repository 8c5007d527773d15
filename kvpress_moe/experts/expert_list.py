"""ExpertStrategies: the press's list of experts, read and written by index as the guide does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping


class ExpertStrategies(MutableMapping[int, str]):
    """
    Index -> name of the expert. Assigning replaces the expert; the number of experts is fixed by ``num_experts``.

    Parameters
    ----------
    names : callable
        () -> current names.
    replace : callable
        (index, what a user may give as an expert) -> None.
    """

    def __init__(self, names: Callable[[], list[str]], replace: Callable[[int, object], None]):
        self._names = names
        self._replace = replace

    def __getitem__(self, index: int) -> str:
        names = self._names()
        if index not in range(len(names)):
            raise KeyError(f"expert {index}: there are {len(names)} experts, numbered from 0")
        return names[index]

    def __setitem__(self, index: int, expert: object) -> None:
        self[index]  # a wrong index fails here
        self._replace(index, expert)

    def __delitem__(self, index: int) -> None:
        raise TypeError("experts cannot be deleted one by one; build a press with fewer")

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._names())))

    def __len__(self) -> int:
        return len(self._names())

    def __repr__(self) -> str:
        return repr(dict(self))
