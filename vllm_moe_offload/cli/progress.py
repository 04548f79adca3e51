"""Progress of what takes longer than a moment: a bar on stderr, where that is a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)


class Bar:
    """One bar. Nothing is shown where stderr is no terminal."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def at(self, done: float) -> None:
        """So much of the total is done."""
        self._update(completed=done)

    def advance(self, more: float = 1) -> None:
        """So much more of the total is done."""
        self._update(advance=more)

    def expect(self, total: float) -> None:
        """How much there is to do."""
        self._update(total=total)

    def describe(self, description: str) -> None:
        """What is being done now."""
        self._update(description=description)

    def _update(self, **what: Any) -> None:
        self._progress.update(self._task, refresh=not self._progress.live.auto_refresh, **what)


@contextmanager
def progress_bar(description: str, total: float | None, in_bytes: bool = False, forking: bool = False) -> Iterator[Bar]:
    """Show a bar inside the ``with``; it is gone afterwards.

    Args:
        description: what is being done.
        total: in steps, or bytes if ``in_bytes``; None where that is unknown.
        forking: processes are forked meanwhile, so that no thread may draw: it is drawn when it is told something.
    """
    amount = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, auto_refresh=not forking
    ) as progress:
        yield Bar(progress, progress.add_task(description, total=total))
