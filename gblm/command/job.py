"""A job: the runs of one command on one model, their gradients, their folders."""

import copy
import math
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.base import Adapter, Batch, GblmError, Method, Pattern, Statistics
from gblm.command.measure import speed, weight_bytes
from gblm.command.settings import ZEROS, Recipe, Settings
from gblm.gains import accelerate, gains
from gblm.machine.bars import bars
from gblm.machine.device import DTYPES, described, find_compute_dtype, peak_memory, reset_peak
from gblm.machine.export import export
from gblm.machine.files import (
    claimed,
    locked,
    portable,
    weights_size,
    write_text,
    written_beside,
    zeros,
)
from gblm.machine.offload import Offload, onload
from gblm.machine.processes import rank
from gblm.maths import patterns
from gblm.packed import pack_there, plain_share
from gblm.report import Evaluation, Examples, Report, clock, merged
from gblm.report.card import card, push
from gblm.report.masks import pictures
from gblm.report.wording import outcome
from gblm.walk.blocks import Block, Snapshot, by_name, choose
from gblm.walk.gradients import first, sweep
from gblm.walk.journal import Fingerprint, GradientFolder, Journal, fingerprint
from gblm.walk.prune import Pruning, needed, rebuilt, unfit
from gblm.walk.survey import survey
from gblm.walk.walk import Walk, no_progress

Bars = Callable[[str, int, int], None]  # phase, done, of how many


@dataclass
class Run:
    """One method with one pattern, as one command may ask for several."""

    label: str  # of its row, and of its folder
    method: Method
    pattern: Pattern
    flags: dict[str, Any] = field(default_factory=dict)  # that ask for it alone


@contextmanager
def work_folder(settings: Settings) -> Iterator[Path]:
    """Give the work folder that the settings name; else one for the time of the command.

    See `gblm.walk.journal` for what is in it. A passing one lies beside the output, where there is
    room for the model. Other commands are kept out of both the output and the work folder: raises
    `GblmError` where one is in it.
    """
    output, folder = settings.output, settings.work_dir
    with ExitStack() as stack:
        if output and not rank():
            stack.enter_context(claimed(output))
        if folder and not rank():
            stack.enter_context(locked(folder, folder / "lock"))
        if not folder:
            parent = output.absolute().parent if output else None
            if parent:
                parent.mkdir(parents=True, exist_ok=True)
            passing = tempfile.TemporaryDirectory(prefix=".gblm-", dir=parent)
            folder = Path(stack.enter_context(passing))
        shutil.rmtree(scratch(folder), ignore_errors=True)  # of a run that was killed
        scratch(folder).mkdir(parents=True)
        stack.callback(shutil.rmtree, scratch(folder), ignore_errors=True)
        yield folder


def scratch(work: Path) -> Path:
    """Return the part of a work folder that this process has for the time of the command."""
    return work / f"process-{rank()}"


