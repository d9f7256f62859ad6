"""A visit of a block: all its calls, what its linears see, what it gives."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gblm.base import Pattern, Statistics
from gblm.machine.offload import onload
from gblm.maths import stats
from gblm.report import LinearReport
from gblm.walk.beside import TwoStreams
from gblm.walk.blocks import Block, Linear, Snapshot, frozen
from gblm.walk.call import Call, Output
from gblm.walk.inputs import ERROR_POSITIONS, Inputs, collect
from gblm.walk.walk import Walk

T = TypeVar("T")


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
    def samples_at_once(self) -> int:
        """How many samples go through the block at a time."""
        return self.walk.micro.samples

    def attempt(self, work: Callable[[], T]) -> T:
        """Return what work on the block gives; begun anew, in smaller pieces, out of memory.

        The block is as it was before each attempt, and after the last where that fails.
        """
        start = Snapshot(self.block) if self.before.changed() else self.before
        try:
            return self.walk.micro.run(lambda _: work(), undo=start.write)
        except BaseException:
            start.write()
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
        if len({own["grad_position"].shape for own in known}) > 1:  # one is used elsewhere, too
            return None
        return stats.position_weights(known, focus)

    def inputs(self, needs: frozenset[str], focus: float = 0.0) -> Generator[list[Inputs]]:
        """Yield what the groups of linears see: all at once, or beside the dense stream one by one.

        Those of a group beside the dense stream are made by the groups before it as they are then:
        solve each before you ask for the next. Raises `GblmError` with the linear's name where a
        statistic holds a NaN or an Inf.
        """
        if not self.dense_calls or self.block.whole:
            yield self.inputs_of(self.calls, needs, focus)
            return
        groups = self._empty(needs, focus)
        streams = TwoStreams(
            groups, self.dense_calls, self.calls, self.before, self.samples_at_once
        )
        with self.walk.adapter.everywhere(self.block.module):
            yield from streams.inputs(to_end=self.last)
        self.keep_dense(streams.dense.outputs())
        self.outputs = streams.pruned.outputs() if self.last else None

    def inputs_of(
        self, calls: list[Call], needs: frozenset[str], focus: float = 0.0
    ) -> list[Inputs]:
        """Return what the groups of linears see on some calls."""
        groups = self._empty(needs, focus)
        with self.walk.adapter.everywhere(self.block.module):
            collect(groups, calls, self.samples_at_once)
        return groups

    def _empty(self, needs: frozenset[str], focus: float) -> list[Inputs]:
        names = needs & set(stats.INPUT)
        return [self._new_inputs(group, names, focus) for group in self.block.groups]

    def _new_inputs(self, group: list[Linear], needs: frozenset[str], focus: float) -> Inputs:
        # An odd one comes to every place of a sample; an even one would favour the first.
        stride = group[0].positions * self.walk.samples // ERROR_POSITIONS | 1
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


def _tensors(move: Callable[[Tensor], Tensor], leaf: Any) -> Any:
    return move(leaf) if isinstance(leaf, Tensor) and leaf.ndim else leaf
