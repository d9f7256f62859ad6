"""A job: the runs of one command on one model, their gradients, their folders."""

import math
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn

from gblm.base import Adapter, Batch, GblmError, Method, Pattern, Statistics
from gblm.command.settings import Recipe, Settings
from gblm.machine.device import DTYPES, peak_memory
from gblm.machine.files import claimed, locked, written_beside
from gblm.machine.offload import Offload
from gblm.machine.processes import rank
from gblm.report import Evaluation, Examples, Report, clock, merged
from gblm.report.masks import masks
from gblm.walk.gradients import gradient_sums
from gblm.walk.journal import GradientFolder, Journal, fingerprint
from gblm.walk.journal import Settings as Fingerprint
from gblm.walk.prune import check, needed, prune
from gblm.walk.survey import Block

OWN = ("allocation", "focus", "refine", "share", "rounds", "rate")  # of a method, beside its solve
Bars = Callable[[str, int, int], None]  # phase, done, of how many


@contextmanager
def bars() -> Iterator[Bars]:
    """Show one bar per phase with the time left; nothing where there is no terminal."""
    console = Console(file=sys.stderr)  # this very one, whatever is redirected meanwhile
    columns = (TextColumn("{task.description:>12}"), BarColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(
        *columns, console=console, transient=True, disable=bool(rank()) or not console.is_terminal
    ) as progress:

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done, total=total)
            if done >= total:
                progress.remove_task(tasks.pop(phase))

        yield show


@dataclass
class Run:
    """One method with one pattern, as one command may ask for several."""

    label: str  # of its row, and of its folder
    method: Method
    pattern: Pattern
    flags: dict[str, Any] = field(default_factory=dict)  # that ask for it alone


@dataclass
class Work:
    """The work folder of a command: see `gblm.walk.journal`.

    former: the folder of gradients that the user named. kept: whether runs are kept in journals.
    """

    folder: Path
    resume: bool = False
    former: Path | None = None
    dtype: str = "float32"
    kept: bool = True

    @property
    def scratch(self) -> Path:
        """What this process needs for the time of the command."""
        return self.folder / f"process-{rank()}"

    @property
    def asked(self) -> bool:
        """Whether the user wants anything kept, rounded, or taken from former runs."""
        return self.kept or self.former is not None or self.dtype != "float32"

    def settings(self, job: "Job") -> Fingerprint:
        """Return what tells apart the model and the samples of a job."""
        return fingerprint(job.opened.model, job.opened.batch, job.blocks)

    def journal(self, run: Run, settings: Fingerprint) -> Journal | None:
        """Return the journal of a run; raises `GblmError` where its folder holds another."""
        if not self.kept:
            return None
        method = run.method
        own = {
            "method": method.name,
            "options": {k: str(v) for k, v in getattr(method.solve, "keywords", {}).items()},
            "pattern": run.pattern.name,
            **{k: getattr(method, k) for k in OWN},
        }
        return Journal(self.folder / run.label, {**settings, **own}, self.resume)

    def gradients(
        self, settings: Fingerprint, needs: frozenset[str], share: float
    ) -> GradientFolder:
        """Return the folder of gradients, with what they must be."""
        own = {**settings, "needs": sorted(needs), "share": share, "dtype": self.dtype}
        name = "gradients" if share == 1 else f"gradients-{share:g}"
        folder = self.former or self.folder / name
        dtype = DTYPES[self.dtype] if self.dtype != "float32" else None
        return GradientFolder(folder, own, dtype, journal=self.kept)


