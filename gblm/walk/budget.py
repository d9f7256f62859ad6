"""The budget of a model, spread over its linears by an allocation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gblm.base import Pattern, Statistics
from gblm.machine.offload import onload
from gblm.maths import allocation, scores, stats
from gblm.maths.allocation import Allocation, Weighed
from gblm.walk import divergence
from gblm.walk.blocks import Block, Linear, frozen
from gblm.walk.divergence import Part
from gblm.walk.inputs import with_gradients
from gblm.walk.sample import some
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk

POSITIONS = 4096  # about so many tell what the model loses in a trial
FEWER = 4  # one of so many of them in a first trial
PLACES = 256  # in the order of the weights of a comparison group


@dataclass
class Budget:
    """The budget of a model, spread over some linears by statistics of the dense model."""

    walk: Walk
    spread: Allocation
    pattern: Pattern
    gradients: Mapping[str, Statistics]
    names: set[str]

    def patterns(self) -> dict[str, Pattern]:
        """Return the pattern of each linear by its name; one that is not there stays dense."""
        self.inputs: dict[str, Statistics] = {}
        if self.spread.needs & set(stats.INPUT):
            forward(self.walk, self._record)
        none = Statistics({})
        owners = {x.name: (block, x) for block in self.walk.blocks for x in block.linears}
        own = {name: owner for name, owner in owners.items() if name in self.names}
        weighed = [
            Weighed(name, linear.weight, none, block.name, partial(self._read, block, linear))
            for name, (block, linear) in own.items()
        ]
        if not any(self.spread.trials):
            return allocation.patterns_for(self.spread, weighed, self.pattern)
        with self._trial(weighed, [linear for _, linear in own.values()]) as trial:
            return allocation.patterns_for(self.spread, weighed, self.pattern, trial.loss)

    @contextmanager
    def _trial(self, weighed: list[Weighed], linears: list[Linear]) -> Iterator[Trial]:
        budget = allocation.budget_of(self.pattern)
        places = []
        for own in weighed:
            score = scores.wanda(*own.values())
            places.append(_places(score, budget.width(own.weight)))
        positions = max(x.positions for block in self.walk.blocks for x in block.linears)
        few = some(self.walk, max(1, POSITIONS // positions))
        together = min(few.micro.samples, max(1, -(-few.samples // FEWER)))
        known = divergence.dense(few, together)
        dense = [linear.weight.clone() for linear in linears]
        trial = Trial(few, linears, places, dense, known, sum(self.spread.trials))
        try:
            with frozen(self.walk.model):
                yield trial
        finally:
            for linear, weight in zip(linears, dense, strict=True):
                linear.weight.copy_(weight)

    def _record(self, visit: Visit) -> None:
        for groups in visit.inputs(self.spread.needs):
            for inputs in groups:
                self.inputs |= {linear.name: inputs.statistics for linear in inputs.group}

    def _read(self, block: Block, linear: Linear) -> tuple[Tensor, Statistics]:
        with onload(block.module):
            weight = linear.weight.clone()
        inputs = self.inputs.get(linear.name, Statistics({}))
        gradient = self.gradients.get(linear.name)
        return weight, with_gradients(inputs, gradient, weight.device)


@dataclass
class Trial:
    """A model without shares of its linears: of each group, the lowest |W|·‖X‖₂ are 0.

    places: of each weight `[out, in]` in the order of its comparison group, in 256ths. dense: the
    weights. known: what the dense model makes of the samples of the walk.
    """

    walk: Walk
    linears: list[Linear]
    places: list[Tensor]
    dense: list[Tensor]
    known: list[Part]
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        self.shares = [0.0] * len(self.linears)

    def loss(self, shares: list[float], fewer: bool) -> float:
        """Return the mean KL(dense ‖ pruned) of the samples, or of a quarter of them."""
        for i, share in enumerate(shares):
            if share != self.shares[i]:
                keep = self.places[i] >= round(share * PLACES, 3)
                self.linears[i].weight.copy_(self.dense[i] * keep)
        self.shares, self.done = list(shares), self.done + 1
        self.walk.progress("search", self.done, self.total)
        known = self.known[: -(-len(self.known) // FEWER)] if fewer else self.known
        return divergence.mean_divergence(self.walk, known)


def _places(score: Tensor, width: int) -> Tensor:
    """Return where each entry stands in the order of its group of `width`, in 256ths."""
    groups = score.reshape(-1, width)
    order = groups.argsort(dim=1, stable=True)
    middles = (torch.arange(width, device=score.device) * 2 + 1) * (PLACES // 2) // width
    places = torch.empty_like(order, dtype=torch.uint8)
    places.scatter_(1, order, middles.to(torch.uint8).expand_as(order))
    return places.reshape(score.shape)
