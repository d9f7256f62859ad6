"""Regional gradients and regional optimisation: what a block alone tells (Wanda++).

Both need no backward pass of the whole model. Source: arXiv 2503.04992.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gblm.machine import processes
from gblm.machine.device import MicroBatch
from gblm.maths import stats
from gblm.walk.call import Call, made
from gblm.walk.gradients import Gradients, per_sample, zero_sums
from gblm.walk.stream import Inputs, collect
from gblm.walk.survey import Block, hooked

SAMPLES = 32  # of a round, as published


def regional_sums(block: Block, call: Call, needs: Iterable[str], micro: MicroBatch) -> Gradients:
    """Return the sums of the gradients of ‖f(X)‖₂ of every sample, f being the block (eq. 3).

    f(X) is the first tensor that the block makes of its linears.
    """

    def sweep(step: int) -> Gradients:
        sums = zero_sums([block], frozenset(needs) & set(stats.GRADIENT))
        for piece in call.pieces(step):
            samples = piece.stop - piece.start
            hooks = [per_sample(linear, sums[linear.name], samples) for linear in block.linears]
            with torch.enable_grad(), hooked(hooks):
                _, output = _output(call, piece)
                output.reshape(samples, -1).norm(dim=1).sum().backward()
        return sums

    found = micro.run(sweep)
    processes.add_statistics([found[linear.name] for linear in block.linears])
    return found


def optimise(
    block: Block,
    call: Call,
    solve: Callable[[list[Inputs]], object],
    needs: frozenset[str],
    micro: MicroBatch,
    rounds: int,
    rate: float,
) -> None:
    """Let the weights of a block's linears follow the dense block while it is pruned (algorithm 1).

    In every round `solve(inputs by group)` prunes the block by what 32 drawn samples tell; then
    each of these takes one step of RMSprop, at that rate, down ‖f(X) − f_dense(X)‖². Every weight
    may change, also one that had gone: the block ends unpruned, ready for its last solve.

    call: the block's call. needs: the statistics of inputs that `solve` takes.
    """
    draw = torch.Generator().manual_seed(processes.rank())
    each = min(SAMPLES // processes.world() or 1, *processes.gathered(call.samples))
    parts = [call.some(torch.randperm(call.samples, generator=draw)[:each]) for _ in range(rounds)]
    targets = [tree_flatten(micro.run(part.outputs))[0] for part in parts]
    weights = [linear.parameter for linear in block.linears]
    values = [stats.wide(weight.detach()).clone() for weight in weights]
    optimiser = torch.optim.RMSprop(values, lr=rate)
    for part, target in zip(parts, targets, strict=True):
        found = micro.run(partial(collect, block, part, needs, {}))
        solve(found)
        for value, weight in zip(values, weights, strict=True):
            value.copy_(weight)
        for piece in part.pieces(1):
            _differentiate(part, piece, target, weights)
            processes.add_up(weight.grad for weight in weights if weight.grad is not None)
            for value, weight in zip(values, weights, strict=True):
                value.grad = None if weight.grad is None else stats.wide(weight.grad)
                weight.grad = None
            optimiser.step()
            for value, weight in zip(values, weights, strict=True):
                weight.copy_(value)


def _differentiate(
    call: Call, piece: slice, target: list[Any], weights: list[nn.Parameter]
) -> None:
    """Give the weights the gradient of one sample's distance from the dense block's output."""
    for weight in weights:
        weight.requires_grad_()
    try:
        with torch.enable_grad():
            which, output = _output(call, piece)
            carried = len(target[which]) // call.samples
            wanted = target[which][piece.start * carried : piece.stop * carried]
            (output - wanted.to(output)).square().sum().backward()
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def _output(call: Call, piece: slice) -> tuple[int, Tensor]:
    """Return the first output that the block makes of its linears: which it is, and its values."""
    outputs = tree_flatten(call.run(call.arguments(piece)))[0]
    which = made(outputs)
    assert which is not None  # a linear that is used has been seen to reach an output
    return which, stats.wide(outputs[which])
