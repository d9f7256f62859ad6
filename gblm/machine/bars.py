"""Bars of progress, in a terminal or a notebook."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

from gblm.machine.processes import rank


@dataclass
class Phases:
    """A bar for each phase, with its count and the time so far; run: which of several it is of."""

    progress: Progress
    run: str = ""
    tasks: dict[str, TaskID] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Print a line, which stays, above the bars."""
        if not self.progress.disable:
            self.progress.console.print(line, markup=False, highlight=False)

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self.tasks:
            self.tasks[phase] = self.progress.add_task(f"{phase} {self.run}", total=total)
        self.progress.update(self.tasks[phase], completed=done, total=total)
        if done >= total:
            self.progress.remove_task(self.tasks.pop(phase))


@contextmanager
def bars(always: bool = False) -> Iterator[Phases]:
    """Show a bar for every phase; nothing where there is no terminal, unless `always` asks for it.

    Of several processes the first shows them.
    """
    console = Console(file=sys.stderr)  # this very one, whatever is redirected meanwhile
    if always and Console().is_jupyter:
        console = Console()
    words = Column(overflow="fold", min_width=12)
    columns = (TextColumn("{task.description}", markup=False, table_column=words), BarColumn(24))
    hidden = bool(rank()) or not (always or console.is_terminal)
    counts = (MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, *counts, console=console, transient=True, disable=hidden) as progress:
        yield Phases(progress)
