"""The command line both sides share: flags, progress, the runs one command asks for, the table."""

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from gblm import patterns
from gblm.allocation import ALLOCATIONS
from gblm.base import Adapter, Batch, GblmError, Method, Pattern, one_of
from gblm.device import peak_memory
from gblm.gradients import BACKWARDS, Gradients, gradient_sums
from gblm.methods import METHODS, SOLVERS, make
from gblm.output import written_beside
from gblm.pruner import check, needed, prune
from gblm.report import Report, clock
from gblm.scores import NORMS
from gblm.survey import Block

Evaluation = dict[str, dict[str, float]]  # by data set: metric and value
Bars = Callable[[str, int, int], None]  # phase, done, of how many


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with the examples as they are written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `GblmError` with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in message.partition("unrecognized arguments: ")[2].split():
            near = difflib.get_close_matches(word.split("=")[0], known, 1)
            if word.startswith("--") and near:
                message += f"; did you mean {near[0]}?"
        raise GblmError(f"{message}; see --help")


def parser(program: str, description: str, epilog: str) -> Parser:
    """Return a parser with the flags that mean the same on both sides."""
    new = Parser(
        program,
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add = new.add_argument
    add("--model", help="a local folder or a hub name; without it, the packaged demo")
    add(
        "--method",
        help=f"one or several of {', '.join(METHODS)}, with commas; "
        f"a score's mask mended by METHOD+{'|'.join(SOLVERS)}",
    )
    add("--sparsity", help="one or several of 0.5, 2:4, …, with commas")
    add("--alpha", help="factor of the gradient term, or auto: terms of equal median")
    add("--norm", help="norm of the gradients over samples, l1 or l2 [as published]")
    add("--group", default="auto", help="comparison group: row, layer, auto (as published)")
    add("--allocation", help=f"spread the budget over the linears: {', '.join(ALLOCATIONS)}")
    add("--refine", type=float, help="passes over the samples that refine each block's weights")
    add("--calibration", help="a data set or a local path")
    add("--samples", type=int, help="calibration samples")
    add("--seed", type=int, default=0, help="of the calibration samples [%(default)s]")
    add("--evaluate", help="data sets or local paths, with commas")
    add("--device", default="auto", help="cpu, cuda, auto [%(default)s]")
    add("--dtype", default="auto", help="float32, bfloat16, float16, auto: as stored [%(default)s]")
    add("--micro-batch", default="auto", help="samples a block sees at a time [%(default)s]")
    add("--backward", default="auto", help="gradients by blocks, by the whole model, or auto")
    add("--output", type=Path, help="a folder for the pruned model and report.json")
    add("--overwrite", action="store_true", help="let the output replace what is there")
    return new


def guarded(work: Callable[[], None]) -> int:
    """Return the exit code of a command: 0, 2 for an error of the user's, 130 for Ctrl-C."""
    try:
        work()
    except GblmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished results stay, nothing half done does", file=sys.stderr)
        return 130
    return 0


@dataclass
class Run:
    """One method with one pattern, as one command may ask for several."""

    label: str  # of its row, and of its folder
    method: Method
    pattern: Pattern


def runs(args: argparse.Namespace) -> list[Run]:
    """Return the runs that the flags ask for; raises `GblmError` for a value that is none."""
    if args.norm is not None:
        one_of(args.norm, NORMS, "norm")
    one_of(args.group, ["auto", *patterns.GROUPS], "comparison group")
    one_of(args.backward, BACKWARDS, "backward")
    if args.allocation is not None:
        one_of(args.allocation, ALLOCATIONS, "allocation")
    if args.refine is not None and not 0 <= args.refine < math.inf:
        raise GblmError(f"--refine {args.refine:g} is no number of passes; 1 is the usual one")
    found = []
    for text in listed(args.sparsity):
        for name in listed(args.method):
            given = {"alpha": args.alpha, "norm": args.norm}
            method = make(name, **{k: value for k, value in given.items() if value is not None})
            if args.allocation is not None:
                method = replace(method, allocation=args.allocation)
            if args.refine is not None:
                method = replace(method, refine=args.refine)
            group = method.group if args.group == "auto" else args.group
            pattern = patterns.parse(text, group)
            found.append(
                Run(f"{name}-{text.replace(':', 'of').replace('/', '-')}", method, pattern)
            )
    if not found:
        raise GblmError("no method or no sparsity given; try --method gblm --sparsity 0.5")
    return found


def fill(args: argparse.Namespace, **defaults: Any) -> None:
    """Give the flags that were not given the values this side takes for them."""
    for flag, value in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)


def listed(text: str | None) -> list[str]:
    """Return the values of a flag that takes several, with commas, each once."""
    parts = (part.strip() for part in (text or "").split(","))
    return list(dict.fromkeys(part for part in parts if part))


