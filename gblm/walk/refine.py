"""Refine a pruned block: a few optimiser steps on what it keeps, towards the dense block."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gblm.machine import processes
from gblm.machine.device import halved
from gblm.maths.stats import wide
from gblm.walk.call import Call, made
from gblm.walk.survey import Block

RATE = 0.01  # of Adam, times the mean size of the weights of a tensor
POSITIONS = 512  # about so many in a step
JUDGED = 4  # steps whose samples tell whether it was worth it


Tuned = list[tuple[nn.Parameter, Tensor, Tensor | None]]  # as `_tuned` gives it


def refine(
    block: Block,
    call: Call,
    target: Any,
    step: int,
    *,
    passes: float = 1.0,
    weights: Tensor | None = None,
) -> None:
    """Fit what a block keeps, its biases and its norms, to the outputs of the dense block.

    Minimises Σ weights·‖f(X) − f_dense(X_dense)‖² by Adam, with a rate that warms up over a tenth
    of the steps and then falls as a cosine, `passes` times over the samples in a drawn order; f(X)
    is the first tensor that the block makes of them. Weights that are 0 stay 0. Products are in
    bfloat16 where the device is quicker with them. Where the loss on some of the samples is no
    smaller afterwards than before, all is left as it was.

    call: the block's call on the pruned stream. target: what the dense block gives. step: samples
    in memory at a time. weights: how much each position counts, `[positions]`; None for alike.
    """
    tuned = _tuned(block)
    which = _tuned_output(block.module, call, tuned)
    if which is None:
        return
    fit = _Fit(block.module, call, tree_flatten(target)[0][which], which, step, weights)
    positions = POSITIONS // processes.world()  # of this process
    pieces = list(
        call.pieces(max(1, positions // max(linear.positions for linear in block.linears)))
    )
    steps = max(processes.gathered(max(1, round(passes * len(pieces)))))
    order = _order(len(pieces), steps)
    optimiser, schedule = _optimiser(tuned, steps)
    dense = [parameter.detach().clone() for parameter, _, _ in tuned]
    judged = pieces[:: max(1, len(pieces) // JUDGED)]
    before = fit.judge(judged)
    try:
        for parameter, _, _ in tuned:
            parameter.requires_grad_()
        for index in order:
            fit.differentiate(pieces[index])
            processes.add_up(p.grad for p, _, _ in tuned if p.grad is not None)
            _advance(tuned, optimiser, schedule)
    finally:
        for parameter, _, _ in tuned:
            parameter.requires_grad_(False)
            parameter.grad = None
    if not fit.judge(judged) < before:
        for (parameter, _, _), value in zip(tuned, dense, strict=True):
            parameter.detach().copy_(value)


@dataclass
class _Fit:
    """How far a block is from its goal, the output number `which` of the dense block."""

    module: nn.Module
    call: Call
    goal: Tensor
    which: int
    step: int
    weights: Tensor | None

    def __post_init__(self) -> None:
        energy = [_error(part, self.weights).item() * len(part) for part in self.goal.split(64)]
        self.scale = _mean(sum(energy) / len(self.goal)) or 1.0

    def losses(self, piece: slice) -> Iterator[Tensor]:
        """Yield the loss of a piece in parts that memory has room for; they add up to it."""
        carried = len(self.goal) // self.call.samples
        for start in range(piece.start, piece.stop, self.step):
            part = slice(start, min(start + self.step, piece.stop))
            wanted = self.goal[part.start * carried : part.stop * carried]
            with halved(self.module):
                output = tree_flatten(self.call.run(self.call.arguments(part)))[0][self.which]
            share = (part.stop - part.start) / (piece.stop - piece.start)
            yield share * _error(output - wanted.to(output.device), self.weights) / self.scale

    def differentiate(self, piece: slice) -> None:
        """Add the gradients of a piece's loss to those of the parameters."""
        with torch.enable_grad():
            for loss in self.losses(piece):
                loss.backward()

    def judge(self, pieces: list[slice]) -> float:
        """Return the mean loss of some pieces, the same in all processes."""
        with torch.no_grad():
            return _mean(sum(loss.item() for piece in pieces for loss in self.losses(piece)))


def _mean(value: float) -> float:
    found = processes.gathered(value)
    return sum(found) / len(found)


def _tuned_output(module: nn.Module, call: Call, tuned: Tuned) -> int | None:
    """Return which of the block's outputs, flattened, is the first made with what is fitted."""
    try:
        for parameter, _, _ in tuned:
            parameter.requires_grad_()
        with torch.enable_grad(), halved(module):
            return made(tree_flatten(call.run(call.arguments(slice(0, 1))))[0])
    finally:
        for parameter, _, _ in tuned:
            parameter.requires_grad_(False)


def _tuned(block: Block) -> Tuned:
    """Return every parameter to be fitted, its values in fp32, and which of them may change."""
    weights = [linear.parameter for linear in block.linears]
    known = set(weights)
    others = [p for p in block.module.parameters() if p.ndim == 1 and p.is_floating_point()]
    tuned: Tuned = [(w, wide(w.detach()).clone(), wide(w.detach() != 0)) for w in weights]
    return tuned + [(p, wide(p.detach()).clone(), None) for p in others if p not in known]


def _order(pieces: int, steps: int) -> list[int]:
    """Return the pieces of so many steps, each pass over them in an order of its own."""
    draw = torch.Generator().manual_seed(0)
    rounds = -(-steps // pieces)
    return [i for _ in range(rounds) for i in torch.randperm(pieces, generator=draw).tolist()][
        :steps
    ]


def _optimiser(tuned: Tuned, steps: int) -> tuple[Any, Any]:
    groups = []
    for _, values, _ in tuned:
        kept = max(1, int((values != 0).sum()))
        groups.append({"params": [values], "lr": RATE * values.abs().sum().item() / kept})
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    warm = max(1, steps // 10)

    def factor(done: int) -> float:
        return min(1.0, (done + 1) / warm) * 0.5 * (1 + math.cos(math.pi * done / steps))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def _advance(tuned: Tuned, optimiser: Any, schedule: Any) -> None:
    """Take one step on the fp32 values, and write them into the parameters."""
    for parameter, values, keep in tuned:
        if parameter.grad is None:
            values.grad = None
            continue
        gradient = wide(parameter.grad)
        values.grad = gradient if keep is None else gradient.mul_(keep)
        parameter.grad = None
    optimiser.step()
    schedule.step()
    with torch.no_grad():
        for parameter, values, _ in tuned:
            parameter.copy_(values)


def _error(difference: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean square of `[samples, positions, …]`, each position weighted."""
    squares = wide(difference).square()
    if weights is not None and squares.ndim == 3 and squares.shape[1] == len(weights):
        squares = squares * weights.to(squares)[:, None]
    return squares.mean()
