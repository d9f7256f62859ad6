"""Regional gradients and regional optimisation: what a block alone tells (Wanda++).

Both need no backward pass of the whole model. Source: arXiv 2503.04992.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from gblm.base import GblmError, Pattern
from gblm.machine import processes
from gblm.machine.speed import Cost
from gblm.maths import stats
from gblm.methods.refine import Learning, add_gradients
from gblm.methods.solve import Solve
from gblm.report import LinearReport
from gblm.walk.blocks import Block
from gblm.walk.call import Call, first_differentiable, place
from gblm.walk.footprint import Footprint
from gblm.walk.gradients import Gradients, PerSample, finish, zero_sums
from gblm.walk.inputs import Inputs, relative_error
from gblm.walk.visit import Visit

SAMPLES = 32  # of a round, as published


@dataclass(frozen=True)
class Regional(Solve):
    """Solves by the gradients of each block's output norm, after rounds of optimisation.

    In every round (algorithm 1) the block is pruned by what 32 drawn samples tell; then each of
    these takes one step of RMSprop, at that rate, down ‖f(X) − f_dense(X)‖². Every weight may
    change, also one that had gone; then the block is solved for the last time.

    regional: the sums of the block's own gradients that `solve` needs.
    """

    regional: frozenset[str] = frozenset()
    rounds: int = 0
    rate: float = 0.0

    def check(self, pattern: Pattern) -> None:
        if pattern.units:
            raise GblmError(
                f"{self.name} takes steps on the whole block; use gblm or best for units"
            )

    def linears(self, visit: Visit) -> list[LinearReport]:
        block, calls = visit.block, visit.calls
        gradients = regional_sums(block, calls, self.regional, visit.samples_at_once)
        if self.rounds:
            self._optimise(visit, gradients)
            gradients = regional_sums(block, calls, self.regional, visit.samples_at_once)
        groups = visit.inputs_of(visit.calls, self.needs)
        reports = self.groups(groups, visit.patterns, gradients)
        if self.rounds:
            self._measure(visit, groups, reports)
        return reports

    def _measure(self, visit: Visit, groups: list[Inputs], reports: list[LinearReport]) -> None:
        """Make the errors of the reports those against what the block was before the rounds."""
        linears = [(linear, inputs.examples) for inputs in groups for linear in inputs.group]
        now = [linear.weight.clone() for linear, _ in linears]
        with visit.before.back():
            dense = [stats.wide(linear.weight).clone() for linear, _ in linears]
        for i, (_, examples) in enumerate(linears):
            reports[i].relative_error = relative_error(dense[i], now[i], examples)

    def _optimise(self, visit: Visit, gradients: Gradients) -> None:
        """Let the weights follow the dense block, round by round; they end unpruned."""
        block, draw = visit.block, torch.Generator().manual_seed(processes.rank())
        singles = [(call, i) for call in visit.calls for i in range(call.samples)]
        count = min(SAMPLES // processes.world() or 1, *processes.gathered(len(singles)))
        rounds = [
            [singles[i] for i in torch.randperm(len(singles), generator=draw)[:count].tolist()]
            for _ in range(self.rounds)
        ]
        weights = list(dict.fromkeys(linear.parameter for linear in block.linears))
        values = [stats.wide(weight.detach()).clone() for weight in weights]
        optimiser = torch.optim.RMSprop(values, lr=self.rate)
        for chosen in rounds:
            samples = [call.sample(i) for call, i in chosen]
            with visit.before.back():
                targets = [tree_flatten(call.run(call.leaves))[0] for call in samples]
            groups = visit.inputs_of(samples, self.needs)
            self.groups(groups, visit.patterns, gradients)
            for value, weight in zip(values, weights, strict=True):
                value.copy_(weight)
            for call, target in zip(samples, targets, strict=True):
                with Learning(weights), torch.enable_grad():
                    which, output = _output(call, call.leaves)
                    (output - target[which].to(output)).square().sum().backward()
                    add_gradients(weights)
                    for value, weight in zip(values, weights, strict=True):
                        value.grad = None if weight.grad is None else stats.wide(weight.grad)
                optimiser.step()
                for value, weight in zip(values, weights, strict=True):
                    weight.copy_(value)

    def cost(self, footprint: Footprint) -> Cost:
        """Solve's, a backward pass for gradients, and five passes of each round's samples."""
        n = footprint.samples
        passes = (6 if self.rounds else 3) * n
        if self.rounds:  # the target, statistics, a step, and one more of all statistics
            passes += 5 * self.rounds * min(n, SAMPLES) + n
        return super().cost(footprint) + Cost(passes * footprint.trunk)


def regional_sums(block: Block, calls: list[Call], needs: Iterable[str], step: int) -> Gradients:
    """Return the sums of the gradients of ‖f(X)‖₂ of every sample, f being the block (eq. 3).

    f(X) is the first tensor that the block makes of its linears.
    """
    sums = zero_sums(block.linears, frozenset(needs) & set(stats.GRADIENT))
    step = 1 if any(linear.alone for linear in block.linears) else step
    for call in calls:
        for piece in call.pieces(step):
            samples = piece.stop - piece.start
            watch = PerSample(block.linears, sums, samples)
            with torch.enable_grad():
                which, output = _output(call, call.arguments(piece), watch)
                dim, _ = place(block.outputs, which, output, samples) or (0, 0)
                output.movedim(dim, 0).reshape(samples, -1).norm(dim=1).sum().backward()
            watch.finish()
    finish(block, sums, sum(call.samples for call in calls))
    return sums


def _output(call: Call, leaves: list[Any], watch: PerSample | None = None) -> tuple[int, Tensor]:
    """Return the first output that the block makes of its linears: which it is, and its values."""
    outputs = tree_flatten(call.run(leaves, watch=watch))[0]
    which = first_differentiable(outputs)
    assert which is not None  # a linear that is used has been seen to reach an output
    return which, stats.wide(outputs[which])
