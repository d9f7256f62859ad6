"""The stream: a model runs its own code once, and its wrapped blocks work in micro-batches.

Nothing here knows what a block computes. A block's `forward` is replaced for the time of a run; the
replacement takes the very arguments the model passed, splits what carries the samples into
micro-batches, and returns what the block's own `forward` gives for them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gblm import stats
from gblm.base import Adapter, Batch, GblmError, Statistics
from gblm.device import MicroBatch
from gblm.survey import Block, Linear, hooked, quiet, size

Forward = Callable[..., Any]

# The relative error of a linear is measured on at most this many of its calibration inputs.
ERROR_POSITIONS = 1024


class _Done(Exception):
    """Ends a run of the model, or of a block, that has given all it was run for."""


@contextmanager
def replaced(blocks: Iterable[Block], make: Callable[[Block, Forward], Forward]) -> Iterator[None]:
    """Give every block the forward that `make(block, its own forward)` returns, for a time."""
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(_restore(block.module))
            block.module.forward = make(block, block.module.forward)
        yield


def _restore(module: nn.Module) -> Callable[[], None]:
    before = vars(module).get("forward")

    def restore() -> None:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before

    return restore


@dataclass
class Call:
    """One call of a block over the whole batch, which can be had in pieces of some samples."""

    forward: Forward
    leaves: list[Any]
    spec: TreeSpec
    carries: list[
        int
    ]  # leading entries per sample of each leaf; 0 where it is no matter of samples
    samples: int
    wanted: list[bool] = field(default_factory=list)  # the leaves whose gradient is wanted

    @classmethod
    def of(cls, block: Block, forward: Forward, samples: int, args: tuple, kwargs: dict) -> "Call":
        leaves, spec = tree_flatten((args, kwargs))
        carries = [0] * len(leaves)
        # Against the run of one sample: what grew with the number of samples carries them.
        if samples > 1:
            for i, (leaf, one) in enumerate(zip(leaves, block.leading, strict=True)):
                if one is not None and len(leaf) == samples * one:
                    carries[i] = one
        return cls(forward, leaves, spec, carries, samples)

    def pieces(self, step: int) -> Iterator[slice]:
        """Yield the slices of `step` samples, the last one shorter where it must be."""
        for start in range(0, self.samples, step):
            yield slice(start, min(start + step, self.samples))

    def part(self, index: int, piece: slice) -> slice:
        """Return where the samples of a piece stand in the leaf of that index."""
        carried = self.carries[index]
        return slice(piece.start * carried, piece.stop * carried) if carried else slice(None)

    def arguments(self, piece: slice) -> list[Any]:
        """Return the leaves for the samples of one piece."""
        return [
            leaf[self.part(i, piece)] if self.carries[i] else leaf
            for i, leaf in enumerate(self.leaves)
        ]

    def run(self, leaves: list[Any]) -> Any:
        """Return what the block's own forward gives for these leaves."""
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.forward(*args, **kwargs)

    def outputs(self, step: int) -> Any:
        """Return the outputs for the whole batch, computed in micro-batches.

        What is not a tensor with the samples first stays as the first micro-batch gave it.
        """
        joined: list[Any] = []
        spec = None
        for piece in self.pieces(step):
            parts, spec = tree_flatten(self.run(self.arguments(piece)))
            if piece.stop - piece.start == self.samples:
                return tree_unflatten(parts, spec)
            if not joined:
                joined = [self._room(part, piece.stop - piece.start) for part in parts]
            for whole, part in zip(joined, parts, strict=True):
                if isinstance(part, Tensor) and part.ndim:
                    carried = len(part) // (piece.stop - piece.start)
                    whole[piece.start * carried : piece.stop * carried] = part
        assert spec is not None
        return tree_unflatten(joined, spec)

    def _room(self, part: Any, samples: int) -> Any:
        """Return an empty tensor for all samples, where a part holds some of them."""
        if not isinstance(part, Tensor) or not part.ndim:
            return part
        return part.new_empty(len(part) // samples * self.samples, *part.shape[1:])


@dataclass
class Inputs:
    """What the linears of one group saw: their statistics, and some inputs to measure errors on."""

    statistics: Statistics
    examples: list[Tensor] = field(default_factory=list)


def forward(
    model: nn.Module,
    batch: Batch,
    adapter: Adapter,
    blocks: list[Block],
    needs: frozenset[str],
    visit: Callable[[Block, list[Inputs]], None],
    micro: MicroBatch,
) -> None:
    """Run the model once over the batch; every block collects, is visited, and runs again.

    `visit(block, inputs by group)` may write the block's weights: what the block then gives goes on
    to the next, so that its statistics see the blocks before it as they have become.
    """
    samples = size(batch)

    def make(block: Block, own: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = Call.of(block, own, samples, args, kwargs)
            if block.groups:
                visit(block, micro.run(lambda step: collect(block, call, needs, step)))
            if block is blocks[-1]:
                raise _Done
            return micro.run(call.outputs)

        return run

    with quiet(model), torch.no_grad(), replaced(blocks, make), suppress(_Done):
        adapter.trunk(model, batch)


def collect(block: Block, call: Call, needs: frozenset[str], step: int) -> list[Inputs]:
    """Run the block in micro-batches; return what each group of its linears saw.

    Raises `GblmError` with the linear's name where a statistic holds a NaN or an Inf.
    """
    found = [Inputs(stats.zeros(needs, group[0].weight)) for group in block.groups]
    missing: set[int] = set()
    samples = 0

    def see(index: int, linear: Linear) -> Callable[[nn.Module, tuple], None]:
        stride = max(1, linear.positions * call.samples // ERROR_POSITIONS)

        def hook(module: nn.Module, args: tuple) -> None:
            x = linear.rows(args[0]).flatten(0, -2)
            inputs = found[index]
            inputs.examples.append(x[-inputs.statistics.positions % stride :: stride].clone())
            stats.add_inputs(inputs.statistics, x, samples)
            missing.discard(index)
            if not missing:  # nothing after the last linear's input is of use
                raise _Done

        return hook

    hooks = [
        group[0].module.register_forward_pre_hook(see(index, group[0]))
        for index, group in enumerate(block.groups)
    ]
    with hooked(hooks):
        for piece in call.pieces(step):
            missing.update(range(len(found)))
            samples = piece.stop - piece.start
            with suppress(_Done):
                call.run(call.arguments(piece))
    for group, inputs in zip(block.groups, found, strict=True):
        check(group[0], inputs.statistics)
    return found


def check(linear: Linear, statistics: Statistics) -> None:
    """Raise `GblmError` with the linear's name where a statistic holds a NaN or an Inf."""
    for name, value in statistics.sums.items():
        if not torch.isfinite(value).all():
            raise GblmError(
                f"{linear}: the statistic {name} holds a NaN or an Inf; "
                "check the weights and the calibration samples, or use a wider dtype"
            )
