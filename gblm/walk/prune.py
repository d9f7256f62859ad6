"""Prune a model: the steps of a method visit its blocks, one after the other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gblm.base import DENSE_OUTPUTS, GblmError, Method, Pattern, Statistics, Step
from gblm.machine import processes
from gblm.machine.device import memory_errors
from gblm.machine.offload import onload
from gblm.maths import allocation, patterns, stats
from gblm.maths.allocation import Allocation
from gblm.report import LinearReport, Report, clock
from gblm.walk import divergence
from gblm.walk.blocks import Block, Linear
from gblm.walk.budget import Budget
from gblm.walk.depth import Depth
from gblm.walk.experts import Experts
from gblm.walk.journal import Journal
from gblm.walk.narrow import LOSS, Narrowing, biases
from gblm.walk.rebuilt import Rebuilt
from gblm.walk.sublayers import Sublayers
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk
from gblm.walk.zeros import SHARE

log = logging.getLogger(__name__)

UNFIT = 0.1  # of the weights, at most, that stay dense where their linears cannot have a pattern


def method_pattern(method: Method, pattern: Pattern | str) -> Pattern:
    """Return a pattern, given by its name in the comparison group of the method."""
    return patterns.parse(pattern, method.group) if isinstance(pattern, str) else pattern


@dataclass
class Pruning:
    """A method at work on a model: its budget, its gradients, its journal, its report.

    own: the pattern of single linears, by their names, which have no part in the budget. zeros: the
    share of a linear that is 0 above which what is 0 stays so.
    """

    walk: Walk
    method: Method
    pattern: Pattern
    gradients: Mapping[str, Statistics] = field(default_factory=dict)
    journal: Journal | None = None
    rebuilt: Rebuilt | None = None
    own: Mapping[str, Pattern] = field(default_factory=dict)
    zeros: float = SHARE

    def __post_init__(self) -> None:
        """Find the linears that cannot have the pattern; raises `GblmError` for many.

        And where a step cannot work on the model.
        """
        self.work, self.known = at_work(self.method, self.pattern), list[Any]()
        for step in self.work.steps:
            step.check_model(self.walk)
        if (spread := allocated(self.method, self.pattern)) and any(spread.trials):
            divergence.check(self.walk, f"allocation {spread.name}", "allocation gradient")
        self.unfit = unfit(self.walk.blocks, self.method, self.pattern, self.own)
        blocks = [block.name for block in self.walk.blocks]
        self.report = Report(self.method.name, self.pattern.name, blocks=blocks)
        self.report.parameters = sum(own.numel() for own in self.walk.model.parameters())
        for block in self.walk.blocks:
            self.report.dense.update(block.dense)
            matrices = (own for own in block.module.parameters() if own.squeeze().ndim > 1)
            self.report.block_weights += sum(own.numel() for own in matrices)
        self.report.dense.update(self.unfit)

    @property
    def needs(self) -> frozenset[str]:
        """The sums of gradients of the dense model."""
        return needed(self.method, self.pattern)

    def check(self) -> None:
        """Find the units that can go, where the pattern is of some; `GblmError` for none."""
        if self.pattern.units and not self.rebuilt:
            self.rebuilt = rebuilt(self.walk, self.pattern)

    def run(self) -> Report:
        """Prune the model, and return what became of it."""
        self.check()
        report, blocks = self.report, self.walk.blocks
        for block in blocks:
            block.units = self.rebuilt.units.get(block.name, []) if self.rebuilt else []
        if self.journal:
            self.journal.begin(report, blocks)
        fit = [x for block in blocks for x in block.linears if x.name not in self.unfit]
        chosen = {x.name: self.pattern for x in fit if x.name not in self.own}
        if spread := allocated(self.method, self.pattern):
            report.allocation = spread.name
            budget = Budget(self.walk, spread, self.pattern, self.gradients, {*chosen})
            with clock(report.seconds, "allocation"), memory_errors():
                chosen = budget.patterns()
            for name, own in chosen.items():
                log.debug("allocation %s: %s gets %s", spread.name, name, own.name)
        chosen |= {x.name: self.own[x.name] for x in fit if x.name in self.own}
        micro = self.walk.micro.samples
        log.debug("%s, %s, micro-batches of %d", self.method.name, self.pattern.name, micro)
        with clock(report.seconds, "prune"), memory_errors():
            if self.rebuilt:
                self.rebuilt.choose(self.walk, self.gradients)
                report.allocation = "gradient" if self.pattern.uneven else report.allocation
            lost = self.rebuilt.lost if self.rebuilt else {}
            beside = (DENSE_OUTPUTS if lost else "cross_gram") in self.work.needs
            self.known = known = [step.begin(self.walk) for step in self.work.steps]
            forward(self.walk, self.visit, chosen, self.gradients, beside)
            left = [block for block in blocks if block.name not in self.gone]
            with self.rebuilt.passing(self.gone) if self.rebuilt else nullcontext():
                for step, own in zip(self.work.steps, known, strict=True):
                    step.end(replace(self.walk, blocks=left), own)
            if self.rebuilt:
                self.rebuilt.apply()
        report.left = sum(own.numel() for own in self.walk.model.parameters())
        vars(report)["keeps"] = self.masks
        if processes.world() > 1:
            processes.agree("the pruned model", [_checksum(block) for block in blocks])
        return report

    def undo(self) -> None:
        """Give the model back what it was, but for the parameters of its blocks."""
        for step, own in zip(self.work.steps, self.known, strict=True):
            step.undo(self.walk, own)
        if self.rebuilt:
            self.rebuilt.undo()

    def visit(self, visit: Visit) -> None:
        """Let the steps of the method work on one block, or take it from the journal."""
        start, block = time.perf_counter(), visit.block
        if self.journal and self.journal.has(block):
            if visit.dense_calls:
                visit.dense_outputs()
            self.journal.restore(block)
        else:
            self._work(visit)
            self.report.linears += [own for own in visit.reports if own.name not in self.unfit]
            if self.journal:
                self.journal.finish(block)
        if self.rebuilt and block.name in self.gone:
            visit.outputs = self.rebuilt.outputs(visit)
        errors = [entry.relative_error for entry in visit.reports]
        mean = sum(errors) / max(1, len(errors))
        seconds = time.perf_counter() - start
        log.info("%s: %.2f s, mean relative error %.4f", block.name, seconds, mean)
        done = self.walk.blocks.index(block) + 1
        self.walk.progress("blocks", done, len(self.walk.blocks))

    def masks(self) -> dict[str, Tensor]:
        """Return the keep-mask of every pruned linear, as its weights are now."""
        pruned, found = {own.name for own in self.report.linears}, {}
        for block in self.walk.blocks:
            with onload(block.module):
                for linear in block.linears:
                    if linear.name in pruned:
                        found[linear.name] = linear.weight != 0
        return found

    @property
    def renamed(self) -> dict[str, str]:
        """The names that blocks have once others are gone, by those that they had."""
        return self.rebuilt.renamed if self.rebuilt else {}

    @property
    def gone(self) -> list[str]:
        """The names of the blocks that go."""
        return self.rebuilt.gone if self.rebuilt else []

    @property
    def excluded(self) -> list[str]:
        """The names of linears that are left out by the user, as the pruned model has them."""
        return [
            self.renamed.get(name)
            or self.renamed.get(block.name, block.name) + name.removeprefix(block.name)
            for block in self.walk.blocks
            for name, reason in block.dense.items()
            if reason == "excluded" and not any(name.startswith(f"{x}.") for x in self.gone)
        ]

    def _steps(self, block: Block) -> tuple[Step, ...]:
        """Return the steps for a block: none where it goes, or nothing has gone so far."""
        upto = self.walk.blocks[: self.walk.blocks.index(block) + 1]
        lost = self.rebuilt.lost if self.rebuilt else {}
        same = lost and not any(linear.name in lost for own in upto for linear in own.linears)
        return () if not block.groups or same or block.name in self.gone else self.work.steps

    def _work(self, visit: Visit) -> None:
        steps = self._steps(visit.block)
        try:
            if self.rebuilt and self.rebuilt.lost:
                visit.reports += self._without(visit.block, self.rebuilt.lost)
            for step in steps:
                if DENSE_OUTPUTS in step.needs and not visit.dense_calls:
                    visit.dense_outputs()  # while they are at hand
                visit.last = step is steps[-1]
                visit.outputs = None
                step.visit(visit)
            if not self.pattern.units:
                self._keep_zeros(visit)
        except BaseException:
            visit.before.write()
            raise

    def _without(self, block: Block, lost: Mapping[str, Tensor]) -> list[LinearReport]:
        """Zero the rows of linears that go; return what became of all linears of a block."""
        reports = []
        for linear in block.linears:
            rows = lost.get(linear.name, torch.zeros(linear.shape[0], dtype=torch.bool))
            linear.weight[rows.to(linear.weight.device)] = 0
            gone = float(rows.float().mean())
            whole = gone == 1 and linear.parameter.ndim == 2  # and not one of several experts
            for bias in biases(block.module, linear.parameter) if whole else ():
                bias.detach().zero_()
            note = "it is gone" if gone == 1 else ""
            reports.append(
                LinearReport(linear.name, list(linear.shape), gone, gone, 0.0, note=note)
            )
        return reports

    def _keep_zeros(self, visit: Visit) -> None:
        """Make 0 what was 0 in linears that had been pruned before."""
        before = dict(zip(visit.before.owners, visit.before.values, strict=True))
        for linear in visit.block.linears:
            weight = linear.matrix.view(before[linear.parameter])
            if stats.sparsity(weight) > self.zeros:
                linear.weight.mul_(weight != 0)
                for entry in visit.reports:
                    if entry.name == linear.name:
                        entry.sparsity = stats.sparsity(linear.weight)
                        entry.note = entry.note or "it was pruned before: its zeros were kept"


def rebuilt(walk: Walk, pattern: Pattern) -> Rebuilt:
    """Return how a model becomes smaller by a pattern of units; raises `GblmError` if it cannot."""
    if pattern.then and pattern.then.units:
        rebuilt(walk, pattern.then)  # what it would raise later
    (kind, _), *_ = pattern.units
    return KINDS.get(kind, Narrowing).of(walk, pattern)


KINDS: dict[str, type[Rebuilt]] = {"blocks": Depth, "experts": Experts}
KINDS |= dict.fromkeys(("attention", "mlps"), Sublayers)


def shortens(pattern: Pattern) -> bool:
    """Say whether blocks go by a pattern, or whole layers of theirs."""
    return bool({"blocks", "attention", "mlps"} & {*dict(pattern.units)})


def at_work(method: Method, pattern: Pattern) -> Method:
    """Return a method as it works on a pattern.

    Where blocks go, it solves no linears; where experts do, all that stays remains as it is.
    """
    if "experts" in dict(pattern.units):
        return replace(method, steps=())
    if not shortens(pattern):
        return method
    return replace(method, steps=tuple(step for step in method.steps if not step.solver))


def allocated(method: Method, pattern: Pattern) -> Allocation | None:
    """Return how a method spends a budget over the linears, None where all have the pattern."""
    if pattern.units or method.allocation is None:
        return None
    if method.allocation == "auto" and pattern.window:
        return None
    return allocation.make("gradient" if method.allocation == "auto" else method.allocation)


def needed(method: Method, pattern: Pattern) -> frozenset[str]:
    """Return the sums of gradients of the whole model that a method with a pattern needs."""
    spread = allocated(method, pattern)
    needs = at_work(method, pattern).needs | (spread.needs if spread else frozenset())
    return (needs | ({LOSS} if pattern.uneven else set())) & set(stats.GRADIENT)


def _checksum(block: Block) -> list[float]:
    with torch.no_grad(), onload(block.module):
        return [own.double().abs().sum().item() for own in block.module.parameters()]


def unfit(
    blocks: list[Block], method: Method, pattern: Pattern, own: Mapping[str, Pattern] | None = None
) -> dict[str, str]:
    """Return the linears that cannot have the pattern, or their own, and why; they stay dense.

    Raises `GblmError` with the name of one where they hold more than a tenth of the weights, or
    where the user has named it, and where a step of the method cannot have the pattern.
    """
    for step in at_work(method, pattern).steps:
        step.check(pattern)
    if pattern.then:
        unfit(blocks, method, pattern.then, own)
    linears = [linear for block in blocks for linear in block.linears]
    reasons: dict[str, GblmError] = {}
    for linear in linears:
        try:
            (own or {}).get(linear.name, pattern).check(linear.shape)
        except GblmError as error:
            reasons[linear.name] = error
    left = [linear for linear in linears if linear.name in reasons]
    few = sum(map(_size, left)) <= UNFIT * sum(map(_size, linears))
    if wrong := [linear for linear in left if linear.chosen or not few]:
        name = f"{wrong[0]}, {method.name}, {pattern.name}"
        raise GblmError(f"{name}: {reasons[wrong[0].name]}")
    return {name: f"{pattern.name}: {error}" for name, error in reasons.items()}


def _size(linear: Linear) -> int:
    return math.prod(linear.shape)
