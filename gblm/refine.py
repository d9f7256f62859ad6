"""Refine a pruned block: a few optimiser steps on what it keeps, towards the dense block."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gblm import distributed
from gblm.stats import wide
from gblm.stream import Call, made
from gblm.survey import Block

RATE = 0.01  # of Adam, times the mean size of the weights of a tensor
POSITIONS = 512  # about so many in a step


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
    is the first tensor that the block makes of them. Weights that are 0 stay 0. Where the last
    quarter of the steps has no smaller loss than the first, all is left as it was.

    call: the block's call on the pruned stream. target: what the dense block gives. step: samples
    in memory at a time. weights: how much each position counts, `[positions]`; None for alike.
    """
    tuned = _tuned(block)
    which = _tuned_output(call, tuned)
    if which is None:
        return
    goal = tree_flatten(target)[0][which]
    positions = POSITIONS // distributed.world()  # of this process
    size = max(1, positions // max(linear.positions for linear in block.linears))
    pieces = list(call.pieces(size))
    steps = max(distributed.gathered(max(1, round(passes * len(pieces)))))
    order = _order(len(pieces), steps)
    optimiser, schedule = _optimiser(tuned, len(order))
    before = [parameter.detach().clone() for parameter, _, _ in tuned]
    losses = []
    carried = len(goal) // call.samples
    scale = _mean(_error(goal, weights).item()) or 1.0
    try:
        for parameter, _, _ in tuned:
            parameter.requires_grad_()
        for index in order:
            piece = pieces[index]
            losses.append(0.0)
            for start in range(piece.start, piece.stop, step):
                part = slice(start, min(start + step, piece.stop))
                wanted = goal[part.start * carried : part.stop * carried]
                share = (part.stop - part.start) / (piece.stop - piece.start)
                with torch.enable_grad():
                    output = tree_flatten(call.run(call.arguments(part)))[0][which]
                    loss = share * _error(output - wanted, weights) / scale
                    loss.backward()
                losses[-1] += loss.item()
            distributed.add_up(p.grad for p, _, _ in tuned if p.grad is not None)
            losses[-1] = _mean(losses[-1])
            _advance(tuned, optimiser, schedule)
    finally:
        for parameter, _, _ in tuned:
            parameter.requires_grad_(False)
            parameter.grad = None
    quarter = max(1, len(losses) // 4)
    if not sum(losses[-quarter:]) < sum(losses[:quarter]):
        for (parameter, _, _), value in zip(tuned, before, strict=True):
            parameter.detach().copy_(value)


def _mean(value: float) -> float:
    found = distributed.gathered(value)
    return sum(found) / len(found)


def _tuned_output(call: Call, tuned: Tuned) -> int | None:
    """Return which of the block's outputs, flattened, is the first made with what is fitted."""
    try:
        for parameter, _, _ in tuned:
            parameter.requires_grad_()
        with torch.enable_grad():
            return made(tree_flatten(call.run(call.arguments(slice(0, 1))))[0])
    finally:
        for parameter, _, _ in tuned:
            parameter.requires_grad_(False)


def _tuned(block: Block) -> Tuned:
    """Return every parameter to be fitted, its values in fp32, and which of them may change."""
    weights = [linear.parameter for linear in block.linears]
    known = set(weights)
    others = [p for p in block.module.parameters() if p.ndim == 1 and p.is_floating_point()]
    tuned: Tuned = [(w, wide(w.detach()).clone(), w.detach() != 0) for w in weights]
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
        values.grad = gradient if keep is None else gradient * keep
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
