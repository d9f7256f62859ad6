"""The gradients of the dense model: per sample, summed as |g| and g², block by block.

The samples go forward through the blocks, whose inputs are kept. Then the head's loss is
differentiated, and the blocks are, from the last to the first: each is run again, and hooks on its
linears turn every sample's inputs X and output gradients dY into its weight gradient dYᵀX. Weights
never get a `.grad`, and when the sweep leaves a block its sums are final. Where the activations of
the whole model fit into memory, a plain backward with the same hooks needs no second run.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from gblm.base import Adapter, Batch, GblmError, Statistics, one_of
from gblm.machine import processes
from gblm.machine.device import BatchSize, free_memory, halved, memory_errors, out_of_memory
from gblm.machine.offload import offload_of, onload
from gblm.maths import stats
from gblm.walk.blocks import Block, Linear, MicroBatch, frozen, micro_batches, size, take, to_device
from gblm.walk.call import Call, part, place
from gblm.walk.head import differentiate, finite, loss_scales, saved
from gblm.walk.inputs import NotFinite, check
from gblm.walk.products import Products, Use
from gblm.walk.survey import find_adapter
from gblm.walk.walk import Run, Walk

log = logging.getLogger(__name__)

FEWEST = 8  # samples that a share of them has, at least
BACKWARDS = ("auto", "blocks", "model")
Gradients = dict[str, Statistics]
OnTheWay = dict[str, Tensor]  # gradients, by the block, micro-batch and output they are at
SAMPLES = "samples"  # and beside them, how many samples each micro-batch has


class Store(Protocol):
    """Keeps the sums of finished blocks, for a sweep that goes on from there."""

    def has(self, block: Block) -> bool: ...
    def on_the_way(self) -> OnTheWay: ...
    def keep(self, block: Block, sums: Gradients, on_the_way: OnTheWay) -> None: ...


def gradient_sums(
    model: nn.Module,
    batch: Batch,
    needs: Iterable[str],
    *,
    adapter: Adapter | None = None,
    micro_batch: int | None = None,
    backward: str = "auto",
    share: float = 1.0,
) -> Gradients:
    """Return the sums of the per-sample gradients of every linear of a model, by its name.

    needs: which sums, of those in `stats.GRADIENT`. backward: "blocks" (one block's activations at
    a time, recomputed), "model" (plain), or "auto": plain where that takes at most half of the free
    memory. share: gradients are those of the first ⌈share·n⌉ of n samples, 8 at least. Other
    arguments are as in `prune`.

    Raises `GblmError` where a loss or a sum holds a NaN or an Inf.
    """
    adapter = adapter or find_adapter(model)
    samples = first(model, batch, adapter, share)
    return sweep(Walk.of(model, samples, adapter, micro_batch=micro_batch), needs, backward)[0]


def first(model: nn.Module, batch: Batch, adapter: Adapter, share: float, fewest: int = 0) -> Batch:
    """Return a share of the samples, so many at least, with what their losses need."""
    batch = adapter.coupled(model, batch)
    return take(batch, slice(0, share_of(size(batch), share, fewest)))


def share_of(samples: int, share: float, fewest: int = 0) -> int:
    """Return how many samples a share of them is: 8 and `fewest` at least, where there are."""
    return min(samples, max(FEWEST, fewest, math.ceil(share * samples)))


def sweep(
    walk: Walk, needs: Iterable[str], backward: str = "auto", store: Store | None = None
) -> tuple[Gradients, str]:
    """Return the sums of gradients by linear, and which backward it was: see `gradient_sums`.

    store: takes the sums of each block as soon as they are final, instead of the result, which then
    is empty, and has those of a sweep that was cut off, which goes on from there.
    """
    names = frozenset(needs) & set(stats.GRADIENT)
    backward = choose(walk, names, one_of(backward, BACKWARDS, "backward"))
    log.debug("gradients by %s, of %d samples: %s", backward, walk.samples, ", ".join(names))
    with frozen(walk.model), torch.enable_grad(), memory_errors():
        work = PlainBackward if backward == "model" else BlockBackward
        for scale in loss_scales(walk.model):
            try:
                return work(walk, names, store, scale).run(), backward
            except NotFinite:
                if scale == 1:
                    raise
    raise AssertionError("the last scale is 1")


def choose(walk: Walk, needs: frozenset[str], backward: str) -> str:
    """Return which backward is taken for "auto": plain where its activations have room."""
    if backward != "auto":
        return backward
    if offload_of(walk.model):
        return "blocks"
    with frozen(walk.model), torch.enable_grad():
        return "model" if _fits(walk, needs) else "blocks"


@dataclass
class PlainBackward:
    """A plain backward of the whole model, some samples at a time."""

    walk: Walk
    needs: frozenset[str]
    store: Store | None
    scale: float

    def run(self) -> Gradients:
        """Return the sums of all linears."""
        walk = self.walk
        sums = fewer(walk).run(self._sweep)
        for block in walk.blocks:
            own = {linear.name: sums[linear.name] for linear in block.linears}
            finish(block, own, walk.samples, self.scale)
            if self.store and not self.store.has(block):
                self.store.keep(block, own, {})
        return {} if self.store else sums

    def _sweep(self, step: int) -> Gradients:
        walk, done = self.walk, 0
        linears = [linear for block in walk.blocks for linear in block.linears]
        sums = zero_sums(linears, self.needs)
        for some in micro_batches(walk.batch, step, walk.adapter):
            self._add(some, linears, sums)
            done += size(some.batch)
            walk.progress("gradients", done, walk.samples)
        return sums

    def _add(self, some: MicroBatch, linears: list[Linear], sums: Gradients) -> None:
        """Add the gradients of some samples; their graph ends here, before the next one begins."""
        walk, batch = self.walk, to_device(some.batch, self.walk.device)
        watch = PerSample(linears, sums, size(batch))
        with watch, halved(walk.model, torch.float32):
            hidden = walk.adapter.trunk(walk.model, batch)
        losses = finite(walk.adapter.loss(walk.model, hidden, batch), some.numbers)
        (losses * self.scale).sum().backward()
        watch.finish()


@dataclass
class Recorded:
    """A call of a block, the gradients of its outputs, and where those of its inputs go on to.

    edges: of the graph, by the number of the input. arrived, dtypes: the gradients so far, and
    their dtypes, by output.
    """

    call: Call
    edges: dict[int, GradientEdge]
    arrived: list[Tensor | None] = field(default_factory=list)
    dtypes: list[torch.dtype | None] = field(default_factory=list)

    def add(self, index: int, gradient: Tensor | None) -> None:
        """Add a gradient by the output of that number."""
        if gradient is not None:
            placement, known = self.call.placement, self.arrived[index]
            total = gradient if known is None else placement.wake(known) + gradient
            self.arrived[index] = placement.rest(total)


class KeepGradient(torch.autograd.Function):
    """The identity, whose backward adds the gradient to a `Recorded`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passed: Recorded, index: int, output: list) -> Tensor:
        ctx.passed, ctx.index = passed, index
        ctx.set_materialize_grads(False)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.passed.add(ctx.index, gradients[0])
        return None, None, None, None


