"""What a dry run says: what the runs of a command would prune, write, hold and take."""

import argparse
from collections import Counter
from dataclasses import replace

import torch
from rich.table import Table

from gblm.command import cli
from gblm.command.estimate import Look, Machine, Task, estimate, measure
from gblm.command.job import Run
from gblm.machine.device import free_memory
from gblm.machine.offload import find_offload
from gblm.machine.processes import rank, world
from gblm.report.wording import size
from gblm.walk.prune import check
from gblm.walk.survey import choose, micro_batch


def show(
    title: str,
    args: argparse.Namespace,
    wanted: list[Run],
    found: Look,
    task: Task,
    device: torch.device,
    stored: torch.dtype,
) -> None:
    """Print the plan of a command, in process 0 alone; nothing is run and nothing written.

    stored: the dtype of the checkpoint, which the output has. Raises `GblmError` where a run cannot
    have its pattern, or `--include` and `--exclude` leave nothing.
    """
    choose(found.blocks, cli.listed(args.include), cli.listed(args.exclude))
    for run in wanted:
        check(found.blocks, run.method, run.pattern)
    fixed = cli.whole(args.micro_batch, "micro-batch")
    offload = find_offload(args.offload, found.weights, device) != "none"
    task = replace(
        task,
        samples=-(-task.samples // world()),
        evaluated=-(-task.evaluated // world()),
        several=len(wanted) > 1,
        kept=bool(args.work_dir or args.gradients or offload) or args.gradient_dtype != "float32",
        offload=offload,
        micro=micro_batch(found.blocks, task.samples, fixed, device).samples,
        backward="blocks" if offload else args.backward,
    )
    if rank():
        return
    console = cli.console()
    console.print(_linears(title, found))
    for line in _said(found, args, wanted, stored):
        console.print(line, soft_wrap=True, highlight=False)
    dtype = next(own.dtype for own in found.linears[0].module.parameters())
    width = max(linear.shape[1] for linear in found.linears)
    console.print(_costs(found, wanted, task, measure(device, dtype, width)))
    if device.type == "cpu":
        console.print(f"of the memory, {size(task.taken)} are those of libraries and data")
    tasks = " and without --tasks" if getattr(args, "tasks", None) else ""
    console.print(f"seconds are without reading the model and the data{tasks}")
    console.print("nothing was run, nothing was written")


def _linears(title: str, found: Look) -> Table:
    """Return the linears that would be pruned, by their kinds."""
    kinds: Counter[tuple[str, tuple[int, int]]] = Counter()
    for block in found.blocks:
        for linear in block.linears:
            kinds[linear.name.removeprefix(f"{block.name}."), linear.shape] += 1
    names = [block.name for block in found.blocks]
    heading = f"{title}: {len(names)} blocks, {names[0]} … {names[-1]}"
    table = Table(title=heading, title_justify="left")
    table.add_column("linear")
    for column in ("shape", "number", "weights"):
        table.add_column(column, justify="right")
    for (name, (outputs, inputs)), number in kinds.items():
        weights = number * outputs * inputs
        table.add_row(name, f"{outputs} × {inputs}", str(number), f"{weights:,}")
    return table


def _said(
    found: Look, args: argparse.Namespace, wanted: list[Run], stored: torch.dtype
) -> list[str]:
    """Return what stays dense, and what would be written where, in a line each."""
    pruned = sum(linear.weight.numel() for linear in found.linears)
    share = pruned / found.numbers
    lines = [
        f"pruned: {pruned:,} of {found.numbers:,} weights ({share:.1%}), in {len(found.linears)} "
        "linears",
        f"dense: {found.numbers - pruned:,} weights: what stands outside of the blocks, norms, "
        "biases" + ("" if not any(block.dense for block in found.blocks) else ", and"),
    ]
    why = Counter(
        (name.removeprefix(f"{block.name}."), reason)
        for block in found.blocks
        for name, reason in block.dense.items()
    )
    lines += [f"    {number} × {name}: {reason}" for (name, reason), number in why.items()]
    times = f"{len(wanted)} × " if len(wanted) > 1 else ""
    result = f"{times}{size(found.numbers * stored.itemsize)}"
    where = f"{result}, to {args.output}" if args.output else f"nothing; {result} with --output"
    return [*lines, f"written: {where}"]


def _costs(found: Look, wanted: list[Run], task: Task, machine: Machine) -> Table:
    """Return the memory and the seconds of every run."""
    free = free_memory(machine.device)
    title = f"estimated for {machine.device}, of which {size(free)} are free"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in ("pattern", "memory", "gradients", "prune", "evaluate", "seconds"):
        table.add_column(column, justify="right")
    for run in wanted:
        cost = estimate(found, task, run.method, run.pattern, machine, free)
        gradients, prune = cost.seconds.get("gradients", 0.0), cost.seconds["prune"]
        both = cost.seconds.get("evaluate dense", 0.0) + cost.seconds.get("evaluate", 0.0)
        total = cost.memory  # on a GPU that of its tensors, as a report has it
        if machine.device.type == "cpu":
            total = max(task.peak, task.taken + cost.memory)
        memory = size(total) + (" (!)" if cost.memory > free else "")
        seconds = [f"{value:.1f}" for value in (gradients, prune, both, gradients + prune + both)]
        table.add_row(run.method.name, run.pattern.name, memory, *seconds)
    return table
