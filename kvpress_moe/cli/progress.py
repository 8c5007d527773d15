"""Progress bars of the commands. They are on standard error and disappear when the work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[..., None]


@contextmanager
def progress_bar() -> Iterator[Step]:
    """Yields ``step(description, total=None, advance=0)``; a new ``total`` resets the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1)

        def step(description: str, total: int | None = None, advance: int = 0) -> None:
            progress.update(task, description=description, advance=advance)
            if total is not None:
                progress.reset(task, total=total, description=description)

        yield step


@contextmanager
def timed_bar() -> Iterator[Step]:
    """Yields ``step(description, done, total, loss=None)``: one bar per description, with the remaining time."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def step(description: str, done: int, total: int, loss: float | None = None) -> None:
            if description not in tasks:
                tasks[description] = progress.add_task(description, total=total)
            text = description if loss is None else f"{description}, loss {loss:.3f}"
            progress.update(tasks[description], description=text, completed=done, total=total)

        yield step