class BlockBackward:
    """A backward block by block: what is between them is the model's own graph."""

    def __init__(
        self, walk: Walk, needs: frozenset[str], store: Store | None, scale: float
    ) -> None:
        self.walk, self.needs, self.store, self.scale = walk, needs, store, scale
        self.passed: list[list[Recorded]] = []  # by block and micro-batch
        self.head: int | None = None  # samples of the head at a time
        self.resumed = False  # whether a former sweep has left the last blocks
        self.done = 0

    def run(self) -> Gradients:
        """Return the sums of all linears."""
        sums: Gradients = {}
        with self.walk.runs(to_file=True) as (runs,):
            self.samples = torch.tensor([size(run.batch) for run in runs])
            for block in self.walk.blocks:
                self._forward(block, runs)
            self.resumed = self._resume()
            if not self.resumed:
                for run in runs:
                    self._differentiate_head(run)
            for index in reversed(range(len(self.walk.blocks))):
                sums |= self._backward(index)
        return sums

    def _advance(self) -> None:
        self.done += 1
        self.walk.progress("gradients", self.done, 2 * len(self.walk.blocks))

    def _forward(self, block: Block, runs: list[Run]) -> None:
        """Take all micro-batches through a block, and keep what they leave there."""
        self.passed.append([])
        with onload(block.module):
            for run in runs:
                call = run.at(block)
                with torch.no_grad():
                    outputs = self.walk.micro.run(call.outputs)
                passed = Recorded(call, _edges(call, run))
                self.passed[-1].append(passed)
                run.go_on(_outputs_kept(passed, outputs))
        self._advance()

    def _differentiate_head(self, run: Run) -> None:
        """Give the last of the model's graph the gradients of the samples' losses."""
        leaves = tree_flatten(run.hidden)[0]
        gradients, self.head = self.walk.micro.run(
            lambda step: differentiate(self.walk, run, self.scale, self.head or 0, step)
        )
        reached = [(x, g) for x, g in zip(leaves, gradients, strict=True) if x.requires_grad]
        torch.autograd.backward([x for x, _ in reached], [g for _, g in reached], retain_graph=True)
        run.hidden = None

    def _resume(self) -> bool:
        """Put the gradients in place that a former sweep was on its way with.

        Say whether there are any, of micro-batches as they are now.
        """
        if not self.store or not self.store.has(self.walk.blocks[-1]):
            return False
        gradients = self.store.on_the_way()
        if not torch.equal(gradients.pop(SAMPLES, torch.empty(0)), self.samples):
            return False
        for name, gradient in gradients.items():
            block, micro, output = map(int, name.split("."))
            passed = self.passed[block][micro]
            scaled = self.walk.placement.wake(gradient) * self.scale
            passed.add(output, scaled.to(passed.dtypes[output]))
        return True

    def _backward(self, index: int) -> Gradients:
        """Return the sums of a block, unless the store takes them; passes the gradients on."""
        block = self.walk.blocks[index]
        passed = self.passed.pop()
        kept = self.store is not None and self.store.has(block)
        if kept and self.resumed:
            self._advance()
            return {}
        with onload(block.module):
            sums, gradients = self.walk.micro.run(lambda step: self._recompute(block, passed, step))
        for own, by_leaf in zip(passed, gradients, strict=True):
            if by_leaf:
                edges = [own.edges[i] for i in by_leaf]
                torch.autograd.backward(edges, list(by_leaf.values()), retain_graph=True)
        finish(block, sums, self.walk.samples, self.scale)
        if self.store and not kept:
            self.store.keep(block, sums, self._on_the_way())
        self._advance()
        return {} if self.store else sums

    def _on_the_way(self) -> OnTheWay:
        """Return the gradients that have come to the outputs of blocks yet to be left."""
        gradients = {
            f"{block}.{micro}.{output}": stats.wide(gradient) / self.scale
            for block, calls in enumerate(self.passed)
            for micro, own in enumerate(calls)
            for output, gradient in enumerate(own.arrived)
            if gradient is not None
        }
        return {**gradients, SAMPLES: self.samples}

    def _recompute(
        self, block: Block, passed: list[Recorded], step: int
    ) -> tuple[Gradients, list[dict[int, Tensor]]]:
        """Run a block again: return its sums, and the gradients by the leaves of each call."""
        sums = zero_sums(block.linears, self.needs)
        if any(linear.alone for linear in block.linears):
            step = 1  # rows of several samples could not be told apart
        return sums, [recompute(own, sums, step) for own in passed]


