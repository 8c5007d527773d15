"""The progress bar of the commands: one line on standard error, gone when the work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[..., None]


@contextmanager
def progress_bar() -> Iterator[Step]:
    """Yields ``step(description, total=None, advance=0)``; a new ``total`` starts the bar anew."""
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
