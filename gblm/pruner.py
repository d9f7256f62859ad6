"""Prune a model: the only place where weights change."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gblm import patterns, stats
from gblm.base import Adapter, Batch, GblmError, Method, Pattern, Statistics
from gblm.gradients import Gradients, gradient_sums
from gblm.report import LinearReport, Report, clock
from gblm.stream import Inputs, forward
from gblm.survey import Block, Linear, find_adapter, placed, size, survey
from gblm.survey import micro_batch as sized

Progress = Callable[[str, int, int], None]  # phase, done, of how many


def prune(
    model: nn.Module,
    batch: Batch,
    method: Method,
    pattern: Pattern | str,
    *,
    adapter: Adapter | None = None,
    blocks: list[Block] | None = None,
    gradients: Gradients | None = None,
    micro_batch: int | None = None,
    backward: str = "auto",
    progress: Progress = lambda phase, done, total: None,
) -> Report:
    """Prune every linear in the blocks of a model in place, block by block, and report on it.

    Statistics of inputs see the blocks before them as they have become; gradients are of the dense
    model.

    batch: the calibration batch. pattern: a pattern, or its name, in the
    comparison group of the method. adapter: that of the model's library where None. blocks: what
    `survey` found of this model, where that is known. gradients: the sums that `gradient_sums` gave
    for this model and batch, computed where None and needed.
    micro_batch: samples at a time, None to choose. backward: see `gradient_sums`.

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
    report = Report(method.name, pattern.name)
    for block in blocks:
        report.dense.update(block.dense)
    needs = method.needs & set(stats.GRADIENT)
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
                progress=lambda done, total: progress("gradients", done, total),
            )

    def visit(block: Block, found: list[Inputs]) -> None:
        solved = [
            (linear, *solve(linear, inputs, method, pattern, (gradients or {}).get(linear.name)))
            for group, inputs in zip(block.groups, found, strict=True)
            for linear in group
        ]
        for linear, weight, entry in solved:
            linear.weight.copy_(weight)
            report.linears.append(entry)
        progress("blocks", blocks.index(block) + 1, len(blocks))

    micro = sized(blocks, size(batch), micro_batch)
    with clock(report.seconds, "prune"):
        forward(model, batch, adapter, blocks, method.needs & set(stats.INPUT), visit, micro)
    return report


def solve(
    linear: Linear,
    inputs: Inputs,
    method: Method,
    pattern: Pattern,
    gradient: Statistics | None = None,
) -> tuple[Tensor, LinearReport]:
    """Return the new weight of a linear, in its own dtype, and what is to be reported of it."""
    start = time.perf_counter()
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
    examples = stats.wide(torch.cat(inputs.examples))
    off = relative_error(dense, stats.wide(weight), examples)
    sparsity = (weight == 0).float().mean().item()
    seconds = time.perf_counter() - start
    return weight, LinearReport(linear.name, list(linear.shape), sparsity, off, seconds)


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