def whole(text: str, what: str) -> int | None:
    """Return a positive whole number, None for "auto"; raises `GblmError` for anything else."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise GblmError(f"{what} {text!r} is neither auto nor a whole number of 1 or more")
    return int(text)


@contextmanager
def bars() -> Iterator[Bars]:
    """Show one bar per phase with the time left; nothing where there is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>12}"), BarColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done, total=total)
            if done >= total:
                progress.remove_task(tasks.pop(phase))

        yield show


@dataclass
class Job:
    """What the runs of one command have in common.

    evaluate(model, bars): the metrics of the model as it is. save(folder): write it as it is.
    output: the folder of a single run, of the folders of several. seconds: of the phases before.
    """

    name: str
    model: nn.Module
    batch: Batch
    adapter: Adapter
    blocks: list[Block]
    evaluate: Callable[[nn.Module, Bars], Evaluation]
    save: Callable[[Path], None]
    output: Path | None = None
    seed: int = 0
    micro_batch: int | None = None
    backward: str = "auto"
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def compare(job: Job, wanted: list[Run]) -> list[Report]:
    """Carry out runs one after the other, on the same samples and gradients of the dense model.

    A run's result is in its folder before the next run starts.
    """
    for run in wanted:
        check(job.blocks, run.method, run.pattern)
    linears = [linear for block in job.blocks for linear in block.linears]
    # A single run needs no way back to the dense weights.
    weights = [linear.weight.clone() for linear in linears] if len(wanted) > 1 else []
    needs = frozenset().union(*(needed(run.method, run.pattern) for run in wanted))
    share = max([run.method.share for run in wanted if needed(run.method, run.pattern)], default=1)
    reports = []
    with bars() as show:
        with clock(job.seconds, "evaluate dense"):
            before = job.evaluate(job.model, show)
        shared: dict[str, float] = {}
        gradients: Gradients = {}
        if needs:
            with clock(shared, "gradients"):
                gradients = gradient_sums(
                    job.model,
                    job.batch,
                    needs,
                    adapter=job.adapter,
                    blocks=job.blocks,
                    micro_batch=job.micro_batch,
                    backward=job.backward,
                    share=share,
                    progress=lambda done, total: show("gradients", done, total),
                )
        for run in wanted:
            for linear, weight in zip(linears, weights, strict=False):
                linear.weight.copy_(weight)
            seconds = {**job.seconds, **(shared if needed(run.method, run.pattern) else {})}
            report = perform(job, run, gradients, seconds, before, show)
            reports.append(report)
            if job.output:
                folder = job.output / run.label if len(wanted) > 1 else job.output
                with written_beside(folder) as beside:
                    with clock(report.seconds, "save"):
                        job.save(beside)
                    report.write(beside)
    return reports


def perform(
    job: Job,
    run: Run,
    gradients: Gradients,
    seconds: dict[str, float],
    before: Evaluation,
    show: Bars,
) -> Report:
    """Prune the dense model by one run, and evaluate it: the run's report, but for its saving."""
    report = prune(
        job.model,
        job.batch,
        run.method,
        run.pattern,
        adapter=job.adapter,
        blocks=job.blocks,
        gradients=gradients,
        micro_batch=job.micro_batch,
        progress=show,
    )
    report.seconds = {**seconds, **report.seconds}
    with clock(report.seconds, "evaluate"):
        after = job.evaluate(job.model, show)
    report.evaluation = merged(before, after)
    report.model, report.seed, report.notes = job.name, job.seed, job.notes
    report.peak_memory_bytes = peak_memory(next(job.model.parameters()).device)
    return report


def merged(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """Return the metrics of every data set with their values before and after pruning.

    Where a data set has several metrics, each stands under the name of the set and its own.
    """
    return {
        name if len(metrics) == 1 else f"{name} {metric}": {
            "metric": metric,
            "dense": value,
            "pruned": after[name][metric],
        }
        for name, metrics in before.items()
        for metric, value in metrics.items()
    }


def show_table(title: str, reports: list[Report]) -> None:
    """Print the runs of one command side by side, the dense model first."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no edge to wrap at
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in ("pattern", "sparsity", *map(short, reports[0].evaluation), "seconds"):
        table.add_column(column, justify="right")
    dense = [f"{value['dense']:.2f}" for value in reports[0].evaluation.values()]
    table.add_row("dense", "", "", *dense, "", end_section=True)
    for report in reports:
        values = [f"{value['pruned']:.2f}" for value in report.evaluation.values()]
        cost = sum(report.seconds.get(phase, 0) for phase in ("gradients", "prune"))
        table.add_row(
            report.method, report.pattern, f"{report.sparsity:.4f}", *values, f"{cost:.1f}"
        )
    console.print(table)


def short(name: str) -> str:
    """Return the name of an evaluation without the folders of its path."""
    return name.rstrip("/").rpartition("/")[2]


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())
