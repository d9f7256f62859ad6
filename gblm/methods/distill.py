"""Distil: a few optimiser steps on all that a pruned model keeps, towards the dense logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils._pytree import tree_map

from gblm.base import GblmError, Step
from gblm.machine import processes
from gblm.machine.offload import offload_of
from gblm.machine.speed import Cost
from gblm.maths.stats import wide
from gblm.methods.refine import Tuned, mean, order
from gblm.walk.blocks import MicroBatch, frozen, micro_batches, size, to_device
from gblm.walk.footprint import Footprint
from gblm.walk.gradients import fewer
from gblm.walk.head import hidden
from gblm.walk.visit import Visit
from gblm.walk.walk import Walk

RATE = 0.2  # over the inputs of a linear, for wide ones take smaller steps: see `Tuned`
POSITIONS = 512  # about so many in a step
JUDGED = 8  # one of so many parts is not learnt from, and tells whether it was worth it

Part = tuple[MicroBatch, Any]  # some samples, and what the dense model's head takes of them


@dataclass(frozen=True)
class Distill(Step):
    """Fits all that the blocks of a pruned model keep, together, to the dense model's logits.

    Minimises the mean over positions of KL(dense ‖ pruned) by Adam, as `Refine` does for a block,
    `passes` times over the calibration samples; the head stays as it is, and so do weights that
    are 0. An eighth of the samples is held back: where their loss is no smaller afterwards, all is
    left as it was. Holds the activations of some samples and 14 bytes for each weight.
    """

    passes: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def visit(self, visit: Visit) -> None:
        """Leave the blocks to the other steps."""

    def check_model(self, walk: Walk) -> None:
        if walk.adapter.logits is None:
            raise GblmError("distill needs an adapter with logits; give it some, or distill=0")
        if offload_of(walk.model):
            raise GblmError("distill needs the whole model in memory; use distill=0 to offload it")

    def begin(self, walk: Walk) -> list[Part]:
        """Return the samples with what the dense model's head takes of them."""
        parts = []
        most = fewer(walk).samples
        with frozen(walk.model), torch.no_grad():
            for some in micro_batches(walk.batch, most, walk.adapter):
                given = hidden(walk, to_device(some.batch, walk.device))
                parts.append((some, tree_map(walk.placement.rest, given)))
        return parts

    def end(self, walk: Walk, known: list[Part]) -> None:
        """Fit the model, and take it back where that has not helped."""
        tuned = Tuned(walk.blocks, RATE, by_inputs=True)
        positions = max(linear.positions for block in walk.blocks for linear in block.linears)
        steps = list(_steps(known, max(1, POSITIONS // processes.world() // positions)))
        held = steps[::JUDGED]
        learnt = [step for i, step in enumerate(steps) if i % JUDGED] or steps
        count = max(processes.gathered(max(1, round(self.passes * len(learnt)))))
        optimiser, schedule = tuned.optimiser(count)
        try:
            with frozen(walk.model):
                before = judge(walk, held)
                with tuned.learning():
                    for done, index in enumerate(order(len(learnt), count), 1):
                        differentiate(walk, learnt[index])
                        tuned.advance(optimiser, schedule)
                        walk.progress("distill", done, count)
                if not judge(walk, held) < before:
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
            memory=14 * weights + footprint.micro * footprint.kept,
        )


def loss(walk: Walk, part: Part) -> Tensor:
    """Return the sum over samples of the mean over positions of KL(dense ‖ pruned)."""
    some, known = part
    batch, head = to_device(some.batch, walk.device), walk.adapter.logits
    assert head is not None
    own = wide(head(walk.model, hidden(walk, batch), batch)).log_softmax(dim=-1)
    with torch.no_grad():
        dense = wide(head(walk.model, tree_map(walk.placement.wake, known), batch))
        dense = dense.log_softmax(dim=-1)
    divergence = kl_div(own, dense, reduction="none", log_target=True).sum(dim=-1)
    return divergence.flatten(1).mean(dim=1).sum() if divergence.ndim > 1 else divergence.sum()


def differentiate(walk: Walk, step: list[Part]) -> None:
    """Add the gradients of a step's mean loss to those of the parameters."""
    count = sum(size(some.batch) for some, _ in step)
    with torch.enable_grad():
        for part in step:
            (loss(walk, part) / count).backward()


def judge(walk: Walk, steps: list[list[Part]]) -> float:
    """Return the mean loss of some steps, the same in all processes."""
    with torch.no_grad():
        losses = [loss(walk, part).item() for step in steps for part in step]
    return mean(sum(losses) / sum(size(some.batch) for step in steps for some, _ in step))


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
