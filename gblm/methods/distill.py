"""Distil: a few optimiser steps on what all blocks keep, towards the dense model's logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gblm.base import Step
from gblm.machine import processes
from gblm.machine.speed import Cost
from gblm.methods.refine import Tuned, order
from gblm.walk.blocks import frozen, size
from gblm.walk.divergence import Part, check, dense, divergence, mean_divergence
from gblm.walk.footprint import Footprint
from gblm.walk.gradients import fewer
from gblm.walk.visit import Visit
from gblm.walk.walk import Walk

RATE = 0.2  # see `Tuned`
POSITIONS = 512  # about so many in a step
HELD = 8  # one of so many steps is held back, and tells whether it was worth it


@dataclass(frozen=True)
class Distill(Step):
    """Fits all that the blocks of a pruned model keep, together, to the dense model's logits.

    Minimises the mean over positions of KL(dense ‖ pruned) by Adam, as `Refine` does for a block,
    `passes` times over the calibration samples; the head stays as it is, and so do weights that
    are 0. An eighth of the samples is held back, unless there are too few: where their loss is no
    smaller afterwards, all is left as it was. Holds the activations of some samples and 21 bytes
    for each weight.
    """

    passes: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def visit(self, visit: Visit) -> None:
        """Leave the blocks to the other steps."""

    def check_model(self, walk: Walk) -> None:
        check(walk, "distill", "distill=0")

    def begin(self, walk: Walk) -> list[Part]:
        """Return the samples with what the dense model's head takes of them."""
        return dense(walk, fewer(walk).samples)

    def end(self, walk: Walk, known: list[Part]) -> None:
        """Fit the model, and take it back where that has not helped."""
        tuned = Tuned(walk.blocks, RATE)
        positions = max(linear.positions for block in walk.blocks for linear in block.linears)
        steps = list(_steps(known, max(1, POSITIONS // processes.world() // positions)))
        held = [part for step in steps[::HELD] for part in step]
        learnt = [step for i, step in enumerate(steps) if i % HELD] or steps
        count = max(processes.gathered(max(1, round(self.passes * len(learnt)))))
        optimiser, schedule = tuned.optimiser(count)
        try:
            with frozen(walk.model):
                before = mean_divergence(walk, held)
                with tuned.learning():
                    for done, index in enumerate(order(len(learnt), count), 1):
                        differentiate(walk, learnt[index])
                        tuned.advance(optimiser, schedule)
                        walk.progress("distill", done, count)
                if not mean_divergence(walk, held) < before:
                    tuned.undo()
        except BaseException:
            tuned.undo()
            raise

    def cost(self, footprint: Footprint) -> Cost:
        """A forward pass of the dense model, forward and backward passes, Adam at every step."""
        positions = max(linear.positions for linear in footprint.linears)
        steps = max(1, round(self.passes * footprint.samples / max(1, POSITIONS // positions)))
        weights = sum(linear.weight.numel() for linear in footprint.linears)
        passes = 1 + 3 * self.passes
        return Cost(
            passes * footprint.samples * footprint.trunk,
            64.0 * weights * steps,
            memory=21 * weights + footprint.micro * footprint.kept,
        )


def differentiate(walk: Walk, step: list[Part]) -> None:
    """Add the gradients of a step's mean loss to those of the parameters."""
    count = sum(size(some.batch) for some, _ in step)
    with torch.enable_grad():
        for part in step:
            (divergence(walk, part) / count).backward()


def _steps(parts: list[Part], each: int) -> Iterator[list[Part]]:
    """Yield parts of about so many samples together."""
    step: list[Part] = []
    for part in parts:
        step.append(part)
        if sum(size(some.batch) for some, _ in step) >= each:
            yield step
            step = []
    if step:
        yield step
