"""The gradients of the dense model: per sample, summed as |g| and g², block by block.

A wrapped block is one autograd function that keeps its input alone. Backward recomputes the block
in micro-batches, and hooks on its linears turn each sample's inputs X and output gradients dY into
that sample's weight gradient dYᵀX. Weights never get a `.grad`, and when the sweep leaves a block
its sums are final. Where the activations of the whole model fit into memory, a plain backward with
the same hooks does without the recomputation.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from gblm.base import Adapter, Batch, GblmError, Statistics, one_of
from gblm.machine import processes
from gblm.machine.device import MicroBatch, free_memory, out_of_memory
from gblm.machine.files import read_tensors, write_tensors
from gblm.machine.offload import here, offload_of
from gblm.maths import stats
from gblm.walk.call import Call, Forward
from gblm.walk.head import finite, head_backward, saved
from gblm.walk.stream import check, replaced
from gblm.walk.survey import (
    Block,
    Linear,
    find_adapter,
    hooked,
    placed,
    quiet,
    size,
    survey,
    take,
)
from gblm.walk.survey import micro_batch as sized

log = logging.getLogger(__name__)

FEWEST = 16  # samples whose gradients are taken, where a share of them is asked for
BACKWARDS = ("auto", "blocks", "model")
Gradients = dict[str, Statistics]
Progress = Callable[[int, int], None]  # done, of how many


class Keep(Protocol):
    """Keeps the sums of blocks that a sweep has left, for a sweep that goes on from there."""

    def has(self, block: Block) -> bool: ...
    def inputs(self, block: Block) -> dict[int, Tensor]: ...
    def keep(self, block: Block, sums: Gradients, inputs: dict[int, Tensor]) -> None: ...


def gradient_sums(
    model: nn.Module,
    batch: Batch,
    needs: Iterable[str],
    *,
    adapter: Adapter | None = None,
    blocks: list[Block] | None = None,
    micro_batch: int | None = None,
    backward: str = "auto",
    share: float = 1.0,
    keep: Keep | None = None,
    chose: Callable[[str], None] = lambda backward: None,
    spill: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Gradients:
    """Return the sums of the per-sample gradients of every linear of a model, by its name.

    needs: which sums, of those in `stats.GRADIENT`. backward: "blocks" (one block's activations at
    a time, recomputed), "model" (plain), or "auto": plain where that takes at most half of the free
    memory. share: the part of the samples, from the first, 16 at least. blocks: what `survey` found
    of this model and batch, where that is known. keep: takes the sums of each block as soon as they
    are final, instead of the result, which then is empty, and has those of a sweep that was cut
    off, which goes on from there. chose: is told which backward it is. spill: a folder for the
    inputs of the blocks between forward and backward, in memory where None. The others are those of
    `prune`.

    Raises `GblmError` where a loss or a sum holds a NaN or an Inf.
    """
    one_of(backward, BACKWARDS, "backward")
    batch = placed(batch, model)
    batch = take(batch, slice(0, max(FEWEST, math.ceil(share * size(batch)))))
    adapter = adapter or find_adapter(model)
    blocks = blocks or survey(model, batch, adapter)
    micro = sized(blocks, size(batch), micro_batch)
    # A plain backward holds the activations of the whole model, so that it takes fewer samples.
    fewer = MicroBatch(max(1, micro.samples // 4), auto=True) if micro.auto else micro
    needs = frozenset(needs) & set(stats.GRADIENT)
    batch = processes.share(batch)
    with quiet(model), torch.enable_grad():
        if backward == "auto" and offload_of(model):
            backward = "blocks"
        if backward == "auto":
            fits = _fits(model, batch, adapter, blocks, needs, fewer)
            backward = "model" if fits else "blocks"
        chose(backward)
        log.debug(
            "gradients by %s, of %d samples: %s", backward, size(batch), ", ".join(sorted(needs))
        )
        if backward == "model":
            found = whole_backward(model, batch, adapter, blocks, needs, fewer, progress)
        else:
            return block_backward(
                model, batch, adapter, blocks, needs, micro, progress, keep=keep, spill=spill
            )
    for block in blocks:
        own = {linear.name: found[linear.name] for linear in block.linears}
        _finish(block, own)
        if keep and not keep.has(block):
            keep.keep(block, own, {})
    return {} if keep else found


def whole_backward(
    model: nn.Module,
    batch: Batch,
    adapter: Adapter,
    blocks: list[Block],
    needs: frozenset[str],
    micro: MicroBatch,
    progress: Progress,
) -> Gradients:
    """Differentiate the whole model, micro-batch by micro-batch: see `gradient_sums`."""
    samples = size(batch)

    def sweep(step: int) -> Gradients:
        found = zero_sums(blocks, needs)
        for start in range(0, samples, step):
            part = take(batch, slice(start, start + step))
            hooks = [
                per_sample(x, found[x.name], size(part)) for block in blocks for x in block.linears
            ]
            with hooked(hooks):
                hidden = adapter.trunk(model, part)
            finite(adapter.loss(model, hidden, part), start).sum().backward()
            progress(min(start + step, samples), samples)
        return found

    return micro.run(sweep)


def block_backward(
    model: nn.Module,
    batch: Batch,
    adapter: Adapter,
    blocks: list[Block],
    needs: frozenset[str],
    micro: MicroBatch,
    progress: Progress,
    keep: Keep | None = None,
    spill: Path | None = None,
) -> Gradients:
    """Differentiate the model block by block, the head in micro-batches: see `gradient_sums`."""
    found: Gradients = {}
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, 2 * len(blocks))

    def make(block: Block, own: Forward) -> Forward:
        def differentiate(call: Call, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
            if spill:
                _unspill(call, spill / f"{block.name}.input")
            if keep and keep.has(block):
                inputs = _known(call, keep.inputs(block))
            else:
                with here(block.module):
                    work = partial(recompute, block, call, grads, needs)
                    sums, inputs = micro.run(work)
                _finish(block, sums)
                if keep:
                    keep.keep(block, sums, {i: x for i, x in enumerate(inputs) if x is not None})
                else:
                    found.update(sums)
            advance()
            return inputs

        def run(*args: Any, **kwargs: Any) -> Any:
            call = Call.of(block, own, size(batch), args, kwargs, spill)
            with torch.no_grad():  # a graph would hold the activations of all samples
                outputs, spec = tree_flatten(micro.run(call.outputs))
            advance()
            # The graph must reach the first block, whose input needs no gradient.
            anchor = torch.zeros((), requires_grad=True)
            outputs = _Block.apply(anchor, call, outputs, differentiate, *call.leaves)
            call.leaves = [x.detach() if isinstance(x, Tensor) else x for x in call.leaves]
            if spill:
                _spill(call, spill / f"{block.name}.input")
            return tree_unflatten(outputs, spec)

        return run

    with replaced(blocks, make):
        hidden = adapter.trunk(model, batch)
        gradients = head_backward(model, hidden, batch, adapter, micro)
        pairs = zip(tree_flatten(hidden)[0], gradients, strict=True)
        reached = [(x, gradient) for x, gradient in pairs if x.requires_grad]  # by some block
        torch.autograd.backward([x for x, _ in reached], [gradient for _, gradient in reached])
    return found


def _finish(block: Block, sums: Gradients) -> None:
    """Make the sums of a block those of all processes, and check them."""
    processes.add_statistics([sums[linear.name] for linear in block.linears])
    for linear in block.linears:
        check(linear, sums[linear.name])


def _known(call: Call, inputs: dict[int, Tensor]) -> list[Tensor | None]:
    """Return the gradients by what a finished block was called with: zeros but where known.

    Those of all finished blocks but the last go to finished blocks, which do not look at them.
    """
    return [
        (inputs[i].to(leaf) if i in inputs else torch.zeros_like(leaf)) if wanted else None
        for i, (leaf, wanted) in enumerate(zip(call.leaves, call.wanted, strict=True))
    ]


def _spill(call: Call, path: Path) -> None:
    """Write what carries the samples of a call into a file, and keep its device alone."""
    carried = {str(i): x for i, x in enumerate(call.leaves) if call.carries[i]}
    write_tensors(path, carried)
    call.leaves = [x.device if call.carries[i] else x for i, x in enumerate(call.leaves)]


def _unspill(call: Call, path: Path) -> None:
    """Read what `_spill` has written, and remove the file."""
    for i, value in read_tensors(path, way="check its disk, and run again").items():
        call.leaves[int(i)] = value.to(call.leaves[int(i)])
    path.unlink()


class _Block(torch.autograd.Function):
    """A block as one node of the graph, which keeps its input alone and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, call: Call, outputs: list[Any], differentiate: Any, *leaves: Any
    ) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.differentiate = call, differentiate
        call.wanted = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        inputs = ctx.differentiate(ctx.call, grads)
        ctx.call = None  # frees the block's input
        return None, None, None, None, *inputs


