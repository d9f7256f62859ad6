"""The command line both sides share: flags, the runs one command asks for, the table."""

import argparse
import difflib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from torch import nn

from gblm import patterns
from gblm.allocation import ALLOCATIONS
from gblm.base import GblmError, one_of
from gblm.device import DTYPES
from gblm.distributed import rank
from gblm.gradients import BACKWARDS
from gblm.job import Run
from gblm.methods import METHODS, SOLVERS, make
from gblm.offload import OFFLOADS, offload_of
from gblm.output import check_output, check_report
from gblm.report import Report
from gblm.report.wording import short, size, time
from gblm.scores import NORMS


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


EXITS = """
exit codes: 0 done, 2 something given is wrong (the message says what), 130 interrupted
"""


def parser(program: str, description: str, epilog: str) -> Parser:
    """Return a parser with the flags that mean the same on both sides."""
    new = Parser(
        program,
        description=description,
        epilog=epilog + EXITS,
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
    add("--list", choices=sorted(LISTS), help="say what there is of them, and end")
    add("--sparsity", help="one or several of 0.5, 2:4, …, with commas")
    add("--alpha", help="factor of the gradient term, or auto: terms of equal median")
    add("--norm", help="norm of the gradients over samples, l1 or l2 [as published]")
    add("--group", default="auto", help="comparison group: row, layer, auto (as published)")
    add("--allocation", help=f"spread the budget over the linears: {', '.join(ALLOCATIONS)}")
    add("--refine", type=float, help="passes over the samples that refine each block's weights")
    add("--include", help="linears to prune, with commas, * for anything; all where not given")
    add("--exclude", help="linears to leave dense, such as '*.down_proj,model.layers.0.*'")
    add("--calibration", help="a data set or a local path")
    add("--samples", type=int, help="calibration samples")
    add("--seed", type=int, default=0, help="of the calibration samples [%(default)s]")
    add("--evaluate", help="data sets or local paths, with commas")
    add("--device", default="auto", help="cpu, cuda, auto [%(default)s]")
    add("--dtype", default="auto", help="float32, bfloat16, float16, auto: as stored [%(default)s]")
    add("--micro-batch", default="auto", help="samples a block sees at a time [%(default)s]")
    add("--backward", default="auto", help="gradients by blocks, by the whole model, or auto")
    add("--offload", default="auto", help="weights away from the device: none, cpu, disk, auto")
    add("--work-dir", type=Path, help="a folder for gradients, finished blocks and their journal")
    add("--resume", action="store_true", help="go on with the run that --work-dir holds")
    add("--gradients", type=Path, help="a folder of gradients: DIR/gradients of a --work-dir")
    add("--gradient-dtype", default="float32", help="of gradients in a folder [%(default)s]")
    add("--output", type=Path, help="a folder for the pruned model and report.json")
    add("--report", type=Path, help="a folder for report.html, a page that shows what became of it")
    add("--overwrite", action="store_true", help="let output and report replace what is there")
    return new


def methods() -> list[tuple[str, str]]:
    """Return the name of every method, and what it does."""
    said = {name: inspect.getdoc(factory) or "" for name, factory in METHODS.items()}
    found = [(name, text.partition("\n\n")[0]) for name, text in said.items()]
    mended = [(f"METHOD+{name}", f"the mask of any of these, mended by {name}") for name in SOLVERS]
    return [(name, " ".join(text.split())) for name, text in found + mended]


def pattern_forms() -> list[tuple[str, str]]:
    """Return the forms that a pattern has, and what each means."""
    return [
        ("0.5", "half of the weights go, compared where --group says"),
        ("0.5/row", "half of the weights of every output"),
        ("0.5/layer", "half of the weights of every linear"),
        ("2:4", "two of every four neighbouring weights stay; any n:m"),
    ]


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "methods": methods,
    "patterns": pattern_forms,
}


def listing(what: str) -> None:
    """Print a line for each of what there is."""
    found = LISTS[what]()
    width = max(len(name) for name, _ in found)
    for name, text in found:
        print(f"{name:{width}}  {text}")


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


def runs(args: argparse.Namespace) -> list[Run]:
    """Return the runs that the flags ask for; raises `GblmError` for a value that is none."""
    if args.norm is not None:
        one_of(args.norm, NORMS, "norm")
    one_of(args.group, ["auto", *patterns.GROUPS], "comparison group")
    one_of(args.backward, BACKWARDS, "backward")
    one_of(args.offload, OFFLOADS, "offload")
    one_of(args.gradient_dtype, DTYPES, "gradient dtype")
    if args.resume and not args.work_dir:
        raise GblmError("--resume goes on with a run in --work-dir; name that folder")
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
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no edge to wrap at
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
    console.print(table)
    if len(reports) == 1:
        show_short(reports[0])


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
