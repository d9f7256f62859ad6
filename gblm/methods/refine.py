"""Refine: a few optimiser steps on what a pruned block keeps, towards the dense block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gblm.base import DENSE_OUTPUTS, Step
from gblm.machine import processes
from gblm.machine.speed import Cost
from gblm.maths.stats import wide
from gblm.walk.blocks import Block
from gblm.walk.call import Call, first_differentiable, part, place
from gblm.walk.footprint import Footprint
from gblm.walk.visit import Visit

RATE, MOST = 2.0, 0.01  # see `Tuned`
POSITIONS = 512  # about so many in a step
JUDGED = 4  # steps, at least, whose samples tell whether it was worth it
ENERGY = 64  # rows of the goal whose size is measured at a time

Piece = tuple[int, slice]  # the number of a call, and some of its samples


@dataclass(frozen=True)
class Refine(Step):
    """Fits what a block keeps, its biases and its norms, to the outputs of the dense block.

    Minimises Σ weights·‖f(X) − f_dense(X_dense)‖² by Adam, with a rate that warms up over a tenth
    of the steps and then falls as a cosine, `passes` times over the samples in a drawn order; f(X)
    is the first output that depends on what is fitted. Weights that are 0 stay 0. Where the loss on
    a part of the samples is no smaller afterwards than before, all is left as it was.

    focus: the part of a position's weight that its gradients decide.
    """

    passes: float = 1.0
    focus: float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({DENSE_OUTPUTS} | ({"grad_position"} if self.focus else set()))

    def visit(self, visit: Visit) -> None:
        tuned = Tuned([visit.block])
        try:
            # The outputs of the last group are the block's, or added to it.
            weights = visit.weights(visit.block.groups[-1], self.focus)
            visit.walk.micro.run(lambda step: self._fit(visit, tuned, weights, step), tuned.undo)
        except BaseException:
            tuned.undo()
            raise

    def _fit(self, visit: Visit, tuned: Tuned, weights: Tensor | None, step: int) -> None:
        which = tuned.output(visit.calls[0])
        if which is None:
            return
        fit = Fit(visit, which, weights, step)
        steps = max(processes.gathered(max(1, round(self.passes * len(fit.pieces)))))
        optimiser, schedule = tuned.optimiser(steps)
        judged = fit.pieces[:: max(1, len(fit.pieces) // JUDGED)]
        before = fit.judge(judged)
        with tuned.learning():
            for index in order(len(fit.pieces), steps):
                fit.differentiate(fit.pieces[index])
                tuned.advance(optimiser, schedule)
        if not fit.judge(judged) < before:
            tuned.undo()

    def cost(self, footprint: Footprint) -> Cost:
        """Targets, outputs, a backward pass, and Adam on the weights at every step."""
        positions = max(linear.positions for linear in footprint.linears)
        steps = max(1, round(self.passes * footprint.samples / max(1, POSITIONS // positions)))
        weights = sum(linear.weight.numel() for linear in footprint.linears)
        block = max(sum(x.weight.numel() for x in block.linears) for block in footprint.blocks)
        passes = 1 + 3 * self.passes
        return Cost(
            passes * footprint.samples * footprint.trunk,
            64.0 * weights * steps,
            60 * steps * len(footprint.blocks),
            memory=3 * footprint.samples * footprint.stream + 24 * block,
        )


class Tuned:
    """The parameters of blocks that are fitted: linears where they are not 0, vectors whole.

    values: in fp32, for the optimiser. keep: where a weight may change. rates: of the optimiser,
    by which the mean size of a tensor's weights is multiplied: `rate` over the number of its
    inputs, for a step changes an output by the sum of theirs, or over the length of a vector;
    `MOST` at most.
    """

    def __init__(self, blocks: list[Block], rate: float = RATE) -> None:
        linears = [linear for block in blocks for linear in block.linears]
        self.weights = list(dict.fromkeys(linear.parameter for linear in linears))
        known, own = set(self.weights), (p for block in blocks for p in block.module.parameters())
        gone = any(not linear.weight.any() for linear in linears)  # whose biases are 0 as well
        vectors = (
            p
            for p in own
            if p.ndim == 1 and p.is_floating_point() and p not in known and (not gone or p.any())
        )
        self.parameters = self.weights + list(dict.fromkeys(vectors))
        inputs = {linear.parameter: linear.shape[1] for linear in linears}
        sizes = [inputs.get(own, own.numel()) for own in self.parameters]
        self.rates = [min(MOST, rate / size) for size in sizes]
        self.before = [parameter.detach().clone() for parameter in self.parameters]
        self.reset()

    def reset(self) -> None:
        """Take the parameters as they are."""
        self.values = [wide(parameter.detach()).clone() for parameter in self.parameters]
        self.keep = [weight.detach() != 0 for weight in self.weights]

    def undo(self) -> None:
        """Give the parameters the values they had."""
        for parameter, value in zip(self.parameters, self.before, strict=True):
            parameter.detach().copy_(value)
        self.reset()

    def learning(self) -> Learning:
        """Return a context in which the parameters take gradients."""
        return Learning(self.parameters)

    def output(self, call: Call) -> int | None:
        """Return which of the block's outputs, flattened, is the first made with what is fitted."""
        with self.learning(), torch.enable_grad():
            return first_differentiable(
                tree_flatten(call.run(call.arguments(slice(0, 1)), half=True))[0]
            )

    def optimiser(self, steps: int) -> tuple[Any, Any]:
        """Return Adam with a rate for each tensor, and the schedule of so many steps."""
        groups = []
        for values, rate in zip(self.values, self.rates, strict=True):
            kept = max(1, int((values != 0).sum()))
            groups.append({"params": [values], "lr": rate * values.abs().sum().item() / kept})
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        warm = max(1, steps // 10)

        def factor(done: int) -> float:
            return min(1.0, (done + 1) / warm) * 0.5 * (1 + math.cos(math.pi * done / steps))

        return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)

    def advance(self, optimiser: Any, schedule: Any) -> None:
        """Take one step on the values, and write them into the parameters."""
        add_gradients(self.parameters)
        for i, (parameter, values) in enumerate(zip(self.parameters, self.values, strict=True)):
            values.grad = None if parameter.grad is None else wide(parameter.grad)
            parameter.grad = None
            if values.grad is not None and i < len(self.keep):
                values.grad.mul_(self.keep[i])
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for parameter, values in zip(self.parameters, self.values, strict=True):
                parameter.copy_(values)


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes; one without any, in a process, has added nothing."""
    if processes.world() == 1:
        return
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    processes.add_up(parameter.grad for parameter in parameters)  # type: ignore[misc]


class Learning:
    """A context in which parameters take gradients, and after which they have none."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_()

    def __exit__(self, *_: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


class Fit:
    """How far a block is from its goals: for each call, the output `which` of the dense block.

    pieces: the samples of a step each, in parts. step: samples in memory at a time. weights: how
    much each position counts, `[positions]`; None for alike.
    """

    def __init__(self, visit: Visit, which: int, weights: Tensor | None, step: int) -> None:
        self.calls, self.which, self.weights, self.step = visit.calls, which, weights, step
        self.goals = [tree_flatten(output)[0][which] for output in visit.dense_outputs()]
        positions = max(linear.positions for linear in visit.block.linears)
        each = max(1, POSITIONS // processes.world() // positions)
        self.pieces = _together(self.calls, each)
        rows = sum(len(goal) for goal in self.goals)
        energy = sum(_error(x, weights).item() * len(x) for x in _chunks(self.goals))
        self.scale = mean(energy / rows) or 1.0

    def losses(self, piece: list[Piece]) -> Iterator[Tensor]:
        """Yield the loss of a piece in parts that memory has room for; they add up to it."""
        count = sum(samples.stop - samples.start for _, samples in piece)
        for number, of_call in piece:
            call, goal = self.calls[number], self.goals[number]
            at = place(call.block.outputs, self.which, goal, call.samples)
            for start in range(of_call.start, of_call.stop, self.step):
                samples = slice(start, min(start + self.step, of_call.stop))
                wanted = call.placement.wake(part(goal, at, samples, call.samples))
                output = tree_flatten(call.run(call.arguments(samples), half=True))[0][self.which]
                share = (samples.stop - samples.start) / count
                yield share * _error(output - wanted, self.weights) / self.scale

    def differentiate(self, piece: list[Piece]) -> None:
        """Add the gradients of a piece's loss to those of the parameters."""
        with torch.enable_grad():
            for loss in self.losses(piece):
                loss.backward()

    def judge(self, pieces: list[list[Piece]]) -> float:
        """Return the mean loss of some pieces, the same in all processes."""
        with torch.no_grad():
            return mean(sum(loss.item() for piece in pieces for loss in self.losses(piece)))


def _together(calls: list[Call], each: int) -> list[list[Piece]]:
    """Return all samples, so many together: micro-batches decide on no step."""
    pieces: list[list[Piece]] = []
    room = 0
    for number, call in enumerate(calls):
        start = 0
        while start < call.samples:
            if not room:
                pieces.append([])
                room = each
            stop = min(start + room, call.samples)
            pieces[-1].append((number, slice(start, stop)))
            room, start = room - (stop - start), stop
    return pieces


def _chunks(goals: list[Tensor]) -> Iterator[Tensor]:
    """Yield all goals, some rows at a time; goals of other shapes apart."""
    start = 0
    while start < len(goals):
        stop, entries = start, 0
        while (
            stop < len(goals)
            and entries < ENERGY
            and goals[stop].shape[1:] == goals[start].shape[1:]
        ):
            entries += len(goals[stop])
            stop += 1
        yield from torch.cat(goals[start:stop]).split(ENERGY)
        start = stop


def mean(value: float) -> float:
    """Return the mean of a value of all processes."""
    values = processes.gathered(value)
    return sum(values) / len(values)


def order(pieces: int, steps: int) -> list[int]:
    """Return the pieces of so many steps, each pass over them in an order of its own."""
    draw = torch.Generator().manual_seed(0)
    rounds = -(-steps // pieces)
    return [i for _ in range(rounds) for i in torch.randperm(pieces, generator=draw).tolist()][
        :steps
    ]


def _error(difference: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean square of `[samples, positions, …]`, each position weighted."""
    squares = wide(difference).square()
    if weights is not None and squares.ndim == 3 and squares.shape[1] <= len(weights):
        squares = squares * weights[: squares.shape[1]].to(squares)[:, None]
    return squares.mean()
