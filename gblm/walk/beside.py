"""The dense stream beside the pruned one: both wait in a block before each group of linears.

There the group is solved by what both streams have; then all go on with it as it has become, the
dense stream with the weights as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gblm.walk.blocks import Linear, hooked
from gblm.walk.call import Call, Output
from gblm.walk.coroutine import Coroutine, wait
from gblm.walk.inputs import Inputs

if TYPE_CHECKING:
    from gblm.walk.visit import Visit


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


class TwoStreams:
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