def _edges(call: Call, run: Run) -> dict[int, GradientEdge]:
    """Return where the gradients of a call's leaves go on to, and let the call hold no graph."""
    edges = {}
    away = {id(rest): tensor for tensor, rest in run.away}
    for i, leaf in enumerate(call.leaves):
        tensor = away.get(id(leaf), leaf)
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            edges[i] = get_gradient_edge(tensor)
        if isinstance(leaf, Tensor):
            call.leaves[i] = leaf.detach()
    return edges


def _outputs_kept(passed: Recorded, outputs: Any) -> Any:
    """Return a block's outputs for the model's code, which hand their gradients to `passed`."""
    leaves, spec = tree_flatten(outputs)
    anchor = torch.zeros((), requires_grad=True)
    passed.arrived = [None] * len(leaves)
    passed.dtypes = [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in leaves]
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[i] = KeepGradient.apply(anchor, passed, i, [leaf])
    return tree_unflatten(leaves, spec)


def recompute(passed: Recorded, sums: Gradients, step: int) -> dict[int, Tensor]:
    """Run a block again on one of its calls, and add the gradients of its linears to the sums.

    Returns the gradients by the leaves that have an edge.
    """
    call, block = passed.call, passed.call.block
    totals: dict[int, Tensor] = {}
    for piece in call.pieces(step):
        leaves = call.arguments(piece)
        for i in passed.edges:
            leaves[i] = leaves[i].detach().requires_grad_()
        watch = PerSample(block.linears, sums, piece.stop - piece.start)
        with torch.enable_grad():
            outputs = tree_flatten(call.run(leaves, watch=watch))[0]
        _backward_piece(call, piece, outputs, passed.arrived)
        watch.finish()
        for i in passed.edges:
            if leaves[i].grad is not None:
                _add(totals, call, i, piece, leaves[i].grad)
    return totals


def _backward_piece(
    call: Call, piece: slice, outputs: list[Any], arrived: Sequence[Tensor | None]
) -> None:
    tensors, gradients = [], []
    for i, (output, gradient) in enumerate(zip(outputs, arrived, strict=True)):
        if gradient is not None and output.requires_grad:
            gradient = call.placement.wake(gradient)
            at = place(call.block.outputs, i, gradient, call.samples)
            tensors.append(output)
            gradients.append(part(gradient, at, piece, call.samples))
    torch.autograd.backward(tensors, gradients)