def recompute(
    block: Block, call: Call, grads: Sequence[Tensor | None], needs: frozenset[str], step: int
) -> tuple[Gradients, list[Tensor | None]]:
    """Run a block again in micro-batches and differentiate it.

    `grads` are the gradients by its outputs. Returns the gradient sums of its linears, and the
    gradients by the leaves it was called with, None where none is wanted.
    """
    sums = zero_sums([block], needs)
    totals = [
        torch.zeros_like(leaf) if wanted else None
        for leaf, wanted in zip(call.leaves, call.wanted, strict=True)
    ]
    for piece in call.pieces(step):
        samples = piece.stop - piece.start
        leaves = [
            leaf.detach().requires_grad_() if wanted else leaf
            for leaf, wanted in zip(call.arguments(piece), call.wanted, strict=True)
        ]
        hooks = [per_sample(linear, sums[linear.name], samples) for linear in block.linears]
        with torch.enable_grad(), hooked(hooks):
            outputs, _ = tree_flatten(call.run(leaves))
        tensors, parts = [], []
        for output, grad in zip(outputs, grads, strict=True):
            if grad is not None and grad.ndim and output.requires_grad:
                carried = len(output) // samples
                tensors.append(output)
                parts.append(grad[piece.start * carried : piece.stop * carried])
        torch.autograd.backward(tensors, parts)
        for i, total in enumerate(totals):
            if total is not None and leaves[i].grad is not None:
                total[call.part(i, piece)] += leaves[i].grad
    return sums, totals