@dataclass
class Opened(ABC):
    """A model and its data, as a side opens them; each side says what is done with them.

    settings: those of the command, with what was chosen filled in. calibration: what the
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
    origin: Path | None = None  # the folder of the dense model
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

    def counts(self) -> dict[str, tuple[int, str]]:
        """Return what every data set holds, such as `(60, "windows")`, where that is known."""
        return {}

    def uses(self, model: nn.Module) -> dict[str, Callable[[], Any]]:
        """Return what a model is used for, by name, to measure how quick it is."""
        return {}

    def graph(self) -> tuple[nn.Module, Tensor]:
        """Return the model from one tensor to another, and a sample `[1, …]` of the first."""
        raise GblmError("--export: this kind of models has no such form; do without it")

    def loading(self, folder: Path) -> str:
        """Return the Python that loads what was saved."""
        return ""

    def examples(self) -> Examples | None:
        """Return what the report shows before and after."""
        return None


@dataclass
class Job:
    """What the runs of one command have in common.

    recipe: the flags, written beside each result. seconds: of the phases before. work: where runs
    are kept, to go on from. dense: a copy of the model as it was, to measure its speed.
    """

    opened: Opened
    blocks: list[Block]
    recipe: Recipe
    seconds: dict[str, float] = field(default_factory=dict)
    work: Path | None = None
    examples: Examples | None = None
    dense: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        return next(self.opened.model.parameters()).device

    def walk(self, progress: Bars, share: float | None = None) -> Walk:
        """Return the walk of the samples, or of the share whose gradients are taken."""
        opened = self.opened
        whole = opened.model, opened.batch, opened.adapter
        walk = Walk.of(
            opened.model,
            opened.batch if share is None else first(*whole, share),
            opened.adapter,
            blocks=self.blocks,
            micro_batch=opened.settings.micro_batch,
            # Only where the weights do not live on the device is there a need of files.
            folder=scratch(self.work) if self.work and opened.offload else None,
        )
        dtype = find_compute_dtype(opened.settings.compute_dtype, walk.device)
        return replace(walk, compute_dtype=dtype, progress=progress)

    def own(self, run: Run) -> dict[str, Pattern]:
        """Return the patterns of single linears, which `--pattern-for` gives them by name."""
        given = dict(text.rpartition("=")[::2] for text in self.opened.settings.pattern_for)
        found = by_name(self.blocks, {n: text for n, text in given.items() if text != "dense"})
        named = {name: text for name, text in found.items() if text is not None}
        return {name: patterns.parse(text, run.method.group) for name, text in named.items()}

    def weight(self, name: str) -> Tensor:
        """Return the weight of a linear, on the device."""
        block, linear = next((b, x) for b in self.blocks for x in b.linears if x.name == name)
        with onload(block.module):
            return linear.weight.clone()


def compare(job: Job, runs: list[Run]) -> list[Report]:
    """Carry out runs one after the other, on the same samples and gradients of the dense model.

    A run's result is in its folder before the next run starts.
    """
    for run in runs:
        unfit(job.blocks, run.method, run.pattern, job.own(run))
    smaller = [rebuilt(job.walk(no_progress), x.pattern) for x in runs if x.pattern.units]
    opened, settings = job.opened, job.opened.settings
    # A single run needs no way back to the dense model, and an offloaded one has its own.
    several = len(runs) > 1 and not opened.offload
    dense = [Snapshot(block) for block in job.blocks if several]
    origin = fingerprint(opened.model, opened.batch, job.blocks) if job.work else {}
    journals: list[Journal | None] = []
    for run in runs:  # before any is carried out, for a folder may hold another
        key, folder = {**origin, **run.method.key(), "pattern": run.pattern.name}, settings.work_dir
        if opened.adapter.everywhere is not nullcontext:
            key["experts"] = "all"
        if settings.pattern_for:
            key["patterns of linears"] = sorted(settings.pattern_for)
        journals.append(Journal(folder / run.label, key, settings.resume) if folder else None)
    reports: list[Report] = []
    with bars() as show:
        with clock(job.seconds, "evaluate dense"):
            before = opened.evaluate(show)
            check_sound(before)
            if job.examples:
                job.examples.before(opened.model)
        gradients = shared_gradients(job, runs, origin, show)
        for number, (run, journal) in enumerate(zip(runs, journals, strict=True), 1):
            show.run = f"{number}/{len(runs)} {run.label}" if len(runs) > 1 else ""
            reset_peak(job.device)
            if opened.offload:
                opened.offload.revert()
            with torch.no_grad():
                for snapshot in dense:
                    snapshot.write()
            share = run.method.share if needed(run.method, run.pattern) else 0
            shared = gradients.get(share, DenseGradients())
            own = smaller.pop(0) if run.pattern.units else None
            pruning = Pruning(
                job.walk(show),
                run.method,
                run.pattern,
                shared.sums,
                journal,
                own,
                own=job.own(run),
                zeros=ZEROS[settings.keep_zeros],
            )
            reports.append(perform(job, pruning, shared, before))
            if not rank():
                keep(job, runs, reports, shared)
            if len(runs) > 1:
                show.say(f"{show.run}: {outcome(reports[-1])}")
            if len(runs) > 1:
                pruning.undo()
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


@dataclass
class DenseGradients:
    """Gradients that some runs share: their sums, the seconds they took, the flags they had."""

    sums: Mapping[str, Statistics] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)


def shared_gradients(
    job: Job, runs: list[Run], origin: Fingerprint, show: Bars
) -> dict[float, DenseGradients]:
    """Return the gradients that the runs need, by the share of the samples they are taken of.

    So each run has those it would have alone. They are of a former run, or computed and kept.
    """
    settings, dtype = job.opened.settings, job.opened.settings.gradient_dtype
    needs: dict[float, frozenset[str]] = {}
    for run in runs:
        if names := needed(run.method, run.pattern):
            needs[run.method.share] = needs.get(run.method.share, frozenset()) | names
    gradients = {}
    for share, names in needs.items():
        shared = gradients[share] = DenseGradients()
        with clock(shared.seconds, "gradients"):
            folder = None
            if job.work:
                name = "gradients" if share == 1 else f"gradients-{share:g}"
                folder = GradientFolder(
                    settings.gradients or job.work / name,
                    {**origin, "needs": sorted(names), "share": share, "dtype": dtype},
                    DTYPES[dtype] if dtype != "float32" else None,
                    journal=settings.work_dir is not None,
                )
                former = folder.stored(must=bool(settings.gradients))
                if former is not None:
                    shared.sums = former
                    continue
            sums, backward = sweep(job.walk(show, share), names, settings.backward, folder)
            shared.flags["backward"] = backward
            shared.sums = folder.finish() if folder else sums
    return gradients


def perform(job: Job, pruning: Pruning, gradients: DenseGradients, before: Evaluation) -> Report:
    """Prune the dense model, and evaluate it: the run's report, but for its saving."""
    report, settings, opened = pruning.run(), job.opened.settings, job.opened
    if pruning.pattern.then:
        report.add(follow(job, pruning), pruning.renamed)
    report.seconds = {**job.seconds, **gradients.seconds, **report.seconds}
    with clock(report.seconds, "evaluate"):
        after = opened.evaluate(pruning.walk.progress)
        if job.examples:
            report.examples_note, report.examples = job.examples.after(opened.model)
    report.evaluation = merged(before, after, opened.counts())
    report.model, report.seed, report.notes = str(settings.model), settings.seed, opened.notes
    report.calibration, report.compute_dtype = opened.calibration, settings.compute_dtype
    report.architecture, report.dtype = type(opened.model).__name__, settings.dtype
    report.device, report.date = described(job.device), f"{datetime.now():%Y-%m-%d %H:%M}"
    if settings.output or settings.report:
        report.pictures = pictures(report, job.weight)
    report.peak_memory_bytes = peak_memory(job.device)
    if job.dense:
        with clock(report.seconds, "measure"):
            measure(job, report)
    return report


