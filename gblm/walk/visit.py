"""A visit of a block: all its calls, what its linears see, what it gives.

With the dense stream beside the pruned one, the linears are seen group by group: all micro-batches
of both streams wait before a group until it is solved, then go on with it as it has become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gblm.base import GblmError, Pattern, Statistics
from gblm.machine import processes
from gblm.machine.device import exact
from gblm.machine.offload import onload
from gblm.maths import stats
from gblm.report import LinearReport
from gblm.walk.blocks import Block, Linear, frozen, hooked
from gblm.walk.call import Call, Output
from gblm.walk.coroutine import Coroutine, wait
from gblm.walk.walk import Walk

T = TypeVar("T")

# The relative error of a linear is measured on at most this many of its calibration inputs.
ERROR_POSITIONS = 1024


class NotFinite(GblmError):
    """A statistic that holds a NaN or an Inf."""


class Stop(Exception):
    """Ends a run of a block that has given all it was run for."""


@dataclass
class Inputs:
    """What the linears of one group saw: their statistics, and some inputs to measure errors on.

    `weights` is how much each position of a sample counts in the statistics: see `add_inputs`.
    `stride`: one of so many inputs is kept as an example.
    """

    group: list[Linear]
    statistics: Statistics
    weights: Tensor | None
    stride: int
    examples: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, samples: int, dense: Tensor | None = None) -> None:
        """Add the inputs `x [positions, in]` of `samples` samples; see `stats.add_inputs`."""
        start = -self.statistics.positions % self.stride
        self.examples.append(x[start :: self.stride].clone())
        with exact(x.device):
            stats.add_inputs(self.statistics, x, samples, dense, self.weights)

    def finish(self, samples: int) -> None:
        """Make the statistics those of all processes; raises `GblmError` for a NaN or an Inf.

        samples: of this process, those that did not come to a routed linear, too.
        """
        self.statistics.samples = samples
        processes.add_statistics([self.statistics])
        check(self.group[0], self.statistics)


class Snapshot:
    """The parameters of a block at some time, to be written again."""

    def __init__(self, block: Block) -> None:
        self.parameters = [own.detach() for own in block.module.parameters()]
        self.values = [own.clone() for own in self.parameters]
        self.versions = [own._version for own in self.parameters]

    def write(self) -> None:
        """Give the parameters their values of then; those that nobody has written stay."""
        for i, (parameter, value) in enumerate(zip(self.parameters, self.values, strict=True)):
            if parameter._version != self.versions[i]:
                parameter.copy_(value)

    @contextmanager
    def back(self) -> Iterator[None]:
        """Have the values of then for a time."""
        now = [parameter.clone() for parameter in self.parameters]
        self.write()
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, now, strict=True):
                parameter.copy_(value)


@dataclass
class Visit:
    """One block at work: what its steps need to know, and what they have found.

    calls: those of the pruned stream, one for each micro-batch; dense_calls: those of the dense
    stream, none where it is not carried along. patterns: of the linears by name; one that is not
    there stays dense. gradients: sums of the dense model's by linear.
    """

    walk: Walk
    block: Block
    calls: list[Call]
    dense_calls: list[Call]
    patterns: Mapping[str, Pattern]
    gradients: Mapping[str, Statistics]
    last: bool = False  # whether the step at work is the last one
    reports: list[LinearReport] = field(default_factory=list)
    outputs: list[Output] | None = None  # of the pruned stream, where they are known

    def __post_init__(self) -> None:
        self.before = Snapshot(self.block)
        self._dense_outputs: list[Output] | None = None

    @property
    def step(self) -> int:
        """How many samples go through the block at a time."""
        return self.walk.micro.samples

    def attempt(self, work: Callable[[], T]) -> T:
        """Return what work on the dense block gives; begun anew, in smaller pieces, out of memory.

        The block is as it was before each attempt, and after the last where that fails.
        """
        try:
            return self.walk.micro.run(lambda _: work(), undo=self.before.write)
        except BaseException:
            self.before.write()
            raise

    def dense_outputs(self) -> list[Output]:
        """Return what the dense block gives, for each call: on the dense stream where there is."""
        if self._dense_outputs is None:
            with self.before.back():
                calls = self.dense_calls or self.calls
                self.keep_dense([self._given(call, bool(self.dense_calls)) for call in calls])
        assert self._dense_outputs is not None
        return self._dense_outputs

    def keep_dense(self, outputs: list[Output]) -> None:
        """Keep what the dense block gives, where there is room."""
        rest = self.walk.placement.rest
        self._dense_outputs = [tree_map(partial(_tensors, rest), output) for output in outputs]

    def finished(self) -> Iterator[Output]:
        """Yield what the block gives now, for each call."""
        if self.outputs is not None:
            yield from self.outputs
            return
        for call in self.calls:
            yield self._given(call, bool(self.dense_calls))

    def _given(self, call: Call, half: bool) -> Output:
        return self.walk.micro.run(lambda step: call.outputs(step, half))

    def weights(self, group: list[Linear], focus: float) -> Tensor | None:
        """Return how much each position counts for a group, None for alike: see `stats`."""
        known = [self.gradients[x.name] for x in group if x.name in self.gradients]
        if not focus or len(known) < len(group) or any(linear.alone for linear in group):
            return None
        return stats.position_weights(known, focus)

    def inputs(self, needs: frozenset[str], focus: float = 0.0) -> Iterator[list[Inputs]]:
        """Yield what the groups of linears see: all at once, or beside the dense stream one by one.

        Those of a group beside the dense stream are made by the groups before it as they are then:
        solve each before you ask for the next. Raises `GblmError` with the linear's name where a
        statistic holds a NaN or an Inf.
        """
        if self.dense_calls:
            yield from _TwoStreams(self, self._empty(needs, focus)).inputs()
        else:
            yield self.inputs_of(self.calls, needs, focus)

    def inputs_of(
        self, calls: list[Call], needs: frozenset[str], focus: float = 0.0
    ) -> list[Inputs]:
        """Return what the groups of linears see on some calls."""
        groups = self._empty(needs, focus)
        collect(groups, calls, self.step)
        return groups

    def _empty(self, needs: frozenset[str], focus: float) -> list[Inputs]:
        names = needs & set(stats.INPUT)
        return [self._none(group, names, focus) for group in self.block.groups]

    def _none(self, group: list[Linear], needs: frozenset[str], focus: float) -> Inputs:
        stride = max(1, group[0].positions * self.walk.samples // ERROR_POSITIONS)
        empty = stats.zeros(needs, group[0].weight)
        return Inputs(group, empty, self.weights(group, focus), stride)


def forward(
    walk: Walk,
    work: Callable[[Visit], None],
    patterns: Mapping[str, Pattern] = MappingProxyType({}),
    gradients: Mapping[str, Statistics] = MappingProxyType({}),
    beside: bool = False,
) -> None:
    """Take the samples through the model; `work(visit)` may change each block they come to.

    What a block then gives goes on to the next, so that its statistics see the blocks before it as
    they have become. beside: carry the dense stream beside the pruned one.
    """
    with frozen(walk.model), torch.no_grad(), walk.runs(2 if beside else 1) as streams:
        dense, pruned = streams if beside else ([], streams[0])
        for block in walk.blocks:
            calls, beside_them = ([run.at(block) for run in runs] for runs in (pruned, dense))
            with onload(block.module):
                visit = Visit(walk, block, calls, beside_them, patterns, gradients)
                work(visit)
                if block is walk.blocks[-1]:
                    return
                theirs = visit.dense_outputs() if beside else []
                for i, run in enumerate(dense):
                    output, theirs[i] = theirs[i], None
                    run.go_on(tree_map(partial(_tensors, walk.placement.wake), output))
                for run, output in zip(pruned, visit.finished(), strict=True):
                    run.go_on(output)


def collect(groups: list[Inputs], calls: list[Call], step: int) -> None:
    """Run a block on its calls, and add what the groups of its linears see."""
    watch = _Collecting(groups)
    hooks = [
        inputs.group[0].module.register_forward_pre_hook(partial(watch.see, inputs))
        for inputs in groups
    ]
    with hooked(hooks):
        for call in calls:
            for piece in call.pieces(step):
                watch.start(piece.stop - piece.start)
                with suppress(Stop):
                    call.run(call.arguments(piece))
    for inputs in groups:
        inputs.finish(sum(call.samples for call in calls))


class _Collecting:
    """Adds what linears see, and stops the block once the last of them has."""

    def __init__(self, groups: list[Inputs]) -> None:
        self.groups = groups
        self.missing: list[Inputs] = []
        self.samples = 0

    def start(self, samples: int) -> None:
        self.missing, self.samples = list(self.groups), samples

    def see(self, inputs: Inputs, module: nn.Module, args: tuple) -> None:
        inputs.add(inputs.group[0].rows(args[0]).flatten(0, -2), self.samples)
        self.missing = [other for other in self.missing if other is not inputs]
        if not self.missing:  # nothing after the last linear's input is of use
            raise Stop


@dataclass
class _Waiting:
    """Where a piece waits: before which group, with which inputs `[positions, in]`."""

    index: int
    x: Tensor


@dataclass
class _Piece:
    """Some samples of a call in the middle of a block: where they wait, or what they have given."""

    call: Call
    piece: slice

    def __post_init__(self) -> None:
        self.coroutine = Coroutine(self._work, self.call.placement.device)
        self.at: Any = None

    def _work(self) -> Output:
        return self.call.run(self.call.arguments(self.piece), half=True)

    def waits(self, index: int) -> bool:
        return isinstance(self.at, _Waiting) and self.at.index == index

    def go_on(self) -> None:
        self.at = self.coroutine.switch()


class _TwoStreams:
    """Both streams in a block: they wait before each group of linears until it is solved."""

    def __init__(self, visit: Visit, groups: list[Inputs]) -> None:
        self.visit, self.groups = visit, groups

    def inputs(self) -> Iterator[list[Inputs]]:
        """Yield the inputs of each group; then the dense outputs, and ours if wanted, are known."""
        visit = self.visit
        dense = [self._pieces(call) for call in visit.dense_calls]
        pruned = [self._pieces(call) for call in visit.calls]
        theirs, ours = ([x for call in stream for x in call] for stream in (dense, pruned))
        hooks = [
            inputs.group[0].module.register_forward_pre_hook(partial(_pause, i, inputs.group[0]))
            for i, inputs in enumerate(self.groups)
        ]
        try:
            with hooked(hooks):
                for piece in theirs + ours:
                    piece.go_on()
                for index, inputs in enumerate(self.groups):
                    self._add(index, inputs, theirs, ours)
                    yield [inputs]
                    with visit.before.back():
                        _go_on(theirs, index)
                    if visit.last or index < len(self.groups) - 1:
                        _go_on(ours, index)
            visit.keep_dense(_joined(visit.dense_calls, dense))
            visit.outputs = _joined(visit.calls, pruned) if visit.last else None
        finally:
            for piece in theirs + ours:
                piece.coroutine.close()

    def _pieces(self, call: Call) -> list[_Piece]:
        return [_Piece(call, piece) for piece in call.pieces(self.visit.step)]

    def _add(self, index: int, inputs: Inputs, theirs: list[_Piece], ours: list[_Piece]) -> None:
        for own, other in zip(ours, theirs, strict=True):
            if own.waits(index):
                # What is routed sees other positions of each stream, which make no pair.
                routed = inputs.group[0].routed
                paired = not routed and other.waits(index) and other.at.x.shape == own.at.x.shape
                dense = other.at.x if paired else None
                inputs.add(own.at.x, own.piece.stop - own.piece.start, dense)
        inputs.finish(sum(call.samples for call in self.visit.calls))


def _pause(index: int, linear: Linear, module: nn.Module, args: tuple) -> None:
    wait(_Waiting(index, linear.rows(args[0]).flatten(0, -2)))


def _go_on(pieces: list[_Piece], index: int) -> None:
    """Let the pieces that wait before a group, or one that is solved, go on."""
    for piece in pieces:
        while isinstance(piece.at, _Waiting) and piece.at.index <= index:
            piece.go_on()


def _joined(calls: list[Call], pieces: list[list[_Piece]]) -> list[Output]:
    return [
        call.joined([piece.at for piece in own], [piece.piece for piece in own])
        for call, own in zip(calls, pieces, strict=True)
    ]


def _tensors(move: Callable[[Tensor], Tensor], leaf: Any) -> Any:
    return move(leaf) if isinstance(leaf, Tensor) and leaf.ndim else leaf


def with_gradients(
    inputs: Statistics, gradient: Statistics | None, device: torch.device
) -> Statistics:
    """Return the statistics of inputs with those of gradients, which may be elsewhere."""
    if gradient is None:
        return inputs
    sums = {name: total.to(device) for name, total in gradient.sums.items()}
    count = gradient.differentiated or gradient.samples
    samples, positions = inputs.samples or gradient.samples, inputs.positions
    return Statistics({**inputs.sums, **sums}, samples, positions, count)


def check(linear: Linear, statistics: Statistics) -> None:
    """Raise `GblmError` with the linear's name where a statistic holds a NaN or an Inf."""
    for name, value in statistics.sums.items():
        if not torch.isfinite(value).all():
            raise NotFinite(
                f"{linear}: the statistic {name} holds a NaN or an Inf; "
                "check the weights and the calibration samples, or use a wider dtype"
            )
