"""Whole layers of attention, or MLPs, go: 0 is added to the stream in their place.

They go one after the other, each time the one without which the mean loss of some samples is
lowest, as blocks do. No config states that; what is written beside the weights puts a module that
gives 0 where each of them was (`gblm.machine.narrowed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gblm.base import GblmError, Pattern, Statistics
from gblm.machine.narrowed import Gone
from gblm.walk.blocks import hooked, take
from gblm.walk.call import Output
from gblm.walk.rebuilt import Rebuilt, forwards
from gblm.walk.sample import least_loss
from gblm.walk.units import find_units
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk
from gblm.walk.widths import around

UNITS = {"attention": "heads", "mlps": "neurons"}  # of which each is made


@dataclass
class Sublayers(Rebuilt):
    """Which layers can go, and how many do.

    layers: by the name of each in the model, how many things it gives, 0 for a tensor alone.
    """

    layers: dict[str, int] = field(default_factory=dict)
    number: int = 0

    @classmethod
    def of(cls, walk: Walk, pattern: Pattern) -> Sublayers:
        """Return how a model comes to have fewer layers of a kind.

        Raises `GblmError` where it has none that are modules of their own, none would go, or what
        is saved of it cannot be loaded without some.
        """
        ((kind, share),) = pattern.units
        names: dict[str, list[str]] = {}
        for block, units in find_units(walk).items():
            own = next(x for x in walk.blocks if x.name == block)
            inner = {around(own, x) for x in units if x.kind == UNITS[kind]} - {""}
            names[block] = sorted(f"{block}.{name}" for name in inner)
        found = cls(walk.model, walk.blocks, layers=_given(walk, names))
        what, count = f"{pattern.name}: {type(walk.model).__name__}", len(found.layers)
        if not count:
            raise GblmError(f"{what} has no {kind} that are modules of their own")
        found.number = round(share * count)
        if not found.number:
            raise GblmError(f"{kind}:{share:g} of {count} removes none; use {kind}:{1 / count:.2g}")
        if not walk.adapter.narrows(walk.model):
            raise GblmError(f"{what} is of a class of its own; choose other units")
        if kind == "attention":  # the first tells the model's code how long its cache is
            del found.layers[next(iter(found.layers))]
        if found.number > len(found.layers):
            raise GblmError(f"{kind}:{share:g} leaves too few of {count}; use a lower share")
        found.gone = [*found.layers]
        found.check(walk, lambda: walk.model, what)
        found.gone = []
        return found

    def choose(self, walk: Walk, gradients: Mapping[str, Statistics]) -> None:
        """Choose the layers that go, one after the other by the loss of some samples."""

        def free() -> list[str]:
            return [name for name in self.layers if name not in self.gone]

        least_loss(walk, self.gone, self.number, free, self.passing)
        for block in self.blocks:
            self.lost |= {
                linear.name: torch.ones(linear.shape[0], dtype=torch.bool)
                for linear in block.linears
                if any(linear.name.startswith(f"{name}.") for name in self.gone)
            }

    def apply(self) -> None:
        """Give the model modules that give 0."""
        before = vars(self.model).get("narrowed")
        starts = tuple(f"{name}." for name in self.gone)
        stated = {k: v for k, v in (before or {}).items() if not f"{k}.".startswith(starts)}
        for name in self.gone:
            self.put(name, Gone(self.layers[name]))
        self.before.append((self.model, "narrowed", before))
        self.model.narrowed = stated | {name: self.layers[name] for name in self.gone}  # type: ignore[assignment]

    @contextmanager
    def passing(self, names: list[str]) -> Iterator[None]:
        with forwards(self.model, {name: Gone(self.layers[name]).forward for name in names}):
            yield


def _given(walk: Walk, names: dict[str, list[str]]) -> dict[str, int]:
    """Return how many things each module gives, 0 for a tensor alone, by a run of one sample."""
    found: dict[str, int] = {}

    def note(name: str, module: Any, args: Any, output: Output) -> None:
        several = isinstance(output, tuple)
        if isinstance(output[0] if several else output, Tensor):
            found[name] = len(output) if several else 0

    def work(visit: Visit) -> None:
        modules = {name: walk.model.get_submodule(name) for name in names.get(visit.block.name, ())}
        with hooked(own.register_forward_hook(partial(note, x)) for x, own in modules.items()):
            visit.outputs = list(visit.finished())

    forward(replace(walk, batch=take(walk.batch, slice(0, 1))), work)
    return found
