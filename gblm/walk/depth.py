"""A shallower model: whole blocks go, and the config says so.

They go one after the other, each time the one without which the mean loss of some calibration
samples is lowest (SLEB, arXiv 2402.09025): what a block is called with then takes the place of what
it gives. Which setting counts the blocks of a list is found by trial, and settings that hold an
entry for each block lose those of the blocks that go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gblm.base import GblmError, Pattern, Statistics
from gblm.machine.carry import SHORTER
from gblm.machine.offload import offload_of
from gblm.walk.blocks import take
from gblm.walk.call import Output
from gblm.walk.rebuilt import Rebuilt, forwards, settings_of
from gblm.walk.sample import least_loss
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk

Counts = dict[str, tuple[str, int | None]]


@dataclass(frozen=True)
class Bypass:
    """How the stream passes a block by: one leaf of its arguments is the one tensor it gives."""

    argument: int
    output: int
    leaves: tuple[Any, ...]
    spec: TreeSpec

    def of(self, arguments: Sequence[Any]) -> Output:
        """Return what stands for the outputs of the block, by the leaves of its arguments."""
        leaves = list(self.leaves)
        leaves[self.output] = arguments[self.argument]
        return tree_unflatten(leaves, self.spec)


@dataclass
class Depth(Rebuilt):
    """Which blocks can go, and how many do.

    lists: the names of the blocks of each list, by its name. counts: the setting that says how many
    these are, and the place in it, None where it is a number. bypasses: of the blocks that can go.
    """

    lists: dict[str, list[str]] = field(default_factory=dict)
    counts: Counts = field(default_factory=dict)
    bypasses: dict[str, Bypass] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    make: Callable[[dict[str, Any]], nn.Module] = lambda changes: nn.Module()
    number: int = 0

    @classmethod
    def of(cls, walk: Walk, pattern: Pattern) -> Depth:
        """Return how a model becomes as short as a pattern says.

        Raises `GblmError` where no block can go, none would, or the config cannot state fewer.
        """
        settings, make = settings_of(walk.model, walk.adapter, pattern)
        depth = cls(walk.model, walk.blocks, settings=settings, make=make)
        for block in walk.blocks:
            name = block.name.rpartition(".")[0]
            if isinstance(walk.model.get_submodule(name), nn.ModuleList | nn.Sequential):
                depth.lists.setdefault(name, []).append(block.name)
        depth.bypasses = find_bypasses(walk)
        what = f"{pattern.name}: {type(walk.model).__name__}"
        if vars(walk.model).get("narrowed"):
            raise GblmError(f"{what} has widths by layer; remove blocks first, then other units")
        if not depth.bypasses:
            raise GblmError(
                f"{what} has no block that gives one tensor of the shape of its input; choose "
                "other units, such as neurons"
            )
        depth.counts = {name: own for name in depth.lists if (own := depth._count(name))}
        inside = {block for name in depth.counts for block in depth.lists[name]}
        depth.bypasses = {name: own for name, own in depth.bypasses.items() if name in inside}
        if not depth.bypasses:
            raise GblmError(
                f"{what} has a config that cannot state fewer blocks; choose other units, such as "
                "neurons"
            )
        (_, share), *_ = pattern.units
        depth.number = round(share * len(inside))
        if not depth.number:
            raise GblmError(
                f"blocks:{share:g} of {len(inside)} removes none; use blocks:{1 / len(inside):.2g}"
            )
        if depth.number > len(depth.bypasses) - len(depth.counts):
            raise GblmError(f"blocks:{share:g} leaves too few of {len(inside)}; use a lower share")
        return depth

    def choose(self, walk: Walk, gradients: Mapping[str, Statistics]) -> None:
        """Choose the blocks that go, one after the other by the loss of some samples.

        Raises `GblmError` where the config cannot state what is left.
        """
        least_loss(walk, self.gone, self.number, self._free, self.passing)
        stay = {name: self._stay(name) for name in self.counts}
        self.renamed = {
            own[old]: f"{name}.{new}"
            for name, own in self.lists.items()
            for new, old in enumerate(stay.get(name, range(len(own))))
        }
        what = f"without {', '.join(self.gone)} the config of {type(self.model).__name__}"
        way = f"keep a block by leaving its layers out, such as --exclude '{self.gone[0]}.*'"
        self.check(walk, lambda: self.make(self._changes(self.counts, stay)), what, way)
        ones = torch.ones(1, dtype=torch.bool)
        self.lost = {
            linear.name: ones.expand(linear.shape[0])
            for block in self.blocks
            for linear in block.linears
            if block.name in self.gone
        }

    def apply(self) -> None:
        """Give the model lists of blocks of the copy, with the parameters of those that stay."""
        if offload := offload_of(self.model):
            gone = map(self.model.get_submodule, self.gone)
            self.moves += [offload.exchange(module, None) for module in gone]
        for name in self.counts:
            own, new = (model.get_submodule(name) for model in (self.model, self.empty))
            old = [*own.children()]
            for i, (key, module) in zip(self._stay(name), new.named_children(), strict=True):
                self.fill(module, old[i], f"{name}.{key}", partial(_parameters, old[i]))
            self.put(name, new)
        self.state()
        self.before.append((self.model, SHORTER, None))
        setattr(self.model, SHORTER, True)

    def outputs(self, visit: Visit) -> list[Output]:
        """Return what stands for the outputs of a block that goes, for each call."""
        bypass = self.bypasses[visit.block.name]
        return [bypass.of(call.arguments(slice(0, call.samples))) for call in visit.calls]

    @contextmanager
    def passing(self, names: list[str]) -> Iterator[None]:
        with forwards(self.model, {name: _Passing(self.bypasses[name]) for name in names}):
            yield

    def _free(self) -> list[str]:
        """Return the blocks that can still go: one of every list stays."""
        last = {
            own[stay[0]]
            for name, own in self.lists.items()
            if name in self.counts and len(stay := self._stay(name)) == 1
        }
        return [name for name in self.bypasses if name not in last and name not in self.gone]

    def _stay(self, name: str) -> list[int]:
        """Return the places of the blocks of a list that stay."""
        return [i for i, block in enumerate(self.lists[name]) if block not in self.gone]

    def _changes(self, counts: Counts, stay: dict[str, list[int]]) -> dict[str, Any]:
        """Return the settings of a model in which some places of lists of blocks stay."""
        changes: dict[str, Any] = {}
        for name, places in stay.items():
            key, index = counts[name]
            if index is not None:
                before = [*changes.get(key, self.settings[key])]
                changes[key] = [*before[:index], len(places), *before[index + 1 :]]
                continue
            changes[key] = len(places)
            for other, value in self.settings.items():
                alike = isinstance(value, list | tuple) and len(value) == len(self.lists[name])
                if alike and "layer" in other:
                    changes[other] = [value[i] for i in places]
        return changes

    def _count(self, name: str) -> tuple[str, int | None] | None:
        """Return the setting that counts the blocks of a list, by leaving out the last of them."""
        own = self.lists[name]
        if len(own) < 2 or len(own) != len([*self.model.get_submodule(name).children()]):
            return None
        wanted = {key: len(blocks) - (key == name) for key, blocks in self.lists.items()}
        for place in self._places(len(own)):
            changes = self._changes({name: place}, {name: [*range(len(own) - 1)]})
            try:
                empty = self.make(changes)
                found = {key: len([*empty.get_submodule(key).children()]) for key in wanted}
            except Exception:  # whatever the model's code has against it
                continue
            if found == wanted:
                return place
        return None

    def _places(self, number: int) -> Iterator[tuple[str, int | None]]:
        for key, value in self.settings.items():
            if type(value) is int and value == number:
                yield key, None
            if isinstance(value, list | tuple):
                yield from ((key, i) for i, own in enumerate(value) if own == number)


@dataclass
class _Passing:
    """The forward of a block that is passed by."""

    bypass: Bypass

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        return self.bypass.of(tree_flatten((args, kwargs))[0])


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


def find_bypasses(walk: Walk) -> dict[str, Bypass]:
    """Return how the stream passes each block by that can go, by a run of one sample."""
    found: dict[str, Bypass] = {}

    def work(visit: Visit) -> None:
        (output,) = visit.outputs = list(visit.finished())
        if visit.block.groups and (bypass := bypass_of(visit.calls[0].leaves, output)):
            found[visit.block.name] = bypass

    forward(replace(walk, batch=take(walk.batch, slice(0, 1))), work)
    return found


def bypass_of(arguments: list[Any], output: Output) -> Bypass | None:
    """Return how a block is passed by that gives one tensor, the first like it taking its place."""
    leaves, spec = tree_flatten(output)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != 1:
        return None
    given = leaves[tensors[0]]
    for i, leaf in enumerate(arguments):
        if isinstance(leaf, Tensor) and (leaf.shape, leaf.dtype) == (given.shape, given.dtype):
            rest = tuple(None if isinstance(x, Tensor) else x for x in leaves)
            return Bypass(i, tensors[0], rest, spec)
    return None
