"""Prune a model: the only place, beside `refine`, where weights change."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.base import Adapter, Batch, GblmError, Method, Pattern, Statistics
from gblm.machine import processes
from gblm.machine.device import MicroBatch
from gblm.machine.offload import here
from gblm.maths import allocation, patterns, stats
from gblm.maths.allocation import Allocation, Weighed
from gblm.report import LinearReport, Report, clock
from gblm.walk.call import Call
from gblm.walk.gradients import gradient_sums
from gblm.walk.journal import Journal
from gblm.walk.refine import refine
from gblm.walk.regional import optimise, regional_sums
from gblm.walk.stream import Inputs, Snapshot, Weights, collect, forward
from gblm.walk.survey import Block, Linear, find_adapter, placed, size, survey
from gblm.walk.survey import micro_batch as sized

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # phase, done, of how many


def prune(
    model: nn.Module,
    batch: Batch,
    method: Method,
    pattern: Pattern | str,
    *,
    adapter: Adapter | None = None,
    blocks: list[Block] | None = None,
    gradients: Mapping[str, Statistics] | None = None,
    micro_batch: int | None = None,
    backward: str = "auto",
    journal: Journal | None = None,
    spill: Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Report:
    """Prune every linear in the blocks of a model in place, block by block, and report on it.

    Statistics of inputs see the blocks before them as they have become; gradients are of the dense
    model.

    batch: the calibration batch. pattern: a pattern, or its name, in the comparison group of the
    method; with an allocation, the budget of the model. adapter: that of the model's library where
    None. blocks: what `survey` found of this model, where that is known. gradients: the sums that
    `gradient_sums` gave for this model and batch, computed where None and needed (see `needed`).
    micro_batch: samples at a time, None to choose. backward: see `gradient_sums`. journal: where
    finished blocks are kept, and those of a former run are taken from (see `gblm.walk.journal`).
    spill: a folder for what blocks give, where that fits neither on the device nor in main memory.

    Raises `GblmError` where model, batch, method and pattern do not go together, and where a
    statistic, a score or a loss holds a NaN or an Inf: the block it names, and every block after
    it, is then as it was.
    """
    if isinstance(pattern, str):
        pattern = patterns.parse(pattern, method.group)
    batch = placed(batch, model)
    adapter = adapter or find_adapter(model)
    blocks = blocks or survey(model, batch, adapter)
    check(blocks, method, pattern)
    report = Report(method.name, pattern.name, blocks=[block.name for block in blocks])
    report.parameters = sum(parameter.numel() for parameter in model.parameters())
    if journal:
        journal.begin(report, blocks)
    for block in blocks:
        report.dense.update(block.dense)
    needs = needed(method, pattern)
    if gradients is None and needs:
        with clock(report.seconds, "gradients"):
            gradients = gradient_sums(
                model,
                batch,
                needs,
                adapter=adapter,
                blocks=blocks,
                micro_batch=micro_batch,
                backward=backward,
                share=method.share,
                spill=spill,
                progress=lambda done, total: progress("gradients", done, total),
            )
    gradients = gradients or {}
    batch = processes.share(batch)
    micro = sized(blocks, size(batch), micro_batch)
    chosen = {linear.name: pattern for block in blocks for linear in block.linears}
    if spent := allocated(method, pattern):
        report.allocation = spent.name
        with clock(report.seconds, "allocation"):
            chosen = allot(model, batch, adapter, blocks, spent, pattern, gradients, micro)
        for name, own in chosen.items():
            log.debug("allocation %s: %s gets %s", spent.name, name, own.name)
    weights = position_weights(blocks, gradients, method.focus)
    solve = partial(solve_groups, method=method, chosen=chosen)

    def visit(block: Block, found: list[Inputs], call: Call) -> None:
        if method.regional:
            report.linears += solve_regionally(block, found, call, method, solve, micro)
        else:
            report.linears += solve(found, gradients=gradients)

    def again(block: Block, call: Call, target: Any, step: int) -> None:
        last = weights.get(block.groups[-1][0].name)  # its outputs are the block's, or added to it
        refine(block, call, target, step, passes=method.refine, weights=last)

    def done(block: Block, seconds: float) -> None:
        names = {linear.name for linear in block.linears}
        errors = [entry.relative_error for entry in report.linears if entry.name in names]
        mean = sum(errors) / max(1, len(errors))
        log.info("%s: %.2f s, mean relative error %.4f", block.name, seconds, mean)
        progress("blocks", blocks.index(block) + 1, len(blocks))

    log.debug("%s, %s, micro-batches of %d", method.name, pattern.name, micro.samples)
    with clock(report.seconds, "prune"):
        forward(
            model,
            batch,
            adapter,
            blocks,
            method.needs & set(stats.INPUT),
            visit,
            micro,
            beside="cross_gram" in method.needs,
            weights=weights,
            refine=again if method.refine else None,
            keeper=journal,
            spill=spill,
            done=done,
        )
    if processes.world() > 1:
        processes.agree("the pruned model", [_checksum(block) for block in blocks])
    return report


def allocated(method: Method, pattern: Pattern) -> Allocation | None:
    """Return how a method spends a budget over the linears, None where all have the pattern."""
    if method.allocation is None or (method.allocation == "auto" and pattern.window):
        return None
    return allocation.make("gradient" if method.allocation == "auto" else method.allocation)


def needed(method: Method, pattern: Pattern) -> frozenset[str]:
    """Return the sums of gradients of the whole model that a method with a pattern needs."""
    spent = allocated(method, pattern)
    needs = (spent.needs if spent else frozenset()) | (
        frozenset() if method.regional else method.needs
    )
    return needs & set(stats.GRADIENT)


def allot(
    model: nn.Module,
    batch: Batch,
    adapter: Adapter,
    blocks: list[Block],
    spent: Allocation,
    pattern: Pattern,
    gradients: Mapping[str, Statistics],
    micro: MicroBatch,
) -> dict[str, Pattern]:
    """Return the pattern of each linear by its name, by statistics of the dense model."""
    sums = {name: dict(found.sums) for name, found in gradients.items()}
    counts = {name: found.samples for name, found in gradients.items()}

    def record(block: Block, found: list[Inputs], call: Call) -> None:
        for inputs in found:
            for linear in inputs.group:
                sums.setdefault(linear.name, {}).update(inputs.statistics.sums)
                counts[linear.name] = inputs.statistics.samples

    if inputs := spent.needs & set(stats.INPUT):
        forward(model, batch, adapter, blocks, inputs, record, micro)
    weighed = [
        Weighed(
            linear.name,
            linear.weight,
            Statistics(sums.get(linear.name, {}), counts.get(linear.name, 0)),
            block.name,
            partial(_weight, block, linear),
        )
        for block in blocks
        for linear in block.linears
    ]
    return allocation.patterns_for(spent, weighed, pattern)


def _checksum(block: Block) -> list[float]:
    with torch.no_grad(), here(block.module):
        return [own.double().abs().sum().item() for own in block.module.parameters()]


def _weight(block: Block, linear: Linear) -> Tensor:
    with here(block.module):
        return linear.weight.clone()


def position_weights(
    blocks: list[Block], gradients: Mapping[str, Statistics], focus: float
) -> Weights:
    """Return how much each position counts, by the name of the first linear of a group."""
    found: Weights = {}
    for group in (group for block in blocks for group in block.groups) if focus else ():
        weights = stats.position_weights((gradients[x.name] for x in group), focus)
        if weights is not None:
            found[group[0].name] = weights
    return found


def solve_groups(
    found: list[Inputs],
    method: Method,
    chosen: dict[str, Pattern],
    gradients: Mapping[str, Statistics],
) -> list[LinearReport]:
    """Solve the linears of the groups, then write the new weights of all; return their reports.

    Each process solves some and sends what it found. chosen: the pattern of each linear by its
    name; one that is not in it stays dense.
    """
    linears = [(linear, inputs) for inputs in found for linear in inputs.group]
    solved: dict[int, tuple[Tensor, LinearReport]] = {}
    for i, (linear, inputs) in enumerate(linears):
        if i % processes.world() == processes.rank():
            own = gradients.get(linear.name)
            solved[i] = solve(linear, inputs, method, chosen.get(linear.name), own)
    entries: dict[int, LinearReport] = {}
    for part in processes.gathered({i: entry for i, (_, entry) in solved.items()}):
        entries |= part
    for i, (linear, _) in enumerate(linears):
        weight = solved[i][0] if i in solved else torch.empty_like(linear.weight)
        linear.weight.copy_(processes.sent(weight, i % processes.world()))
    return [entries[i] for i in range(len(linears))]


def solve_regionally(
    block: Block,
    found: list[Inputs],
    call: Call,
    method: Method,
    solve: Callable[..., list[LinearReport]],
    micro: MicroBatch,
) -> list[LinearReport]:
    """Solve a block by the gradients of its own output norm, optimised before where asked.

    Where that fails, the block is left as it was.
    """
    own = regional_sums(block, call, method.needs, micro)
    if not method.rounds:
        return solve(found, gradients=own)
    before, needs = Snapshot(block), method.needs & set(stats.INPUT)
    try:
        prune_now = partial(solve, gradients=own)
        optimise(block, call, prune_now, needs, micro, method.rounds, method.rate)
        found = micro.run(partial(collect, block, call, needs, {}))
        entries = solve(found, gradients=regional_sums(block, call, method.needs, micro))
    except BaseException:
        before.write()
        raise
    dense = dict(zip((x.name for x in block.linears), before.values, strict=True))
    linears = [(linear, inputs) for inputs in found for linear in inputs.group]
    for entry, (linear, inputs) in zip(entries, linears, strict=True):
        # Of what it was before the rounds, not after them.
        entry.relative_error = _off(dense[linear.name], linear.weight, inputs)
    return entries


def solve(
    linear: Linear,
    inputs: Inputs,
    method: Method,
    pattern: Pattern | None,
    gradient: Statistics | None = None,
) -> tuple[Tensor, LinearReport]:
    """Return the new weight of a linear, in its own dtype, and what to report of it.

    Without a pattern the linear stays dense.
    """
    start = time.perf_counter()
    if pattern is None:
        return linear.weight, LinearReport(linear.name, list(linear.shape), 0.0, 0.0, 0.0)
    statistics = inputs.statistics
    if gradient is not None:
        sums = {name: total.to(linear.weight.device) for name, total in gradient.sums.items()}
        statistics = Statistics(
            {**statistics.sums, **sums}, statistics.samples, statistics.positions
        )
    dense = stats.wide(linear.weight)
    try:
        weight, keep = method.solve(dense, statistics, pattern)
    except GblmError as error:
        raise GblmError(f"{linear}, {method.name}, {pattern.name}: {error}") from None
    weight = weight.masked_fill(~keep, 0).to(linear.weight.dtype)
    if not torch.isfinite(weight).all():
        raise GblmError(
            f"{linear}, {method.name}, {pattern.name}: the new weight holds a NaN or an Inf; "
            "use a wider dtype"
        )
    off = _off(dense, weight, inputs)
    sparsity = (weight == 0).float().mean().item()
    seconds = time.perf_counter() - start
    return weight, LinearReport(linear.name, list(linear.shape), sparsity, off, seconds)


def _off(dense: Tensor, weight: Tensor, inputs: Inputs) -> float:
    """Return the relative error of a weight on the inputs that were kept for it, 0 for none."""
    if not inputs.examples:
        return 0.0
    return relative_error(*map(stats.wide, (dense, weight, torch.cat(inputs.examples))))


def relative_error(dense: Tensor, weight: Tensor, x: Tensor) -> float:
    """Return ‖(W − Ŵ)X‖ / ‖WX‖, 0 for 0 / 0; weights `[out, in]`, inputs `x [positions, in]`."""
    difference = torch.linalg.norm(x @ (dense - weight).T)
    return (difference / torch.linalg.norm(x @ dense.T)).nan_to_num(0).item()


def check(blocks: list[Block], method: Method, pattern: Pattern) -> None:
    """Raise `GblmError` with the linear's name where one cannot have the pattern."""
    for block in blocks:
        for linear in block.linears:
            try:
                pattern.check(linear.shape)
            except GblmError as error:
                raise GblmError(f"{linear}, {method.name}, {pattern.name}: {error}") from None
