"""The dense stream beside the pruned one: both wait in a block before each group of linears.

There the group is solved by what both streams have; then all go on with it as it has become, the
dense stream with the weights as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gblm.walk.blocks import Linear, Snapshot
from gblm.walk.call import Call, Output
from gblm.walk.coroutine import Coroutine, wait
from gblm.walk.inputs import Inputs
from gblm.walk.products import Products, Use


@dataclass
class _Waiting:
    """Where a piece waits: before which group, and which use of its first linear."""

    index: int
    use: Use

    @property
    def x(self) -> Tensor:
        """The inputs `[positions, in]`."""
        return self.use.x.flatten(0, -2)

    def alike(self, other: _Waiting) -> bool:
        """Say whether another has as many inputs."""
        return self.use.input.shape == other.use.input.shape


@dataclass
class _Piece:
    """Some samples of a call in the middle of a block: where they wait, or what they have given."""

    call: Call
    piece: slice
    watch: _Pausing

    def __post_init__(self) -> None:
        self.coroutine = Coroutine(self._work, self.call.placement.device)
        self.at: Any = None

    def _work(self) -> Output:
        return self.call.run(self.call.arguments(self.piece), half=True, watch=self.watch)

    def waits(self, index: int) -> bool:
        return isinstance(self.at, _Waiting) and self.at.index == index

    def go_on(self) -> None:
        self.at = self.coroutine.switch()


class Stream:
    """The pieces of the calls of one stream."""

    def __init__(self, calls: list[Call], samples_at_once: int, watch: _Pausing) -> None:
        self.calls = [
            [_Piece(call, x, watch) for x in call.pieces(samples_at_once)] for call in calls
        ]
        self.pieces = [piece for pieces in self.calls for piece in pieces]

    def begin(self) -> None:
        """Let every piece come to its first group."""
        for piece in self.pieces:
            piece.go_on()

    def go_on(self, index: int) -> None:
        """Let the pieces that wait before a group, or one that is solved, go on."""
        for piece in self.pieces:
            while isinstance(piece.at, _Waiting) and piece.at.index <= index:
                piece.go_on()

    def outputs(self) -> list[Output]:
        """Return what the block gives, for each call, once all pieces have come to its end."""
        return [
            pieces[0].call.joined([x.at for x in pieces], [x.piece for x in pieces])
            for pieces in self.calls
        ]


class TwoStreams:
    """Both streams in a block: they wait before each group of linears until it is solved.

    groups: of the inputs to come. dense, pruned: the calls of each stream. before: the dense
    weights.
    """

    def __init__(
        self,
        groups: list[Inputs],
        dense: list[Call],
        pruned: list[Call],
        before: Snapshot,
        samples_at_once: int,
    ) -> None:
        self.groups, self.before = groups, before
        values = dict(zip(before.owners, before.values, strict=True))
        self.dense = Stream(dense, samples_at_once, _Pausing(groups, values))
        self.pruned = Stream(pruned, samples_at_once, _Pausing(groups))

    def inputs(self, to_end: bool) -> Iterator[list[Inputs]]:
        """Yield the inputs of each group, to be solved; then the streams have their outputs.

        to_end: whether the pruned stream goes on after its last group.
        """
        try:
            with self.before.back():
                self.dense.begin()
            self.pruned.begin()
            for index, inputs in enumerate(self.groups):
                self._add(index, inputs)
                yield [inputs]
                with self.before.back():
                    self.dense.go_on(index)
                if to_end or index < len(self.groups) - 1:
                    self.pruned.go_on(index)
        finally:
            for piece in self.dense.pieces + self.pruned.pieces:
                piece.coroutine.close()

    def _add(self, index: int, inputs: Inputs) -> None:
        for own, other in zip(self.pruned.pieces, self.dense.pieces, strict=True):
            if own.waits(index):
                # What is routed sees other positions of each stream, which make no pair.
                scattered = inputs.group[0].routed and not inputs.group[0].everywhere
                paired = not scattered and other.waits(index) and other.at.alike(own.at)
                dense = other.at.x if paired else None
                inputs.add(own.at.x, own.piece.stop - own.piece.start, dense)
        inputs.finish(sum(piece.piece.stop - piece.piece.start for piece in self.pruned.pieces))


class _Pausing(Products):
    """Waits before the first linear of each group."""

    def __init__(
        self, groups: list[Inputs], values: Mapping[nn.Parameter, Tensor] | None = None
    ) -> None:
        super().__init__([inputs.group[0] for inputs in groups], values)
        self.index = {inputs.group[0].name: i for i, inputs in enumerate(groups)}

    def before(self, linear: Linear, use: Use) -> None:
        wait(_Waiting(self.index[linear.name], use))
