"""The stream: a model runs its own code once, and its wrapped blocks work in micro-batches.

Nothing here knows what a block computes. A block's `forward` is replaced for the time of a run; the
replacement takes the very arguments the model passed, splits what carries the samples into
micro-batches, and returns what the block's own `forward` gives for them.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from gblm.base import Adapter, Batch, GblmError, Statistics
from gblm.machine import processes
from gblm.machine.device import MicroBatch, exact, halved
from gblm.maths import stats
from gblm.walk.call import Call, Forward, twice
from gblm.walk.survey import Block, Linear, hooked, quiet, size

Weights = dict[str, Tensor]  # how much each position counts, by the first linear of a group

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
class Inputs:
    """What the linears of one group saw: their statistics, and some inputs to measure errors on.

    `weights` is how much each position of a sample counts in the statistics: see `add_inputs`.
    """

    group: list[Linear]
    statistics: Statistics
    weights: Tensor | None = None
    examples: list[Tensor] = field(default_factory=list)

    @classmethod
    def none(cls, group: list[Linear], needs: frozenset[str], weights: Weights) -> "Inputs":
        """Return what a group has before it has seen anything."""
        return cls(group, stats.zeros(needs, group[0].weight), weights.get(group[0].name))

    def add(self, x: Tensor, samples: int, of: int, dense: Tensor | None = None) -> None:
        """Add the inputs `x` of `samples` samples, of so many in all; see `stats.add_inputs`."""
        stride = max(1, self.group[0].positions * of // ERROR_POSITIONS)
        self.examples.append(x[-self.statistics.positions % stride :: stride].clone())
        with exact(x.device):
            stats.add_inputs(self.statistics, x, samples, dense, self.weights)


class Keeper(Protocol):
    """Keeps finished blocks and what they give, for a run that goes on from there."""

    def has(self, block: Block) -> bool: ...
    def outputs(self, block: Block, call: Call) -> Any: ...
    def finish(self, block: Block, outputs: Any) -> None: ...


Visit = Callable[[Block, list[Inputs], Call], None]
Done = Callable[[Block, float], None]  # a block, and the seconds it took
Refine = Callable[[Block, Call, Any, int], None]


def forward(
    model: nn.Module,
    batch: Batch,
    adapter: Adapter,
    blocks: list[Block],
    needs: frozenset[str],
    visit: Visit,
    micro: MicroBatch,
    *,
    beside: bool = False,
    weights: Weights | None = None,
    refine: Refine | None = None,
    keeper: Keeper | None = None,
    spill: Path | None = None,
    done: Done = lambda block, seconds: None,
) -> None:
    """Run the model once over the batch; every block collects, is visited, and runs again.

    `visit(block, inputs by group, call)` may write the block's weights: what the block then gives
    goes on to the next, so that its statistics see the blocks before it as they have become.
    `refine(block, call, outputs, step)` may write them again, towards what the block gave before.

    beside: carry the dense stream beside the pruned one. Then `visit` is called for one group after
    the other, in the order of use, each with inputs that the groups before it, as visited, have
    made, and `refine` goes towards the outputs of the dense stream. The model is called on the
    samples twice over, the first half of every tensor being what the dense model has, with products
    in bfloat16 where they are quicker.
    weights: how much the positions count, by the name of the first linear of a group.
    keeper: is given every finished block, and asked for those that it has. spill: see `room`.
    done: is called after every block.
    """
    weights = weights or {}

    def alone(block: Block, call: Call) -> Any:
        target = micro.run(call.outputs) if refine and block.groups else None
        if block.groups:
            found = micro.run(lambda step: collect(block, call, needs, weights, step))
            visit(block, found, call)
        if refine and block.groups:
            micro.run(lambda step: refine(block, call, target, step))
        return None if block is blocks[-1] else micro.run(call.outputs)

    def both(block: Block, call: Call) -> Any:
        dense, pruned = call.halves()
        again = refine is not None and bool(block.groups)
        with halved(block.module):  # the block alone, so that what is added up between stays exact
            target, ours = micro.run(
                lambda step: _beside(block, dense, pruned, needs, visit, step, weights, again)
            )
        if refine and again:
            micro.run(lambda step: refine(block, pruned, target, step))
        if block is blocks[-1]:
            return None
        if again:
            with halved(block.module):
                ours = micro.run(pruned.outputs)
        return twice(target, ours, spill)

    if beside:
        batch = {name: torch.cat([value, value]) for name, value in batch.items()}
    _run(model, batch, adapter, blocks, both if beside else alone, keeper, spill, done)


def _run(
    model: nn.Module,
    batch: Batch,
    adapter: Adapter,
    blocks: list[Block],
    work: Callable[[Block, Call], Any],
    keeper: Keeper | None,
    spill: Path | None,
    done: Done,
) -> None:
    """Run the model through its last block; `work(block, call)` gives the outputs of each."""
    samples = size(batch)

    def make(block: Block, own: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            call = Call.of(block, own, samples, args, kwargs, spill)
            if keeper and keeper.has(block):
                outputs = keeper.outputs(block, call)
            else:
                outputs = work(block, call)
                if keeper:
                    keeper.finish(block, outputs)
            done(block, time.perf_counter() - start)
            if block is blocks[-1]:
                raise _Done
            return outputs

        return run

    with quiet(model), torch.no_grad(), replaced(blocks, make), suppress(_Done):
        adapter.trunk(model, batch)


def _beside(
    block: Block,
    dense: Call,
    pruned: Call,
    needs: frozenset[str],
    visit: Visit,
    step: int,
    weights: Weights,
    again: bool,
) -> tuple[Any, Any]:
    """Run a block on both streams and visit its groups; return the outputs of both streams.

    The micro-batches of both wait before each group until all have come that far. Then the group is
    visited, and first the dense ones go on to the next group, with the weights as they were. Where
    that fails, the block is left as it was. With `again`, the block will change once more and run
    again: then the pruned stream goes no further than its last group and has no outputs.
    """
    before = Snapshot(block)
    hooks = [
        group[0].module.register_forward_pre_hook(_wait(index, group[0]))
        for index, group in enumerate(block.groups)
    ]
    streams = [[_piece(call, piece) for piece in call.pieces(step)] for call in (dense, pruned)]
    try:
        with hooked(hooks):
            theirs, ours = ([piece.switch() for piece in stream] for stream in streams)
            for index, group in enumerate(block.groups):
                inputs = Inputs.none(group, needs, weights)
                for piece, own, other in zip(pruned.pieces(step), ours, theirs, strict=True):
                    if _waits(own, index):
                        # What routes its inputs gives the streams other ones, which make no pair.
                        paired = _waits(other, index) and other.x.shape == own.x.shape
                        beside = other.x if paired else None
                        inputs.add(own.x, piece.stop - piece.start, pruned.samples, beside)
                processes.add_statistics([inputs.statistics])
                check(group[0], inputs.statistics)
                with exact(group[0].weight.device):
                    visit(block, [inputs], pruned)
                now = Snapshot(block)
                before.write()
                theirs = _go_on(streams[0], theirs, index)
                now.write()
                if not (again and index == len(block.groups) - 1):
                    ours = _go_on(streams[1], ours, index)
    except BaseException:
        before.write()
        raise
    finally:
        for piece in streams[0] + streams[1]:
            piece.throw()
    return dense.joined(step, theirs), None if again else pruned.joined(step, ours)


@dataclass
class _Waiting:
    """Where a micro-batch waits: before which group, with which inputs `[positions, in]`."""

    index: int
    x: Tensor


def _piece(call: Call, piece: slice) -> greenlet:
    """Return a run of the block on some samples, which can wait in the middle."""
    return greenlet(lambda: call.run(call.arguments(piece)))


def _wait(index: int, linear: Linear) -> Callable[[nn.Module, tuple], None]:
    def hook(module: nn.Module, args: tuple) -> None:
        parent = getcurrent().parent
        assert parent is not None
        parent.switch(_Waiting(index, linear.rows(args[0]).flatten(0, -2)))

    return hook


def _waits(at: Any, index: int) -> bool:
    return isinstance(at, _Waiting) and at.index == index


def _go_on(pieces: list[greenlet], found: list[Any], index: int) -> list[Any]:
    """Let the micro-batches that wait before a group go on; return where they are then."""
    pairs = zip(pieces, found, strict=True)
    return [piece.switch() if _waits(at, index) else at for piece, at in pairs]


class Snapshot:
    """The weights of a block's linears at some time, to be written again."""

    def __init__(self, block: Block) -> None:
        self.weights = [linear.weight for linear in block.linears]
        self.values = [weight.clone() for weight in self.weights]

    def write(self) -> None:
        for weight, value in zip(self.weights, self.values, strict=True):
            weight.copy_(value)


def collect(
    block: Block, call: Call, needs: frozenset[str], weights: Weights, step: int
) -> list[Inputs]:
    """Run the block in micro-batches; return what each group of its linears saw.

    Raises `GblmError` with the linear's name where a statistic holds a NaN or an Inf.
    """
    found = [Inputs.none(group, needs, weights) for group in block.groups]
    missing: set[int] = set()
    samples = 0

    def see(index: int, linear: Linear) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            found[index].add(linear.rows(args[0]).flatten(0, -2), samples, call.samples)
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
    processes.add_statistics([inputs.statistics for inputs in found])
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