def per_sample(linear: Linear, sums: Statistics, samples: int) -> Any:
    """Hook a linear: the gradient of every sample is added once backward reaches its output."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = _by_sample(linear, args[0].detach(), samples)
        leaf = not output.requires_grad  # nothing before this linear needs a gradient
        output.requires_grad_()
        output.register_hook(
            lambda dy: stats.add_gradients(sums, x, _by_sample(linear, dy, samples))
        )
        return output.clone() if leaf else output  # a leaf could not be changed in place

    return linear.module.register_forward_hook(hook)


def _by_sample(linear: Linear, value: Tensor, samples: int) -> Tensor:
    rows = linear.rows(value)
    if samples > 1 and rows.shape[:-1].numel() != samples * linear.positions:
        raise GblmError(
            f"{linear} does not see the same number of inputs of every "
            "sample, so that its gradients cannot be told apart; use --micro-batch 1"
        )
    return rows.reshape(samples, -1, rows.shape[-1])


def zero_sums(blocks: list[Block], needs: frozenset[str]) -> Gradients:
    """Return the sums of no samples, of every linear of the blocks."""
    return {
        linear.name: stats.zeros(needs, linear.weight, linear.positions)
        for block in blocks
        for linear in block.linears
    }


def activations(
    model: nn.Module, one: Batch, adapter: Adapter, blocks: list[Block]
) -> tuple[int, int]:
    """Return the bytes that a plain backward keeps of one sample: of the trunk, and of the head."""
    linears = [linear for block in blocks for linear in block.linears]
    hooks = [per_sample(linear, Statistics({}), 1) for linear in linears]
    with hooked(hooks), saved(model) as storages:
        hidden = adapter.trunk(model, one)
        trunk = sum(storages.values())
        loss = adapter.loss(model, hidden, one)
        head = sum(storages.values()) - trunk
    del loss
    return trunk, head


def _fits(
    model: nn.Module,
    batch: Batch,
    adapter: Adapter,
    blocks: list[Block],
    needs: frozenset[str],
    micro: MicroBatch,
) -> bool:
    """Say whether a plain backward takes at most half of the free memory, from one sample's."""
    try:
        kept = sum(activations(model, take(batch, slice(0, 1)), adapter, blocks))
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            return False
        raise
    linears = [linear for block in blocks for linear in block.linears]
    sums = sum(4 * linear.weight.numel() * len(needs) for linear in linears)
    return kept * micro.samples + sums <= free_memory(linears[0].weight.device) / 2
