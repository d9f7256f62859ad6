"""Units: which weights of a block go together, found from a run of it.

A run of a block in which every linear gives made-up outputs shows who feeds whom: the code between
the linears is all that is left. Gradients say which rows of the writers feed an input of a reader;
other values of these rows must then change that unit's inputs and nothing else, neither another
unit, nor another linear, nor what the block gives. Blocks with the same linears have the same
units.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from gblm.walk.blocks import Block, Linear, Units, take
from gblm.walk.call import Call
from gblm.walk.products import Products, Use
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk

Rows = dict[str, Tensor]  # a mask of the outputs, or of the inputs, of linears by name


def find_units(walk: Walk) -> dict[str, list[Units]]:
    """Return the units of every block by its name, none where they cannot be found."""
    known: dict[tuple, tuple[Block, list[Units]]] = {}
    found: dict[str, list[Units]] = {}

    def work(visit: Visit) -> None:
        block = visit.block
        key = kind_of(block)
        if key not in known:
            known[key] = block, units_of(block, visit.calls[0].sample(0))
        first, units = known[key]
        names = {x.name[len(block.name) :]: x for x in block.linears}
        found[block.name] = [_alike(own, first, names) for own in units]

    forward(replace(walk, batch=take(walk.batch, slice(0, 1))), work)
    return found


def kind_of(block: Block) -> tuple:
    """Return what blocks have in common that are alike: their class, and their linears."""
    return type(block.module), *((x.name[len(block.name) :], x.shape) for x in block.linears)


def units_of(block: Block, call: Call) -> list[Units]:
    """Return the units of a block, by a call of it with one sample."""
    probe = Probe(block.linears, call)
    found: list[Units] = []
    for group in block.groups:
        reader = group[0]
        if len(group) > 1 or reader.name not in probe.inputs:
            continue
        if reader.shape[1] not in reader.parameter.shape:  # a kernel that meets patches
            continue
        if any(own.reader.parameter is reader.parameter for own in found):  # another expert
            continue
        units = probe.single_inputs(reader) or probe.components(reader)
        if units:
            found.append(units)
    return [own for units in found for own in _experts(units, block.linears)]


def _alike(units: Units, block: Block, names: dict[str, Linear]) -> Units:
    """Return the units of another block with the same linears, by what follows its name."""
    start = len(block.name)
    writers = [(names[linear.name[start:]], rows) for linear, rows in units.writers]
    return replace(units, reader=names[units.reader.name[start:]], writers=writers)


def _experts(units: Units, linears: list[Linear]) -> list[Units]:
    """Return the same units of every expert, where they are of one of them; else these alone."""
    inside = [within(linear) for linear, _, _ in units.parts()]
    if any(place is None for place in inside):
        return [units]
    by_place = {(x.parameter, place): x for x in linears if (place := within(x))}
    found = []
    for i in range(len(units.reader.parameter)):
        own = [
            by_place[linear.parameter, (i, *place[1:])]  # type: ignore[index]
            for (linear, _, _), place in zip(units.parts(), inside, strict=True)
        ]
        writers = [(x, rows) for x, (_, rows) in zip(own[1:], units.writers, strict=True)]
        found.append(replace(units, reader=own[0], writers=writers))
    return found


def within(linear: Linear) -> tuple[int, int, tuple[int, int]] | None:
    """Return the expert a linear is of, and where its matrix lies in that; None for no expert."""
    parameter, matrix = linear.parameter, linear.matrix
    if parameter.ndim != 3:
        return None
    expert, offset = divmod(matrix.offset, linear.strides[0])
    whole = expert == matrix.last // linear.strides[0]
    return (expert, offset, matrix.stride) if whole else None


class Probe:
    """A block run on one call with made-up outputs of its linears.

    inputs: of every linear that was used, `[..., in]` for each use, with the graph to the outputs
    of the linears before it.
    """

    def __init__(self, linears: list[Linear], call: Call) -> None:
        self.call, self.linears = call, {linear.name: linear for linear in linears}
        self.given = call.arguments(slice(0, 1))
        watch = _MadeUp(linears)
        with torch.enable_grad():
            given = call.run(list(self.given), watch=watch)
        self.inputs, self.outputs, self.output = watch.inputs, watch.outputs, tensors(given)

    @torch.enable_grad()
    def feeding(self, reader: Linear, channels: Tensor) -> Rows:
        """Return which outputs of the linears feed some inputs of one, by a mask of these."""
        total, draw = torch.zeros(()), torch.Generator().manual_seed(0)
        for x in self.inputs[reader.name]:
            x = x[..., channels.to(x.device)].double().cpu()
            total = total + (x * torch.randn(x.shape, generator=draw, dtype=x.dtype)).sum()
        names = [name for name, uses in self.outputs.items() for _ in uses]
        leaves = [leaf for uses in self.outputs.values() for leaf in uses]
        if not total.requires_grad:
            return {}
        gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        rows: Rows = {}
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None and (fed := (gradient != 0).flatten(0, -2).any(dim=0)).any():
                rows[name] = rows[name] | fed.cpu() if name in rows else fed.cpu()
        return rows

    def reached(self, rows: Rows) -> tuple[Rows, bool]:
        """Return the inputs of linears that some outputs change, and if those of the block do."""
        watch = _MadeUp(self.linears.values(), rows)
        with torch.no_grad():
            given = self.call.run(list(self.given), watch=watch)
        found: Rows = {}
        for name, uses in watch.inputs.items():
            pairs = zip(uses, self.inputs[name], strict=True)
            changed = [(x != before).flatten(0, -2).any(dim=0) for x, before in pairs]
            found[name] = torch.stack(changed).any(dim=0).cpu()
        same = all(map(torch.equal, tensors(given), self.output))
        return {name: mask for name, mask in found.items() if mask.any()}, not same

    def single_inputs(self, reader: Linear) -> Units | None:
        """Return the units of one input each, None where an output feeds several inputs.

        Inputs are told apart by the binary digits of their numbers.
        """
        numbers = torch.arange(reader.shape[1])
        codes: dict[str, Tensor] = {}
        feeding = self.feeding(reader, torch.ones_like(numbers, dtype=torch.bool))
        digits = max(1, (len(numbers) - 1).bit_length())
        for digit in range(digits if feeding else 0):
            one, zero = (self.feeding(reader, (numbers >> digit & 1) == bit) for bit in (1, 0))
            for name, rows in feeding.items():
                none = torch.zeros_like(rows)
                if not torch.equal(one.get(name, none) ^ zero.get(name, none), rows):
                    return None
                known = codes.setdefault(name, torch.zeros(len(rows), dtype=torch.long))
                known += one.get(name, none).long() << digit
        writers = []
        for name, rows in feeding.items():
            order = torch.argsort(codes[name][rows], stable=True)
            places = rows.nonzero().flatten()[order]
            each = len(places) // len(numbers)
            if not torch.equal(codes[name][places], numbers.repeat_interleave(each)):
                return None
            writers.append((self.linears[name], places.view(-1, each)))
        units = Units("neurons", reader, numbers[:, None], writers)
        sides = [(numbers >> digit & 1) == bit for digit in range(digits) for bit in (0, 1)]
        return units if writers and self._apart(units, sides) else None

    def components(self, reader: Linear) -> Units | None:
        """Return the units of several inputs that share what feeds them, None for a single one."""
        size = reader.shape[1]
        left, parts = torch.ones(size, dtype=torch.bool), list[tuple[Tensor, Rows]]()
        while left.any():
            channels = torch.zeros(size, dtype=torch.bool)
            channels[left.nonzero()[0]] = True
            rows: Rows = {}
            for _ in range(4):
                before, rows = channels, self.feeding(reader, channels)
                channels = channels | self.reached(rows)[0].get(reader.name, channels)
                if torch.equal(before, channels):
                    break
            if not rows or (channels & ~left).any() or 2 * channels.sum() > size:
                return None
            left = left & ~channels
            parts.append((channels, rows))
        try:
            places = torch.stack([channels.nonzero().flatten() for channels, _ in parts])
            names = parts[0][1]
            writers = [
                (self.linears[name], torch.stack([x[name].nonzero().flatten() for _, x in parts]))
                for name in names
            ]
        except (RuntimeError, KeyError):  # parts of other sizes, or fed by others
            return None
        units = Units("heads", reader, places, writers)
        return units if self._apart(units, list(torch.eye(len(places)).bool())) else None

    def _apart(self, units: Units, chosen: Iterable[Tensor]) -> bool:
        """Say whether the rows of chosen units change their inputs and nothing else.

        And other rows of the writers do not.
        """
        reader, everything = units.reader, units.channels.flatten()
        rest = {
            linear.name: torch.ones(linear.shape[0], dtype=torch.bool).index_fill_(
                0, rows.flatten(), False
            )
            for linear, rows in units.writers
        }
        if reader.name in self.reached(rest)[0] or len(everything) != reader.shape[1]:
            return False
        for mask in chosen:
            rows = {
                linear.name: torch.zeros(linear.shape[0], dtype=torch.bool).index_fill_(
                    0, places[mask].flatten(), True
                )
                for linear, places in units.writers
            }
            expected = torch.zeros(reader.shape[1], dtype=torch.bool)
            expected[units.channels[mask].flatten()] = True
            if not expected.any():
                continue
            inputs, outside = self.reached(rows)
            if outside or {*inputs} != {reader.name} or not inputs[reader.name].equal(expected):
                return False
        return True


def tensors(given: Any) -> list[Tensor]:
    """Return the tensors among what a block gives."""
    return [x.detach() for x in tree_flatten(given)[0] if isinstance(x, Tensor)]


class _MadeUp(Products):
    """Gives made-up outputs of linears, others in some rows, and notes what the linears see.

    They are positive, so that no activation is 0 throughout.
    """

    def __init__(self, linears: Iterable[Linear], rows: Rows | None = None) -> None:
        super().__init__(linears)
        self.rows, self.draw = rows or {}, torch.Generator().manual_seed(0)
        self.other = torch.Generator().manual_seed(1)
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def before(self, linear: Linear, use: Use) -> None:
        self.inputs.setdefault(linear.name, []).append(use.x)

    def after(self, seen: list[tuple[Linear, Use]], output: Tensor) -> Tensor:
        made = torch.empty_like(output)
        for linear, use in seen:
            part = use.rows(made)
            if part.untyped_storage()._cdata != made.untyped_storage()._cdata:
                return output  # its rows overlap: it is code between the others
            values = 0.5 + torch.rand(part.shape, generator=self.draw)
            if (rows := self.rows.get(linear.name)) is not None:
                others = 0.5 + torch.rand(part.shape, generator=self.other)
                values = torch.where(rows, others, values)
            leaf = values.to(part).requires_grad_(torch.is_grad_enabled())
            self.outputs.setdefault(linear.name, []).append(leaf)
            part.copy_(leaf)
        return made