def _add(totals: dict[int, Tensor], call: Call, index: int, piece: slice, gradient: Tensor) -> None:
    """Add the gradient by a leaf of a piece to that of the whole call."""
    whole = call.leaves[index]
    if gradient.shape == whole.shape and index not in totals:
        totals[index] = gradient
        return
    if index not in totals:
        totals[index] = torch.zeros(whole.shape, dtype=whole.dtype, device=gradient.device)
    part(totals[index], call.carried[index], piece, call.samples).add_(gradient)


def finish(block: Block, sums: Gradients, samples: int, scale: float = 1.0) -> None:
    """Make the sums of a block those of all processes, of losses that are not scaled; check them.

    samples: how many this process has, whether or not a linear was reached by each.
    """
    for linear in block.linears:
        statistics = sums[linear.name]
        statistics.samples = statistics.differentiated = samples
        stats.unscale(statistics, scale)
    processes.add_statistics([sums[linear.name] for linear in block.linears])
    for linear in block.linears:
        check(linear, sums[linear.name])


class PerSample(Products):
    """Adds the gradient of every sample of each linear once backward reaches its output.

    `finish` after backward adds those of linears that a block uses more than once: a sample's
    gradient is the sum of its uses.
    """

    def __init__(self, linears: Iterable[Linear], sums: Gradients, samples: int) -> None:
        super().__init__(linears)
        self.sums, self.samples = sums, samples
        self.repeated: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def after(self, seen: list[tuple[Linear, Use]], output: Tensor) -> Tensor:
        leaf = not output.requires_grad  # nothing before this product needs a gradient
        output.requires_grad_()
        uses = [(linear, replace(use, input=use.input.detach())) for linear, use in seen]
        output.register_hook(partial(self._add, uses))
        return output.clone() if leaf else output  # a leaf could not be changed in place

    def _add(self, uses: list[tuple[Linear, Use]], gradient: Tensor) -> None:
        for linear, use in uses:
            x, dy = (self._by_sample(linear, own) for own in (use.x, use.rows(gradient)))
            if linear.repeated:
                self.repeated[linear.name].append((x, dy))
            else:
                stats.add_gradients(self.sums[linear.name], x, dy)

    def finish(self) -> None:
        """Add the gradients of the linears that are used more than once."""
        for name, uses in self.repeated.items():
            x, dy = (torch.cat(parts, dim=1) for parts in zip(*uses, strict=True))
            stats.add_gradients(self.sums[name], x, dy)
        self.repeated.clear()

    def _by_sample(self, linear: Linear, rows: Tensor) -> Tensor:
        if self.samples > 1 and (linear.alone or rows.shape[:-1].numel() % self.samples):
            raise GblmError(
                f"{linear} does not see the same number of inputs of every "
                "sample, so that its gradients cannot be told apart; use --micro-batch 1"
            )
        return rows.reshape(self.samples, -1, rows.shape[-1])


def zero_sums(linears: list[Linear], needs: frozenset[str]) -> Gradients:
    """Return the sums of no samples, of every linear."""
    return {linear.name: stats.zeros(needs, linear.weight, linear.positions) for linear in linears}


def fewer(walk: Walk) -> BatchSize:
    """Return the micro-batch of a plain backward, which holds all activations of the model."""
    if any(linear.alone for block in walk.blocks for linear in block.linears):
        return BatchSize(1)
    micro = walk.micro
    return BatchSize(max(1, micro.samples // 4), auto=True) if micro.auto else micro


def activations(
    model: nn.Module, one: Batch, adapter: Adapter, blocks: list[Block]
) -> tuple[int, int]:
    """Return the bytes that a plain backward keeps of one sample: of the trunk, and of the head."""
    linears = [linear for block in blocks for linear in block.linears]
    with saved(model) as storages:
        with PerSample(linears, {linear.name: Statistics({}) for linear in linears}, 1):
            hidden = adapter.trunk(model, one)
        trunk = sum(storages.values())
        loss = adapter.loss(model, hidden, one)
        head = sum(storages.values()) - trunk
    del loss
    return trunk, head


def _fits(walk: Walk, needs: frozenset[str]) -> bool:
    """Say whether a plain backward takes at most half of the free memory, from one sample's."""
    one = micro_batches(take(walk.batch, slice(0, 1)), 1, walk.adapter)[0].batch
    try:
        one = to_device(one, walk.device)
        kept = sum(activations(walk.model, one, walk.adapter, walk.blocks))
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            return False
        raise
    linears = [linear for block in walk.blocks for linear in block.linears]
    sums = sum(4 * linear.weight.numel() * len(needs) for linear in linears)
    return kept * fewer(walk).samples + sums <= free_memory(walk.device) / 2
