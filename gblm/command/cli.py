"""The command line both sides share: from the flags to the runs, the exit code and the table."""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from torch import nn

from gblm.base import GblmError
from gblm.command import config, flags
from gblm.command.job import Run
from gblm.machine.device import DTYPES, find_device
from gblm.machine.files import check_output, check_report
from gblm.machine.offload import Offload, offload_of
from gblm.machine.processes import rank, world
from gblm.maths import patterns
from gblm.methods import make, parse
from gblm.report import Report, versions
from gblm.report.wording import short, size, time


def command(
    parser: flags.Parser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], None]
) -> int:
    """Read the flags, answer what asks for an answer alone, else do the work; the exit code."""

    def answer() -> None:
        args = config.parse(parser, argv)
        if args.list:
            flags.listing(args.list)
        elif args.completion:
            print(flags.completion(parser, args.completion))
        elif args.version:
            print("\n".join(f"{name} {number}" for name, number in versions().items()))
        else:
            with logged(args.verbose):
                work(args)

    return guarded(answer)


@contextmanager
def logged(verbose: int) -> Iterator[None]:
    """Show what gblm logs on stderr for a time: warnings, with 1 every block, with 2 details.

    Below warnings that is the log of process 0 alone.
    """
    handler = RichHandler(console=console(stderr=True), show_path=False, rich_tracebacks=False)
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


def recipe(
    parser: flags.Parser,
    args: argparse.Namespace,
    model: nn.Module,
    offload: Offload | None,
    names: Collection[str],
) -> config.Recipe:
    """Return the recipe of a command, with what its flags left to gblm; see `config.recipe`."""
    dtype = next((n for n, t in DTYPES.items() if t == next(model.parameters()).dtype), args.dtype)
    device = "cuda" if world() > 1 and args.device != "cpu" else str(find_device(args.device))
    own = {"dtype": dtype, "device": device, "offload": offload.kind if offload else "none"}
    return config.recipe(parser, argparse.Namespace(**{**vars(args), **own}), names)


def runs(args: argparse.Namespace) -> list[Run]:
    """Return the runs that the flags ask for; raises `GblmError` for a value that is none."""
    if args.resume and not args.work_dir:
        raise GblmError("--resume goes on with a run in --work-dir; name that folder")
    if args.refine is not None and not 0 <= args.refine < math.inf:
        raise GblmError(f"--refine {args.refine:g} is no number of passes; 1 is the usual one")
    found = []
    for text in listed(args.sparsity):
        for name in listed(args.method):
            given = {"alpha": args.alpha, "norm": args.norm}
            usual = {k: value for k, value in given.items() if value is not None}
            own, options = parse(name, **usual)
            method = make(own, **options)
            if args.allocation is not None:
                method = replace(method, allocation=args.allocation)
            if args.refine is not None:
                method = replace(method, refine=args.refine)
            group = method.group if args.group == "auto" else args.group
            pattern = patterns.parse(text, group)
            label = f"{name.replace(':', '-')}-{text.replace(':', 'of').replace('/', '-')}"
            found.append(Run(label, method, pattern, {"method": name, "sparsity": text}))
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
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise GblmError(f"{what} {text!r} is neither auto nor a whole number of 1 or more")
    return int(text)


ASIDE = {"acc_norm"}  # metrics that stand in the report alone


def check_folders(args: argparse.Namespace, size: int = 0) -> None:
    """Raise `GblmError` where a result of `size` bytes, or its report, cannot be written."""
    if args.output:
        check_output(args.output, size, args.overwrite)
    if args.report:
        check_report(args.report, args.overwrite)


def show_table(title: str, reports: list[Report]) -> None:
    """Print the runs of one command side by side, the dense model first, in process 0 alone."""
    if rank():
        return
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    entries = reports[0].evaluation.items()
    first = {name: entry for name, entry in entries if entry["metric"] not in ASIDE}
    for column in ("pattern", "sparsity", *map(short, first), "seconds"):
        table.add_column(column, justify="right")
    dense = [shown(value, "dense") for value in first.values()]
    table.add_row("dense", "", "", *dense, "", end_section=True)
    for report in reports:
        values = [shown(report.evaluation[name], "pruned") for name in first]
        cost = sum(report.seconds.get(phase, 0) for phase in ("gradients", "prune"))
        table.add_row(
            report.method, report.pattern, f"{report.sparsity:.4f}", *values, f"{cost:.1f}"
        )
    console().print(table)
    if len(reports) == 1:
        show_short(reports[0])


def console(stderr: bool = False) -> Console:
    """Return the terminal, or what stands in its place, which has no edge to wrap at."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=160)


def shown(entry: dict[str, Any], when: str) -> str:
    """Return a value of an evaluation as a table has it: fractions, as acc is one, in percent."""
    value = entry[when]
    return f"{100 * value:.1f} %" if entry["metric"] == "acc" else f"{value:.2f}"


def show_short(report: Report) -> None:
    """Print the worst linears of a run, its time and its memory."""
    worst = sorted(report.linears, key=lambda linear: -linear.relative_error)[:3]
    named = ", ".join(f"{linear.name} {linear.relative_error:.1%}" for linear in worst)
    seconds, memory = sum(report.seconds.values()), report.peak_memory_bytes
    print(f"largest errors: {named}")
    print(f"{time(seconds)} in all, {size(memory)} of memory at the peak")


def told(args: argparse.Namespace, model: nn.Module) -> bool:
    """Whether there will be a report that shows examples.

    A model that comes to the device block by block makes them for --report alone: they take many
    passes.
    """
    return bool(args.report or (args.output and not offload_of(model)))


def show_folders(args: argparse.Namespace) -> None:
    """Print where the results are, in process 0 alone."""
    if args.output and not rank():
        print(f"written to {args.output}")
    if args.report and not rank():
        print(f"report in {args.report / 'report.html'}")


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())