@contextmanager
def work_folder(settings: Settings) -> Iterator[Work]:
    """Give the work folder that the settings name; else one for the time of the command.

    That one lies beside the output, where there is room for the model. Other commands are kept out
    of both the output and the work folder: raises `GblmError` where one is in it.
    """
    output, named = settings.output, settings.work_dir
    with ExitStack() as stack:
        if output and not rank():
            stack.enter_context(claimed(output))
        if named and not rank():
            stack.enter_context(locked(named, named / "lock"))
        if not named:
            parent = output.absolute().parent if output else None
            if parent:
                parent.mkdir(parents=True, exist_ok=True)
            passing = tempfile.TemporaryDirectory(prefix=".gblm-", dir=parent)
        folder = named or Path(stack.enter_context(passing))
        former, dtype = settings.gradients, settings.gradient_dtype
        work = Work(folder, settings.resume, former, dtype, kept=named is not None)
        shutil.rmtree(work.scratch, ignore_errors=True)  # of a run that was killed
        work.scratch.mkdir(parents=True)
        stack.callback(shutil.rmtree, work.scratch, ignore_errors=True)
        yield work


@dataclass
class Opened(ABC):
    """A model and its data, as a side opens them; each side says what is done with them.

    settings: those of the command, with what the side chose filled in. calibration: what the
    samples are, in words. offload: how the weights come to the device. notes: what else a reader
    must know. stored: the dtype of the checkpoint, which the result has.
    """

    settings: Settings
    model: nn.Module
    batch: Batch
    adapter: Adapter
    calibration: str = ""
    offload: Offload | None = None
    notes: list[str] = field(default_factory=list)
    stored: torch.dtype = torch.float32

    @abstractmethod
    def evaluate(self, bars: Bars) -> Evaluation:
        """Return the metrics of the model as it is."""

    def evaluated(self) -> tuple[int, int]:
        """Return how many samples that takes, and how many of them at a time."""
        return 0, 1

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model as it is."""

    def loading(self, folder: Path) -> str:
        """Return the Python that loads what was saved."""
        return ""

    def examples(self) -> Examples | None:
        """Return what the report shows before and after."""
        return None


@dataclass
class Job:
    """What the runs of one command have in common.

    settings: with all that gblm chose. seconds: of the phases before. work: where runs are kept, to
    go on from. recipe: the flags, written beside each result.
    """

    opened: Opened
    settings: Settings
    blocks: list[Block]
    recipe: Recipe
    seconds: dict[str, float] = field(default_factory=dict)
    work: Work | None = None
    examples: Examples | None = None

    @property
    def spill(self) -> Path | None:
        """The folder for what fits nowhere else, where the weights do not live on the device."""
        return self.work.scratch if self.work and self.opened.offload else None


def compare(job: Job, wanted: list[Run]) -> list[Report]:
    """Carry out runs one after the other, on the same samples and gradients of the dense model.

    A run's result is in its folder before the next run starts.
    """
    for run in wanted:
        check(job.blocks, run.method, run.pattern)
    # A single run needs no way back to the dense model, and an offloaded one has its own.
    several = len(wanted) > 1 and not job.opened.offload
    parameters = [own for block in job.blocks for own in block.module.parameters() if several]
    dense = [own.detach().clone() for own in parameters]
    found = job.work.settings(job) if job.work else {}
    journals = {run.label: job.work.journal(run, found) if job.work else None for run in wanted}
    reports = []
    with bars() as show:
        with clock(job.seconds, "evaluate dense"):
            before = job.opened.evaluate(show)
            check_sound(before)
            if job.examples:
                job.examples.before(job.opened.model)
        lots = gradient_lots(job, wanted, found, show)
        for run in wanted:
            if job.opened.offload:
                job.opened.offload.revert()
            with torch.no_grad():
                for own, value in zip(parameters, dense, strict=True):
                    own.copy_(value)
            lot = lots.get(run.method.share if needed(run.method, run.pattern) else 0, Lot())
            reports.append(perform(job, run, lot, before, show, journals[run.label]))
            if not rank():
                keep(job, wanted, reports, lot)
    return reports


def check_sound(before: Evaluation) -> None:
    """Raise `GblmError` where a metric of the dense model is NaN: there is nothing to keep."""
    for name, metrics in before.items():
        for metric, value in metrics.items():
            if math.isnan(value) and not metric.endswith("_stderr"):  # that of one item is
                raise GblmError(
                    f"{name}: the {metric} of the dense model is nan; check the model, and what it "
                    "is evaluated on"
                )


def keep(job: Job, wanted: list[Run], reports: list[Report], lot: "Lot") -> None:
    """Write the last result, where it is to go, and then its page."""
    report, labels = reports[-1], [run.label for run in wanted]
    if output := job.settings.output:
        folder = output / labels[len(reports) - 1] if len(wanted) > 1 else output
        report.loading = job.opened.loading(folder)
        with written_beside(folder) as beside:
            with clock(report.seconds, "save"):
                job.opened.save(beside)
            report.write(beside)
            job.recipe.write(beside, **wanted[len(reports) - 1].flags, **lot.flags)
    if job.settings.report:
        from gblm.report.page import write_pages  # with matplotlib, whose import takes a second

        write_pages(job.settings.report, labels, reports)


@dataclass
class Lot:
    """The gradients that some runs share: their sums, the seconds they took, the flags they had."""

    sums: Mapping[str, Statistics] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)


def gradient_lots(
    job: Job, wanted: list[Run], settings: Fingerprint, show: Bars
) -> dict[float, Lot]:
    """Return the gradients that the runs need, by the share of the samples they are taken of.

    So each run has those it would have alone.
    """
    needs: dict[float, frozenset[str]] = {}
    for run in wanted:
        if own := needed(run.method, run.pattern):
            needs[run.method.share] = needs.get(run.method.share, frozenset()) | own
    lots = {}
    for share, names in needs.items():
        lots[share] = Lot()
        with clock(lots[share].seconds, "gradients"):
            lots[share].sums = dense_gradients(job, names, share, lots[share], settings, show)
    return lots


def dense_gradients(
    job: Job, needs: frozenset[str], share: float, lot: Lot, settings: Fingerprint, show: Bars
) -> Mapping[str, Statistics]:
    """Return sums of gradients of the dense model: of a former run, or computed and kept."""
    folder = job.work.gradients(settings, needs, share) if job.work else None
    if folder and job.work and (stored := folder.stored(must=job.work.former is not None)):
        return stored
    sums = gradient_sums(
        job.opened.model,
        job.opened.batch,
        needs,
        adapter=job.opened.adapter,
        blocks=job.blocks,
        micro_batch=job.settings.micro_batch,
        backward=job.settings.backward,
        share=share,
        keep=folder,
        chose=lambda backward: lot.flags.update(backward=backward),
        spill=job.spill,
        progress=lambda done, total: show("gradients", done, total),
    )
    return folder.finish() if folder else sums


def perform(
    job: Job,
    run: Run,
    lot: Lot,
    before: Evaluation,
    show: Bars,
    journal: Journal | None,
) -> Report:
    """Prune the dense model by one run, and evaluate it: the run's report, but for its saving."""
    report = prune(
        job.opened.model,
        job.opened.batch,
        run.method,
        run.pattern,
        adapter=job.opened.adapter,
        blocks=job.blocks,
        gradients=lot.sums,
        micro_batch=job.settings.micro_batch,
        journal=journal,
        spill=job.spill,
        progress=show,
    )
    report.seconds = {**job.seconds, **lot.seconds, **report.seconds}
    with clock(report.seconds, "evaluate"):
        after = job.opened.evaluate(show)
        if job.examples:
            report.examples_note, report.examples = job.examples.after(job.opened.model)
    report.evaluation = merged(before, after)
    settings, opened = job.settings, job.opened
    report.model, report.seed, report.notes = str(settings.model), settings.seed, opened.notes
    report.calibration, report.compute_dtype = opened.calibration, settings.compute_dtype
    report.masks = masks(report, job.blocks) if settings.output or settings.report else {}
    report.peak_memory_bytes = peak_memory(next(opened.model.parameters()).device)
    return report
