"""A narrower model: units that go are cut out of the weights, and the config says so.

Which settings make a model of the wanted shapes is found by trial: those that hold an old width, or
count heads, are changed in an empty copy until all shapes of its parameters are right. The blocks
of that copy, which the family's own code has built, then take the place of the blocks, with what is
left of their weights. Where the config cannot state it, a narrow copy of the model is made module
by module, and what is written beside the weights makes it again (`gblm.machine.narrowed`).
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gblm.base import Adapter, GblmError, Pattern, Statistics
from gblm.machine.narrowed import narrow
from gblm.machine.offload import onload
from gblm.maths.allocation import cheapest
from gblm.maths.scores import gradient
from gblm.maths.stats import wide
from gblm.maths.structure import MULTIPLE, kept, unit_scores
from gblm.walk.blocks import Block, Linear, Units, take
from gblm.walk.inputs import with_gradients
from gblm.walk.rebuilt import Rebuilt, settings_of
from gblm.walk.units import find_units, kind_of
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk
from gblm.walk.widths import Setting, copied, find_settings, modules_of

log = logging.getLogger(__name__)

LOSS = "grad_abs"  # the sums of gradients that say what a unit costs
BOUND = 0.3  # how far the share of a layer may lie from that of the model

Shapes = dict[str, tuple[int, ...]]
# Where a unit lies in a parameter: the expert, None for all, and the dimension.
Place = tuple[int | None, int]


@dataclass
class Narrowing(Rebuilt):
    """Which units a model has by block, how many stay, and an empty model of the narrow shapes."""

    pattern: Pattern | None = None
    settings: dict[str, list[Setting]] = field(default_factory=dict)

    @classmethod
    def of(cls, walk: Walk, pattern: Pattern) -> Narrowing:
        """Return how a model becomes as narrow as a pattern says.

        Raises `GblmError` where it has no such units, none of them would go, or nothing that is
        saved can state what is left.
        """
        found = find_units(walk)
        units: dict[str, list[Units]] = {name: [] for name in found}
        for kind, share in pattern.units:
            own = [one for parts in found.values() for one in parts if one.kind == kind]
            counts = remaining([len(x.channels) for x in own], kind, share, pattern.uneven)
            for name, parts in found.items():
                units[name] += [
                    replace(one, kept=counts[len(one.channels)])
                    for one in parts
                    if one.kind == kind
                ]
        narrowing = cls(walk.model, walk.blocks, units=units, pattern=pattern)
        try:
            if not pattern.uneven:
                narrowing.empty = narrowing.stated(walk.adapter, pattern)
                return narrowing
            settings_of(walk.model, walk.adapter, pattern)
        except GblmError as error:
            if not walk.adapter.narrows(walk.model):
                raise
            way = "a file beside the weights will load the result"
            log.warning("%s; %s", str(error).rpartition(";")[0], way)
        narrowing.settings = narrowing.found(walk)
        narrowing.empty = narrowing.narrowed()
        return narrowing

    def found(self, walk: Walk) -> dict[str, list[Setting]]:
        """Return the settings of modules that count units, by block; alike in blocks alike."""
        known: dict[tuple, list[Setting]] = {}
        found: dict[str, list[Setting]] = {}

        def work(visit: Visit) -> None:
            block = visit.block
            units = self.units[block.name]
            key = kind_of(block)
            if units and key not in known:
                call = visit.calls[0].sample(0)
                known[key] = find_settings(block, call, units, self._own_shapes(block), self._cut)
            found[block.name] = known.get(key, [])

        forward(replace(walk, batch=take(walk.batch, slice(0, 1))), work)
        return found

    def narrowed(self) -> nn.Module:
        """Return an empty model of the narrow shapes, a copy that is changed module by module."""
        modules = copy.deepcopy(vars(self.model).get("narrowed", {}))
        for block in self.blocks:
            own = self.units[block.name], self._own_shapes(block), self.settings[block.name]
            for name, changes in modules_of(block, *own).items():
                place = ".".join(filter(None, (block.name, name)))
                modules[place] = modules.get(place, {}) | changes
        empty = copied(self.model)
        narrow(empty, modules)
        return empty

    def choose(self, walk: Walk, gradients: Mapping[str, Statistics]) -> None:
        """Share out what goes over the layers, where they may keep different numbers of units.

        The next unit of every layer costs the same loss per weight, Σ|w|·Σ|g| over its weights.
        """
        assert self.pattern
        if not self.pattern.uneven:
            return
        curve: dict[str, Tensor] = {}
        for block in self.blocks:
            with onload(block.module):
                curve |= {x.reader.name: _losses(x, gradients) for x in self.units[block.name]}
        for kind, share in self.pattern.units:
            layers: dict[nn.Parameter, list[Units]] = {}
            for own in self._of_kind(kind):
                layers.setdefault(own.reader.parameter, []).append(own)
            curves = [
                torch.stack([curve[x.reader.name] for x in own]).mean(0) for own in layers.values()
            ]
            sizes = [sum(x.weights * len(x.channels) for x in own) for own in layers.values()]
            shares = cheapest(curves, sizes, share, BOUND)
            for layer, part in zip(layers.values(), shares, strict=True):
                for units in layer:
                    units.kept = kept(len(units.channels), part, multiple_of(kind))
        self.empty = self.narrowed()

    def stated(self, adapter: Adapter, pattern: Pattern) -> nn.Module:
        """Return an empty model of the narrow shapes, made of settings that are found by trial."""
        what = f"{pattern.name}: the config of {type(self.model).__name__}"
        settings, make = settings_of(self.model, adapter, pattern)
        kinds = [[*_changes(kind, self._of_kind(kind), settings)] for kind, _ in pattern.units]
        wanted, error = self._shapes(), "no setting has such a width"
        for parts in itertools.product(*kinds):
            try:
                empty = make({name: value for part in parts for name, value in part.items()})
            except Exception as reason:  # whatever the model's code has against it
                error = str(reason)
                continue
            shapes = {
                name: tuple(own.shape)
                for block in self.blocks
                for name, own in empty.get_submodule(block.name).named_parameters(block.name)
            }
            misfit = self._misfit(wanted, shapes)
            if not misfit:
                return empty
            error = f"{misfit} would be {shapes.get(misfit)}, not {wanted.get(misfit)}"
        raise GblmError(f"{what} cannot state it ({error[:200]}); choose other units")

    def _of_kind(self, kind: str) -> list[Units]:
        return [one for own in self.units.values() for one in own if one.kind == kind]

    def _shapes(self) -> Shapes:
        """Return the shape of every parameter in the blocks of the narrow model."""
        shapes: dict[str, list[int]] = {}
        for block in self.blocks:
            own = block.module.named_parameters(block.name)
            shapes |= {name: list(parameter.shape) for name, parameter in own}
            first: dict[str, int | None] = {}
            for units in self.units[block.name]:
                for name, (expert, dim), places in _in_parameters(block, units):
                    if first.setdefault(name, expert) == expert:  # all experts are alike
                        shapes[name][dim] -= places[units.kept :].numel()
        return {name: tuple(shape) for name, shape in shapes.items()}

    def _own_shapes(self, block: Block) -> Shapes:
        """Return the shapes of the parameters of a narrow block, by their names in it."""
        start = f"{block.name}."
        return {
            name.removeprefix(start): shape
            for name, shape in self._shapes().items()
            if name.startswith(start)
        }

    def _misfit(self, wanted: Shapes, found: Shapes) -> str:
        """Return a parameter whose shape is wrong, nothing where there is none."""
        if wanted.keys() != found.keys():
            return min(wanted.keys() ^ found.keys())
        blocks = {block.name: self.units[block.name] for block in self.blocks}
        for name, shape in found.items():
            if shape != wanted[name]:
                units = next((own for key, own in blocks.items() if name.startswith(f"{key}.")), [])
                if _beside(wanted[name], shape, units) is None:
                    return name
        return ""

    def apply(self) -> None:
        """Give the model the blocks of the empty one, with the weights of the units that stay."""
        for block in self.blocks:
            new = self.empty.get_submodule(block.name)
            shapes = {name: own.shape for name, own in new.named_parameters()}
            self.fill(new, block.module, block.name, partial(self._cut, block, shapes))
            self.put(block.name, new)
        self.state()

    def _cut(self, block: Block, shapes: dict[str, torch.Size]) -> dict[str, nn.Parameter]:
        """Return what is left of the parameters of a block, by their names in it."""
        values = {name: own.detach() for name, own in block.module.named_parameters()}
        gone: dict[tuple[str, Place], Tensor] = {}
        for units in self.units[block.name]:
            out = ~staying(units)
            for name, place, places in _in_parameters(block, units):
                key = name.removeprefix(f"{block.name}."), place
                gone[key] = torch.cat([gone.get(key, places[:0].flatten()), places[out].flatten()])
        for name in dict.fromkeys(name for name, _ in gone):
            values[name] = _without(values[name], {p: i for (n, p), i in gone.items() if n == name})
        for name, value in values.items():
            if value.shape != shapes[name]:
                beside = _beside(tuple(value.shape), tuple(shapes[name]), self.units[block.name])
                assert beside is not None  # the door has looked
                dim, units, size = beside
                mask = staying(units)
                places = units.channels[mask].flatten().sort().values
                index = places if size == units.channels.numel() else mask.nonzero().flatten()
                values[name] = value.index_select(dim, index.to(value.device))
        return {
            name: nn.Parameter(values[name].contiguous().clone(), old.requires_grad)
            for name, old in block.module.named_parameters()
        }


def remaining(counts: list[int], kind: str, share: float, uneven: bool) -> dict[int, int]:
    """Return how many units stay where there are so many, the same share of each.

    uneven: whether layers will share out those that go; some of each do until then. Raises
    `GblmError` where there are none, or none would go.
    """
    if not counts:
        raise GblmError(
            f"no {kind} found that can go: what feeds the linear layers of the blocks is mixed in "
            "between, or goes elsewhere too"
        )
    least = min(counts)
    stay = kept(least, share, multiple_of(kind))
    if uneven and stay == least > 1 and round(share * sum(counts)):
        stay = least - 1
    if stay == least:
        raise GblmError(f"{kind}:{share:g} of {least} removes none; use {kind}:{1 / least:.2g}")
    if other := next((n for n in counts if n * stay % least), 0):
        raise GblmError(f"{kind}:{share:g} keeps {stay} of {least}, and no such share of {other}")
    return {n: n * stay // least for n in counts}


def multiple_of(kind: str) -> int:
    """Return of what the numbers of units that stay are multiples."""
    return MULTIPLE if kind == "neurons" else 1


def _losses(units: Units, gradients: Mapping[str, Statistics]) -> Tensor:
    """Return the loss per weight of every unit, `[units]`, the lowest first."""
    device = units.reader.weight.device
    parts = []
    for linear, axis, places in units.parts():
        own = with_gradients(Statistics({}), gradients.get(linear.name), device)
        score = gradient(wide(linear.weight), own).movedim(axis, 0)
        parts.append((score, places.to(device)))
    losses = unit_scores(parts)
    return losses.double().cpu().sort().values / units.weights


def staying(units: Units) -> Tensor:
    """Return the mask of the units that stay: what goes has no weight in the reader."""
    size = units.reader.weight.abs().amax(dim=0)[units.channels].amax(dim=1).float().cpu()
    mask = torch.zeros(len(size), dtype=torch.bool)
    mask[size.topk(units.kept).indices] = True
    return mask


def _in_parameters(block: Block, units: Units) -> Iterator[tuple[str, Place, Tensor]]:
    """Yield the parameters that hold units, biases too, and the places of each `[units, k]`."""
    names = {own: name for name, own in block.module.named_parameters()}
    for linear, axis, places in units.parts():
        name = names[linear.parameter]
        expert, dim, first = _place(linear, axis)
        yield f"{block.name}.{name}", (expert, dim), places + first
        for bias in biases(block.module, linear.parameter) if axis == 0 else ():
            yield f"{block.name}.{names[bias]}", (expert, bias.ndim - 1), places + first


def biases(module: nn.Module, weight: nn.Parameter) -> list[nn.Parameter]:
    """Return the biases that go with a weight of a module, by their names."""
    known = dict(module.named_parameters())
    name = next(name for name, own in known.items() if own is weight)
    ends = {name.replace("weight", "bias"), f"{name}_bias"} - {name}
    return [known[end] for end in sorted(ends & known.keys())]


def _place(linear: Linear, axis: int) -> tuple[int | None, int, int]:
    """Return the expert, the dimension of the parameter, and where the matrix begins in that."""
    matrix, shape, strides, expert = linear.matrix, linear.parameter.shape, linear.strides, None
    offset = matrix.offset
    if len(shape) == 3 and offset // strides[0] == matrix.last // strides[0]:
        expert, offset = divmod(offset, strides[0])
    dim = next(
        dim
        for dim, (size, stride) in enumerate(zip(shape, strides, strict=True))
        if size > 1 and stride == matrix.stride[axis] and not (dim == 0 and expert is not None)
    )
    return expert, dim, offset // strides[dim] % shape[dim]


def _without(value: Tensor, gone: dict[Place, Tensor]) -> Tensor:
    """Return a parameter without some places, of each expert or of all."""
    experts = [expert for expert, _ in gone if expert is not None]
    if experts:
        parts = []
        for i, own in enumerate(value):
            of_one: dict[Place, Tensor] = {
                (None, d - 1): index for (expert, d), index in gone.items() if expert == i
            }
            parts.append(_without(own, of_one))
        return torch.stack(parts)
    for (_, dim), index in gone.items():
        stays = torch.ones(value.shape[dim], dtype=torch.bool)
        stays[index] = False
        value = value.index_select(dim, stays.nonzero().flatten().to(value.device))
    return value


def _beside(
    shape: tuple[int, ...], wanted: tuple[int, ...], units: list[Units]
) -> tuple[int, Units, int] | None:
    """Return the dimension along which a parameter beside the linears holds units, and which.

    A depthwise convolution between them has one entry for each of their inputs, a bias of
    positions one for each head. None where it does not.
    """
    other = [dim for dim, (a, b) in enumerate(zip(shape, wanted, strict=False)) if a != b]
    if len(shape) != len(wanted) or len(other) != 1:
        return None
    size, left = shape[other[0]], wanted[other[0]]
    for own in units:
        each = own.channels.shape[1]
        sizes = {own.channels.numel(): own.kept * each, len(own.channels): own.kept}
        if sizes.get(size) == left:
            return other[0], own, size
    return None


def _changes(kind: str, units: list[Units], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the settings that may state what is left of units, the likeliest first."""
    before, after = len(units[0].channels), units[0].kept
    if kind == "neurons":
        widths = {len(own.channels): own.kept for own in units}
        named = {k: widths[v] for k, v in settings.items() if type(v) is int and v in widths}
        yield from ({name: value} for name, value in named.items())
        if len(named) > 1:
            yield named
        for name, value in settings.items():
            if value is None and any(word in name for word in ("inner", "ffn", "intermediate")):
                yield {name: after}
            if "mlp_ratio" in name:
                each = units[0].reader.shape[0]
                parts = [own * after / before for own in value] if _listed(value) else None
                yield {name: parts or after / each}
        return
    counts = {
        name: scaled
        for name, value in settings.items()
        if "head" in name and (scaled := _scaled(value, after, before))
    }
    total = settings.get("num_attention_heads") or settings.get("n_head")
    if counts and isinstance(total, int):
        yield {**counts, "head_dim": units[0].reader.shape[1] // total}
    yield counts
    yield from ({name: value} for name, value in counts.items() if len(counts) > 1)


def _listed(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _scaled(value: Any, after: int, before: int) -> Any:
    """Return a count times after / before, a list of them too; None where that is none."""
    if _listed(value):
        parts = [_scaled(own, after, before) for own in value]
        return None if None in parts else parts
    whole = type(value) is int and value > 0 and value * after % before == 0
    return value * after // before if whole else None
