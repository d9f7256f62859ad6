"""What a command prints: what there is, the plan of a dry run, the table of its runs."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from gblm.command.estimate import Task, estimate
from gblm.command.job import Opened, Run
from gblm.command.settings import Settings, keeps
from gblm.gains import said
from gblm.machine.device import free_memory
from gblm.machine.offload import find_offload
from gblm.machine.processes import rank, world
from gblm.machine.speed import Machine, measure
from gblm.maths.allocation import ALLOCATIONS
from gblm.methods import METHODS, SOLVERS
from gblm.report import Report
from gblm.report.wording import amount, gain, short, size, time
from gblm.walk.blocks import choose
from gblm.walk.blocks import size as size_of
from gblm.walk.footprint import Footprint
from gblm.walk.prune import unfit
from gblm.walk.walk import micro_batch_for

ASIDE = {"acc_norm"}  # metrics that stand in the report alone

# What there is, for --list.


def methods() -> list[tuple[str, str]]:
    """Return the name of every method, what it does, and its options."""
    lines = []
    for name, text in _first_sentences(METHODS):
        options = inspect.signature(METHODS[name]).parameters.values()
        defaults = ":".join(f"{option.name}={option.default}" for option in options)
        lines.append((name, f"{text} [:{defaults}]" if defaults else text))
    mended = "the mask of any of these, the remaining weights re-fitted by"
    return lines + [(f"METHOD+{name}", f"{mended} {name}") for name in SOLVERS]


def _first_sentences(factories: Mapping[str, Callable[..., Any]]) -> list[tuple[str, str]]:
    docs = {name: inspect.getdoc(factory) or "" for name, factory in factories.items()}
    return [(name, " ".join(text.partition("\n\n")[0].split())) for name, text in docs.items()]


PATTERNS = [
    ("0.5", "half of the weights go, compared where --group says"),
    ("0.5/row", "half of the weights of every output"),
    ("0.5/layer", "half of the weights of every layer"),
    ("2:4", "two of every four neighbouring weights stay; any n:m"),
    ("blocks:0.2", "a fifth of the blocks goes: a model of fewer layers"),
    ("neurons:0.25", "a quarter of the neurons of every MLP goes: a narrower model"),
    ("heads:0.25", "a quarter of the attention heads; those that share keys and values together"),
    ("attention:0.2", "a fifth of the attention layers goes; or of the MLPs: mlps:0.2"),
    ("experts:0.25", "a quarter of the experts of every mixture goes"),
    ("neurons:0.25+2:4", "units of several kinds, and a pattern of what is left of the weights"),
]
GAINS = [  # docs/what-zeros-buy.md has the whole table, measured by eval/zeros.py
    ("0.5, 0.7", "no gain in memory, on a CPU or on a GPU; a smaller file by --format packed"),
    (
        "2:4",
        "no gain on a CPU; on a GPU at many positions: --runtime semi-structured tries",
    ),
    ("structured", "smaller and quicker everywhere, in proportion to what is gone"),
    ("--format packed", "layers on disk: 38 % of bfloat16 at 0.5, 37 % at 2:4, 24 % at 0.7"),
    ("--also int8", "half the file and the memory; on a CPU quicker decoding under torch.compile"),
    ("on your machine", "python -m gblm.gains PRUNED, or --measure speed"),
]
LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "methods": methods,
    "patterns": lambda: PATTERNS,
    "allocations": lambda: _first_sentences(ALLOCATIONS),
    "gains": lambda: GAINS,
}


def listing(what: str) -> None:
    """Print a line for each of what there is."""
    lines, terminal = dict(LISTS[what]()), console()
    if terminal.is_terminal:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, text in lines.items():
            table.add_row(name, text)
        return terminal.print(table, highlight=False)
    for name, text in lines.items():
        print(f"{name:{max(map(len, lines))}}  {text}")


# The table of the runs.


def console(stderr: bool = False) -> Console:
    """Return the terminal, or what stands in its place, which has no edge to wrap at."""
    plain: dict[str, Any] = {"stderr": stderr, "markup": False, "emoji": False}
    terminal = Console(**plain)  # a name such as m[/b] is no markup
    return terminal if terminal.is_terminal else Console(**plain, width=160)


def columned(terminal: Console, rows: list[list[str]], named: int = 1, apart: int = 0) -> None:
    """Print rows, the first of them the heading, as a table of numbers to the right.

    Where it is wider than the terminal it goes on below, with the first `named` columns again.
    apart: how many rows after the heading are set apart.
    """
    fixed, left = list(range(named)), list(range(named, len(rows[0])))
    while left:
        count = len(left)
        while count > 1 and wide(terminal, table_of(rows, fixed + left[:count], apart)):
            count -= 1
        terminal.print(table_of(rows, fixed + left[:count], apart))
        left = left[count:]


def table_of(rows: list[list[str]], columns: list[int], apart: int) -> Table:
    """Return some columns of rows as a table."""
    table = Table()
    for number in columns:
        justify: Any = "right" if number else "left"
        table.add_column(rows[0][number], justify=justify, overflow="fold")
    for at, row in enumerate(rows[1:], 1):
        table.add_row(*(row[number] for number in columns), end_section=at == apart)
    return table


def wide(terminal: Console, table: Table) -> bool:
    """Say whether a table has words that its terminal would break."""
    endless = terminal.options.update(max_width=10**4)
    return Measurement.get(terminal, endless, table).minimum > terminal.width


def say(terminal: Console, *lines: str) -> None:
    """Print lines, broken between words where a terminal ends."""
    for line in lines:
        terminal.print(line, soft_wrap=not terminal.is_terminal, highlight=False)


def results(title: str, reports: list[Report], settings: Settings) -> None:
    """Print the runs of one command side by side, the dense model first, and where they are."""
    if rank():
        return
    terminal = console()
    entries = reports[0].evaluation.items()
    first = {name: entry for name, entry in entries if entry["metric"] not in ASIDE}
    speed = reports[0].speed
    metrics = ", ".join(dict.fromkeys(entry["metric"] for entry in first.values())) or "no metric"
    say(terminal, f"{title}: {metrics}, pruned with {reports[0].calibration}")
    dense = [shown(entry, "dense") for entry in first.values()]
    quick = [amount(entry["dense"], entry["unit"]) for entry in speed.values()]
    rows = [
        ["method", "pattern", "sparsity", *map(short, first), *speed, "seconds"],
        ["dense", "", "", *dense, *quick, ""],
    ]
    for report in reports:
        values = [shown(report.evaluation[data], "pruned") for data in first]
        cost = sum(report.seconds.get(phase, 0) for phase in ("gradients", "allocation", "prune"))
        ratios = [gain(entry["pruned"] / entry["dense"]) for entry in report.speed.values()]
        name = [report.method, report.pattern, f"{report.sparsity:.4f}"]
        rows.append([*name, *values, *ratios, f"{cost:.1f}"])
    columned(terminal, rows, named=2, apart=1)
    say(terminal, *pruned_part(reports[0]))
    if tried := reports[-1].gains:
        what = f"what the zeros of {reports[-1].pattern} buy here, by trial:"
        say(terminal, what, *said(tried))
    if len(reports) == 1:
        worst = sorted(reports[0].linears, key=lambda linear: -linear.relative_error)[:3]
        named = ", ".join(f"{linear.name} {linear.relative_error:.1%}" for linear in worst)
        seconds, memory = sum(reports[0].seconds.values()), reports[0].peak_memory_bytes
        say(terminal, f"largest errors: {named}")
        say(terminal, f"{time(seconds)} in all, {size(memory)} of memory at the peak")
    say(terminal, *reports[-1].notes, *warnings(reports))
    if settings.output:
        of = f"{size(reports[-1].file_bytes)} of weights, {reports[-1].file_zeros:.1%} of them 0"
        each = " each" if len(reports) > 1 else ""
        say(terminal, f"written to {settings.output}: {of}{each}")
    if settings.report:
        say(terminal, f"report in {settings.report / 'report.html'}")


def warnings(reports: list[Report]) -> Iterator[str]:
    """Yield a warning for every result that is likely of no use."""
    for report in reports:
        better = "" if report.method.startswith("best") else "--method best, "
        found = ((data, entry) for data, entry in report.evaluation.items() if broken(entry))
        for data, entry in islice(found, 1):
            yield (
                f"warning: {report.method}, {report.pattern} has likely broken the model "
                f"({data} {shown(entry, 'dense')} → {shown(entry, 'pruned')}); try {better}a "
                "lower sparsity, or more --samples of text or pictures like its own"
            )


def pruned_part(report: Report) -> Iterator[str]:
    """Yield which part of the model was pruned, and what was pruned otherwise or not at all."""
    whole, inside = (report.weights / max(1, n) for n in (report.parameters, report.block_weights))
    share = report.sparsity * whole
    yield (
        f"sparsity is that of the pruned linear layers, {inside:.0%} of the weights in the blocks; "
        f"{share:.1%} of all weights are 0"
    )
    if report.smaller:
        left = report.left / report.parameters
        yield f"smaller: {report.left:,} of {report.parameters:,} parameters are left, {left:.1%}"
    reasons = Counter(reason for reason in report.dense.values() if inside < 0.95)
    for reason, count in reasons.most_common(3):
        name = next(name for name, own in report.dense.items() if own == reason)
        yield f"dense: {name}{f' and {count - 1} more' if count > 1 else ''}: {reason}"
    if few := [linear for linear in report.linears if linear.note]:
        yield f"{few[0].name}{f' and {len(few) - 1} more' if few[1:] else ''}: {few[0].note}"


def broken(entry: dict[str, Any]) -> bool:
    """Say whether a model is likely of no use: twice the perplexity, or half of the answers."""
    dense, pruned = entry["dense"], entry["pruned"]
    if entry["metric"] == "perplexity":
        return not pruned <= 2 * dense
    return entry["metric"] in ("top1", "accuracy", "exact_match") and pruned < dense / 2


def shown(entry: dict[str, Any], when: str) -> str:
    """Return a value of an evaluation as a table has it: fractions, as acc is one, in percent."""
    value = entry[when]
    return f"{100 * value:.1f} %" if entry["metric"] == "acc" else f"{value:.2f}"


# The plan of a dry run.


def plan(
    title: str, opened: Opened, runs: list[Run], footprint: Footprint, device: torch.device
) -> None:
    """Print the plan of a command, in process 0 alone; nothing is run and nothing written.

    Raises `GblmError` where a run cannot have its pattern, or no linear is left to prune.
    """
    settings = opened.settings
    choose(footprint.blocks, list(settings.include), settings.dense)
    for run in runs:
        unfit(footprint.blocks, run.method, run.pattern)
    offload = find_offload(settings.offload, footprint.weights, device) != "none"
    evaluated, together = opened.evaluated()
    samples = math.ceil(size_of(opened.batch) / world())
    task = Task(
        samples,
        evaluated=math.ceil(evaluated / world()),
        together=together,
        several=len(runs) > 1,
        kept=offload or keeps(settings),
        offload=offload,
        micro=micro_batch_for(footprint.blocks, samples, settings.micro_batch, device).samples,
        backward="blocks" if offload else settings.backward,
    )
    if rank():
        return
    terminal = console()
    names = [block.name for block in footprint.blocks]
    say(terminal, f"{title}: {len(names)} blocks, {names[0]} … {names[-1]}")
    columned(terminal, _linears(footprint))
    say(terminal, *_lines(opened, runs, footprint))
    dtype = footprint.linears[0].parameter.dtype
    width = max(linear.shape[1] for linear in footprint.linears)
    free = free_memory(device)
    say(terminal, f"estimated for {device}, of which {size(free)} are free")
    columned(terminal, _costs(footprint, runs, task, measure(device, dtype, width), free), named=2)
    if device.type == "cpu":
        say(terminal, f"of the memory, {size(task.taken)} are those of libraries and data")
    closing = "nothing was run, nothing was written"
    say(terminal, "seconds are without reading the model and the data", *opened.notes, closing)


def _linears(footprint: Footprint) -> list[list[str]]:
    """Return the linears that would be pruned, by their kinds: rows of a table."""
    kinds: Counter[tuple[str, tuple[int, int]]] = Counter()
    for block in footprint.blocks:
        for linear in block.linears:
            kinds[linear.name.removeprefix(f"{block.name}."), linear.shape] += 1
    rows = [["linear layer", "shape", "number", "weights"]]
    for (name, (outputs, inputs)), number in kinds.items():
        weights = number * outputs * inputs
        rows.append([name, f"{outputs} × {inputs}", str(number), f"{weights:,}"])
    return rows


def _lines(opened: Opened, runs: list[Run], footprint: Footprint) -> list[str]:
    """Return what stays dense, and what would be written where, in a line each."""
    pruned = sum(linear.weight.numel() for linear in footprint.linears)
    why = Counter(
        (name.removeprefix(f"{block.name}."), reason)
        for block in footprint.blocks
        for name, reason in block.dense.items()
    )
    times = f"{len(runs)} × " if len(runs) > 1 else ""
    result = f"{times}{size(footprint.numbers * opened.stored.itemsize)}"
    output = opened.settings.output
    return [
        f"pruned: {pruned:,} of {footprint.numbers:,} weights "
        f"({pruned / footprint.numbers:.1%}), in "
        f"{len(footprint.linears)} linear layers",
        f"kept dense: {footprint.numbers - pruned:,} weights: embeddings, head, norms, biases"
        f"{', and' if why else ''}",
        *(f"    {number} × {name}: {reason}" for (name, reason), number in why.items()),
        f"written: {f'{result}, to {output}' if output else f'nothing; {result} with --output'}",
    ]


def _costs(
    footprint: Footprint, runs: list[Run], task: Task, machine: Machine, free: int
) -> list[list[str]]:
    """Return the memory and the seconds of every run: rows of a table."""
    rows = [["method", "pattern", "memory", "gradients", "prune", "evaluate", "seconds"]]
    for run in runs:
        cost = estimate(footprint, task, run.method, run.pattern, machine, free)
        seconds = [cost.seconds.get(phase, 0.0) for phase in ("gradients", "prune", "evaluate")]
        seconds[-1] += cost.seconds.get("evaluate dense", 0.0)
        memory = cost.memory  # on a GPU that of its tensors, as a report has it
        if machine.device.type == "cpu":
            memory = max(task.peak, task.taken + memory)
        words = size(memory) + (" (!)" if cost.memory > free else "")
        numbers = [f"{value:.1f}" for value in (*seconds, sum(seconds))]
        rows.append([run.method.name, run.pattern.name, words, *numbers])
    return rows
