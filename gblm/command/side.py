"""A side: what a kind of models brings to the one command, and that command from flags to runs."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic

import torch
from cyclopts import App
from rich.logging import RichHandler
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from gblm.base import GblmError
from gblm.command import show
from gblm.command.job import Job, Opened, Run, compare, scratch, work_folder
from gblm.command.measure import dense_copy
from gblm.command.settings import (
    S,
    Settings,
    completion,
    filled,
    keeps,
    make_app,
    parse,
    portable_names,
    recipe,
)
from gblm.machine.device import DTYPES, find_compute_dtype, find_device, memory_errors
from gblm.machine.export import check_export
from gblm.machine.files import check_output, check_report
from gblm.machine.processes import launched, rank, world
from gblm.machine.program import guarded
from gblm.machine.tables import NONE
from gblm.maths import patterns
from gblm.methods import make, options_of, refined, rotated
from gblm.methods import parse as parse_method
from gblm.report import check_pages, versions
from gblm.report.card import check_hub
from gblm.walk.blocks import choose, micro_batches
from gblm.walk.footprint import Footprint, footprint
from gblm.walk.prune import allocated
from gblm.walk.survey import survey

log = logging.getLogger(__name__)

INTERRUPTED = "finished runs were kept, the unfinished one was discarded"


@dataclass(frozen=True, kw_only=True)
class Side(Generic[S]):
    """What a kind of models brings to the command.

    program, about, examples: of --help. kind: the class of its settings. usual: what settings are
    where they are not given; demo: what they are where no model is, a packaged one among them, and
    alone: those that go with a model of the user's.

    load(settings, device, scratch, seconds): the model and its data, with the seconds of both;
        scratch is a folder for weights away from the device. It calls `check_folders` with the
        model before data that takes time.
    sketch(settings, device): the same for a time, of a model without values; its data need have
        none either.
    """

    program: str
    about: str
    examples: str
    kind: type[S]
    load: Callable[[S, torch.device, Path, dict[str, float]], Opened]
    sketch: Callable[[S, torch.device], AbstractContextManager[Opened]]
    usual: Mapping[str, Any] = field(default_factory=dict)
    demo: Mapping[str, Any] = field(default_factory=dict)
    alone: Sequence[str] = ("calibration", "evaluate")

    def app(self) -> App:
        """Return the parser of its settings."""
        text = f"{self.about}\n\n{self.examples}"
        return make_app(self.program, text, self.kind, self.usual)


def main(side: Side[S], argv: Sequence[str] | None = None) -> int:
    """Run the command of a side, by `sys.argv` where there is no `argv`; return its exit code."""
    return guarded(lambda: answer(side, argv), INTERRUPTED)


def answer(side: Side[S], argv: Sequence[str] | None) -> None:
    """Do what a command line asks for."""
    app = side.app()
    parsed = parse(app, argv)
    if parsed is None:
        return
    settings, line = parsed
    if line.list:
        show.listing(line.list)
    elif line.completion:
        print(completion(app, line.completion))
    elif line.version:
        print("\n".join(f"{name} {number}" for name, number in versions().items()))
    else:
        with logged(settings.verbose):
            command(side, settings)


@contextmanager
def logged(verbose: int) -> Iterator[None]:
    """Show what gblm logs on stderr for a time: warnings, with 1 every block, with 2 details.

    Below warnings that is the log of process 0 alone.
    """
    handler = RichHandler(console=show.console(stderr=True), show_path=False)
    handler.addFilter(lambda record: not rank() or record.levelno >= logging.WARNING)
    logger = logging.getLogger("gblm")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel([logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)])
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def command(side: Side[S], settings: S) -> None:
    """Do what the settings ask for: carry out the runs, or say what they would take."""
    settings = portable_names(settings)
    title = settings.model or "the packaged demo"
    if not settings.model:
        if not side.demo:
            raise GblmError("no model to prune; name one by --model")
        if flag := next((name for name in side.alone if getattr(settings, name)), None):
            raise GblmError(f"--{flag} goes with --model; without a model the demo brings its own")
        settings = filled(settings, **side.demo)
    check_options(settings, side)
    given, settings = settings.calibration, filled(settings, **side.usual)
    if (settings.format == "packed" or settings.export) and not settings.output:
        form = f"--export {settings.export}" if settings.export else "--format packed"
        raise GblmError(f"{form} is a form of the result; name a folder by --output")
    if settings.export:
        check_export(settings.export)
    if settings.runtime != "dense" and not settings.measure:
        raise GblmError(f"--runtime {settings.runtime} is there to be measured; --measure speed")
    runs = find_runs(settings)
    blind = not any(
        run.method.needs or allocated(run.method, run.pattern) or run.pattern.units for run in runs
    )
    if blind and given in ("", NONE):
        settings = replace(settings, calibration=NONE, samples=1)
    elif settings.calibration in ("", NONE):
        raise GblmError("nothing to calibrate on; give a folder or a data set by --calibration")
    if settings.push_to_hub:
        if not settings.output or len(runs) > 1:
            raise GblmError("--push-to-hub takes the result of one run; name its --output")
        check_hub(settings.push_to_hub)
    check_folders(settings)
    with launched(settings.device) as device, memory_errors():
        settings = replace(settings, device=device)
        if settings.dry_run:
            return dry_run(side, settings, runs, title)
        with work_folder(settings) as work:
            carry_out(side, settings, runs, work, title)


def check_options(settings: Settings, side: Side[S]) -> None:
    """Warn where no method takes an option that is given."""
    methods = settings.method or side.usual.get("method", ())
    for name in ("alpha", "norm"):
        given = getattr(settings, name)
        if given and not any(name in options_of(words) for words in methods):
            log.warning("--%s is no option of %s, and changes nothing", name, ", ".join(methods))


def find_runs(settings: Settings) -> list[Run]:
    """Return the runs that settings ask for; raises `GblmError` for a value that is none."""
    if settings.resume and not settings.work_dir:
        raise GblmError("--resume goes on with a run in --work-dir; name that folder")
    usual = {name: value for name in ("alpha", "norm") if (value := getattr(settings, name))}
    runs = []
    for text in settings.sparsity:
        for words in settings.method:
            name, options = parse_method(words, **usual)
            method = make(name, **options)
            if settings.allocation:
                method = replace(method, allocation=settings.allocation)
            if settings.refine is not None:
                method = refined(method, settings.refine)
            if settings.rotate is not None:
                method = rotated(method, settings.rotate)
            group = method.group if settings.group == "auto" else settings.group
            pattern = patterns.parse(text, group, settings.uneven)
            window = "-" if pattern.units else "of"
            label = f"{words.replace(':', '-')}-{text.replace(':', window).replace('/', '-')}"
            runs.append(Run(label, method, pattern, {"method": words, "sparsity": text}))
    if not runs:
        raise GblmError("no method or no sparsity given; try --method best --sparsity 0.5")
    return runs


def check_folders(settings: Settings, model: nn.Module | None = None) -> None:
    """Raise `GblmError` where results, each as large as a model, or reports cannot be written."""
    if settings.output:
        each = sum(parameter.nbytes for parameter in model.parameters()) if model else 0
        runs = len(settings.method) * len(settings.sparsity)
        check_output(settings.output, each * runs, settings.overwrite)
    if settings.report:
        check_pages()
        check_report(settings.report, settings.overwrite)


def dry_run(side: Side[S], settings: S, runs: list[Run], title: str) -> None:
    """Say what the runs would do and take, by a model without values if its code lets that be."""
    device = find_device(settings.device)
    try:
        with side.sketch(settings, device) as opened:
            shapes = footprint_of(opened)
    except GblmError:
        raise
    except Exception as error:  # whatever the model's code had against it
        log.info("weights are read, for their shapes do not suffice: %s", error)
        near = replace(settings, offload="none", output=None)
        opened = side.load(near, torch.device("cpu"), Path(), {})
        opened.settings, shapes = settings, footprint_of(opened)
    show.plan(title, opened, runs, shapes, device)


def footprint_of(opened: Opened) -> Footprint:
    """Return what a sample of zeros, as long as the longest, tells of a model."""
    device = next(opened.model.parameters()).device
    with unset_fake_temporarily():
        singles = [part.batch for part in micro_batches(opened.batch, 1, opened.adapter)]
    longest = max(singles, key=lambda one: sum(value.numel() for value in one.values()))
    zeros = {
        name: torch.zeros(value.shape, dtype=value.dtype, device=device)
        for name, value in longest.items()
    }
    return footprint(opened.model, zeros, opened.adapter)


def carry_out(side: Side[S], settings: S, runs: list[Run], work: Path, title: str) -> None:
    """Open the model and its data, carry out the runs in a work folder, show the table."""
    seconds: dict[str, float] = {}
    device = find_device(settings.device)
    opened = side.load(settings, device, scratch(work), seconds)
    if opened.offload and (settings.measure or settings.export):
        flag = "--measure speed" if settings.measure else f"--export {settings.export}"
        raise GblmError(f"{flag} takes a model that is on the device as a whole")
    if settings.export:
        opened.graph()  # raises where it cannot be had
    if settings.calibration == NONE:
        opened.calibration = "no data"
        opened.notes.append("relative errors are those of one sample without meaning")
    blocks = survey(opened.model, opened.batch, opened.adapter)
    choose(blocks, list(settings.include), settings.dense)
    if not any((settings.output, settings.report, settings.evaluate)):
        log.warning("nothing of the result is kept or measured; add --output DIR or --evaluate")
    names = {dtype: name for name, dtype in DTYPES.items()}
    opened.settings = replace(  # by what gblm chose
        opened.settings,
        device="cuda" if world() > 1 and settings.device != "cpu" else str(device),
        dtype=names.get(next(opened.model.parameters()).dtype, settings.dtype),
        compute_dtype=names[find_compute_dtype(settings.compute_dtype, device)],
        offload=opened.offload.kind if opened.offload else "none",
    )
    # Of a model that comes to the device block by block examples take long: for --report alone.
    shows = not rank() and (settings.report or (settings.output and not opened.offload))
    job = Job(
        opened,
        blocks,
        recipe(side.app(), opened.settings),
        seconds,
        work if opened.offload or keeps(settings) else None,
        opened.examples() if shows else None,
        dense_copy(opened.model) if settings.measure and not rank() else None,
    )
    show.results(title, compare(job, runs), settings)
