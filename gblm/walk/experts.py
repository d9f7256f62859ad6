"""Fewer experts: those of a mixture go whole, with their rows of the router; the config says so.

They go one after the other, each time the one without which what the block gives changes least on
some calibration samples, while the model's own code sends its positions to the others.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gblm.base import GblmError, Pattern, Statistics
from gblm.machine import processes
from gblm.maths.structure import kept
from gblm.walk.blocks import Block, Linear
from gblm.walk.products import Products, Use
from gblm.walk.rebuilt import Rebuilt, settings_of
from gblm.walk.sample import some
from gblm.walk.units import within
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk


@dataclass
class Mixture:
    """The experts of a block, the router that sends positions to them, and which of them go."""

    router: Linear
    experts: dict[str, int]  # the number of the expert of each linear
    count: int
    gone: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, block: Block) -> Mixture | None:
        """Return the mixture of a block, None where it has none."""
        places = {linear.name: place[0] for linear in block.linears if (place := within(linear))}
        counts = {len(x.parameter) for x in block.linears if x.name in places}
        routers = [x for x in block.linears if x.name not in places and {x.shape[0]} == counts]
        return cls(routers[0], places, counts.pop()) if len(routers) == 1 else None

    def stay(self) -> list[int]:
        """Return the numbers of those that stay."""
        return [i for i in range(self.count) if i not in self.gone]


@dataclass
class Experts(Rebuilt):
    """Which blocks have a mixture, and how many of its experts stay."""

    mixtures: dict[str, Mixture] = field(default_factory=dict)
    number: int = 0

    @classmethod
    def of(cls, walk: Walk, pattern: Pattern) -> Experts:
        """Return how a model comes to have fewer experts.

        Raises `GblmError` where it has no mixtures of one size, none of their experts would go, or
        its config cannot state what is left.
        """
        found = {block.name: own for block in walk.blocks if (own := Mixture.of(block))}
        counts = {own.count for own in found.values()}
        if len(counts) != 1:
            what = f"mixtures of {sorted(counts)} experts" if counts else "no mixture of experts"
            raise GblmError(f"{pattern.name}: {type(walk.model).__name__} has {what}")
        (count,), ((_, share),) = counts, pattern.units
        number = kept(count, share, 1)
        if number == count:
            raise GblmError(
                f"experts:{share:g} of {count} removes none; use experts:{1 / count:.2g}"
            )
        model = cls(walk.model, walk.blocks, mixtures=found, number=number)
        for own in found.values():
            own.gone = [*range(number, count)]
        what = f"{pattern.name}: {type(walk.model).__name__}"
        model.empty = model._stated(walk, pattern, what)
        for own in found.values():
            own.gone = []
        return model

    def choose(self, walk: Walk, gradients: Mapping[str, Statistics]) -> None:
        """Choose the experts of each block that go, by what it gives for some samples."""
        done, each = 0, sum(range(self.number + 1, next(iter(self.mixtures.values())).count + 1))

        def work(visit: Visit) -> None:
            nonlocal done
            if (own := self.mixtures.get(visit.block.name)) is None:
                return
            dense = [*_given(visit, own)]
            while len(own.gone) < own.count - self.number:
                errors, gone = {}, own.gone
                for i in own.stay():
                    own.gone = [*gone, i]
                    pairs = zip(_given(visit, own), dense, strict=True)
                    off = sum(float((x - y).double().square().sum()) for x, y in pairs)
                    errors[i] = sum(processes.gathered(off))
                    done += 1
                    walk.progress("choice", done, each * len(self.mixtures))
                own.gone = [*gone, min(errors, key=lambda i: errors[i])]

        forward(some(walk), work)
        for block in self.blocks:
            if own := self.mixtures.get(block.name):
                self._name(block, own)

    def apply(self) -> None:
        """Give the model the blocks of the copy, with the weights of the experts that stay."""
        for block in self.blocks:
            if (own := self.mixtures.get(block.name)) is None:
                continue
            new = self.empty.get_submodule(block.name)
            shapes = {name: x.shape for name, x in new.named_parameters()}
            left = partial(_left_of, block.module, shapes, own)
            self.fill(new, block.module, block.name, left)
            self.put(block.name, new)
        self.state()

    @contextmanager
    def passing(self, names: list[str]) -> Iterator[None]:
        with Closed([*self.mixtures.values()]):
            yield

    def _name(self, block: Block, own: Mixture) -> None:
        """Say which linears, or rows of the router, go, and how the others are called then."""
        stay = own.stay()
        rows = torch.zeros(own.router.shape[0], dtype=torch.bool)
        rows[own.gone] = True
        self.lost[own.router.name] = rows
        for linear in block.linears:
            if (i := own.experts.get(linear.name)) in own.gone:
                self.lost[linear.name] = torch.ones(linear.shape[0], dtype=torch.bool)
            elif i is not None:
                new = re.sub(r"\[\d+", f"[{stay.index(i)}", linear.name)
                self.renamed[linear.name] = new

    def _stated(self, walk: Walk, pattern: Pattern, what: str) -> nn.Module:
        """Return an empty model with fewer experts, of settings that are found by trial."""
        settings, make = settings_of(walk.model, walk.adapter, pattern)
        count = next(iter(self.mixtures.values())).count
        names = [key for key, own in settings.items() if "expert" in key and own == count]
        error = GblmError(f"{what} has a config that does not count its experts")
        for size in range(1, len(names) + 1):
            for chosen in itertools.combinations(names, size):
                try:
                    changes = dict.fromkeys(chosen, self.number)
                    self.check(walk, partial(make, changes), what)
                except GblmError as reason:
                    error = reason
                    continue
                return self.empty
        raise error


class Closed(Products):
    """Lets routers give −∞ for the experts that go."""

    def __init__(self, mixtures: list[Mixture]) -> None:
        super().__init__([own.router for own in mixtures])
        self.gone = {own.router.name: own.gone for own in mixtures}

    def after(self, seen: list[tuple[Linear, Use]], output: Tensor) -> Tensor:
        output = output.clone()
        for linear, use in seen:
            use.rows(output)[..., self.gone[linear.name]] = -torch.inf
        return output


def _given(visit: Visit, own: Mixture) -> Iterator[Tensor]:
    """Yield the tensors that a block gives without the experts that go, piece by piece."""
    for call in visit.calls:
        for piece in call.pieces(visit.samples_at_once):
            given: Any = call.run(call.arguments(piece), watch=Closed([own]))
            yield from (x for x in tree_flatten(given)[0] if isinstance(x, Tensor))


def _left_of(
    module: nn.Module, shapes: dict[str, torch.Size], own: Mixture
) -> dict[str, nn.Parameter]:
    """Return what is left of the parameters of a block."""
    return {
        name: nn.Parameter(_left(x.detach(), shapes[name], own), x.requires_grad)
        for name, x in module.named_parameters()
    }


def _left(value: Tensor, shape: torch.Size, own: Mixture) -> Tensor:
    """Return what is left of a parameter: its part of the experts that stay, in each dimension."""
    index = torch.tensor(own.stay(), device=value.device)
    for dim, (size, left) in enumerate(zip(value.shape, shape, strict=True)):
        if (size, left) == (own.count, len(index)):
            value = value.index_select(dim, index)
    return value.contiguous().clone()
