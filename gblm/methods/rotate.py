"""Rotate: turn the residual stream, so that fewer weights matter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gblm.base import GblmError, Step
from gblm.machine import processes
from gblm.machine.offload import offload_of
from gblm.machine.speed import Cost
from gblm.maths.rotation import Part, learn
from gblm.maths.stats import wide
from gblm.walk.footprint import Footprint
from gblm.walk.gradients import first, share_of
from gblm.walk.sample import FEWEST, SHARE
from gblm.walk.stream import Stream, Whole, check_turns, find_stream
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk


@dataclass(frozen=True)
class Rotate(Step):
    """Turns the residual stream by one rotation, which does not change the model's outputs.

    The rotation gathers the importance of the weights in few of them: see `gblm.maths.rotation`.
    It is merged into the weights. Norms are folded into what reads them, and a head that shares the
    weights of the embedding gets its own.

    steps: that learn the rotation.
    """

    steps: int = 60

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def visit(self, visit: Visit) -> None:
        """Leave the blocks to the other steps."""

    def check_model(self, walk: Walk) -> None:
        if offload_of(walk.model):
            raise GblmError("rotate needs the whole model in memory; use --offload none")
        check_turns(walk)

    def begin(self, walk: Walk) -> Whole:
        """Turn the model; return what it was outside of its blocks."""
        whole = Whole(walk)
        try:
            with torch.no_grad():
                stream = find_stream(walk)
                stream.fold()
                rotation = learn(parts(walk, stream), self.steps, stream.centred)
                stream.turn(processes.sent(rotation, 0))
            whole.forget(walk.blocks)
        except BaseException:
            whole.undo()
            raise
        return whole

    def undo(self, walk: Walk, known: Whole) -> None:
        known.undo()

    def cost(self, footprint: Footprint) -> Cost:
        """A forward pass of some samples, their Gram matrices, and the steps."""
        samples = share_of(footprint.samples, SHARE, FEWEST)
        total = Cost(samples * footprint.trunk, memory=2 * footprint.weights)
        for linear in footprint.linears:
            outputs, inputs = linear.shape
            total += Cost(1.1 * inputs**2 * samples * linear.positions + inputs**3)
            width = min(outputs, inputs)
            total += Cost(6 * width**2 * (width + inputs) * self.steps)
        return total


def parts(walk: Walk, stream: Stream) -> list[Part]:
    """Return the matrices of the blocks that turn, with the Gram matrices of some samples."""
    readers = ([x for x in own.matrices if x.linear] for own in stream.readings)
    together = [(own, False) for own in readers if own] + [([x], True) for x in stream.writers]
    linears = [own[0].linear for own, _ in together if own[0].linear]
    seen = {linear.name: own for linear, own in zip(linears, together, strict=True)}
    found = []

    def work(visit: Visit) -> None:
        groups = [[x] for x in linears if x.name.startswith(f"{visit.block.name}.")]
        few = replace(visit, block=replace(visit.block, groups=groups))
        for inputs in few.inputs_of(visit.calls, frozenset({"input_gram"})):
            matrices, writes = seen[inputs.group[0].name]
            weight = torch.cat([wide(x.weight) for x in matrices])
            found.append(Part(weight, inputs.statistics["input_gram"], writes))

    few = first(walk.model, walk.batch, walk.adapter, SHARE, FEWEST)
    forward(replace(walk, batch=few), work)
    return found