def measure(job: Job, report: Report) -> None:
    """Measure the pruned model beside the dense one, by the runtime that the settings name."""
    opened, pruned = job.opened, job.opened.model
    if opened.settings.runtime != "dense":
        pruned = copy.deepcopy(pruned)
        report.notes = [*report.notes, f"{opened.settings.runtime}: {accelerate(pruned)}"]
    assert job.dense
    report.speed = speed(job.dense, pruned, opened.uses, opened.stored)
    report.speed["file"]["pruned"] = weight_bytes(opened.model, opened.stored)
    report.gains = gains(opened.model)


def follow(job: Job, first: Pruning) -> Report:
    """Prune the smaller model by the pattern after its units; return the report of that."""
    opened, settings, show = job.opened, job.opened.settings, first.walk.progress
    blocks = survey(opened.model, opened.batch, opened.adapter)
    choose(blocks, [], first.excluded)
    after, pattern, journal = replace(job, blocks=blocks), first.pattern.then, None
    assert pattern is not None
    if first.journal:
        key = {**first.journal.settings, "pattern": pattern.name, "after": first.pattern.name}
        journal = Journal(first.journal.folder / "after", key, settings.resume)
    second = Pruning(after.walk(show), first.method, pattern, journal=journal)
    if second.needs:
        with clock(second.report.seconds, "gradients"):
            walk = after.walk(show, first.method.share)
            second.gradients = sweep(walk, second.needs, settings.backward)[0]
    report = second.run()
    if pattern.then:
        report.add(follow(after, second), second.renamed)
    return report


def keep(job: Job, runs: list[Run], reports: list[Report], gradients: DenseGradients) -> None:
    """Write the last result, where it is to go, and then its page."""
    run, report, settings = runs[len(reports) - 1], reports[-1], job.opened.settings
    report.program, flags = job.recipe.program, {**run.flags, **gradients.flags}
    if output := settings.output:
        folder = output / run.label if len(runs) > 1 else output
        place = Path(portable(str(folder), home=f"{Path.home()}/"))
        report.loading = job.opened.loading(place)
        if settings.runtime != "dense":
            report.loading += "\n\nimport gblm\n\nprint(gblm.accelerate(model))"
        with written_beside(folder) as beside:
            with clock(report.seconds, "save"):
                job.opened.save(beside)
            report.file_zeros = zeros(beside)
            if settings.export:
                exported = export(settings.export, *job.opened.graph(), beside)
                report.notes = [*report.notes, exported]
            if settings.format == "packed":
                alone = plain_share(beside)
                note = f"{pack_there(beside)}; zstd alone makes {alone:.0%} of the ordinary file"
                loaded = "loaded, it takes the memory and the time of the dense model"
                report.notes = [*report.notes, f"{note}; {loaded}"]
            if report.speed:
                report.speed["file"]["pruned"] = weights_size(beside)
            report.file_bytes = weights_size(beside)
            report.write(beside)
            about = (job.opened.origin, place, settings.push_to_hub)
            write_text(beside / "README.md", card(report, *about))
            job.recipe.write(beside, **flags)
        if settings.push_to_hub:
            push(folder, settings.push_to_hub)
    if settings.report:
        from gblm.report.page import write_pages  # with matplotlib, whose import takes a second

        folder = write_pages(settings.report, [run.label for run in runs], reports)
        job.recipe.write(folder, **flags)
