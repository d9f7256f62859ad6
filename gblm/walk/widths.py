"""Widths that no config states: which settings of a block's modules go with narrower weights.

Linear layers hold their sizes, attention the count of its heads. Which settings must change is
found by trial: a narrow copy of the block gives what the block gives with zeros in the units that
go.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gblm.base import GblmError
from gblm.machine.narrowed import Modules, narrow
from gblm.walk.blocks import Block, Snapshot, Units
from gblm.walk.call import Call
from gblm.walk.rebuilt import fill
from gblm.walk.units import tensors

SIZES = (("out_features", "out_channels", "nf"), ("in_features", "in_channels", "nx"))
COUNTS = re.compile("head|dim|size|width|channels|embed|inner|^groups$")  # in names of settings
TRIALS = 64
SAME, ROUNDING = 1e-3, 8  # by how much of what the zeros change, and of rounding, it may differ

# A setting of a module that counts units, with the number of the block's units that it counts; a
# parameter beside the linears, whose dimension does, is one too.
Setting = tuple[str, str, int]


def copied(module: nn.Module) -> Any:
    """Return a copy of a module without values of its parameters."""
    memo: dict[int, Any] = {
        id(own): nn.Parameter(torch.empty_like(own, device="meta"), own.requires_grad)
        for own in module.parameters()
    }
    for own in module.modules():  # what waits or brings weights is not copied
        hooks = [*own._forward_pre_hooks.values(), *own._forward_hooks.values()]
        memo |= {id(x): None for x in [*hooks, vars(own).get("forward")]}
    new = copy.deepcopy(module, memo)
    for own in new.modules():
        vars(own).pop("forward", None)
        own._forward_pre_hooks.clear()
        own._forward_hooks.clear()
    return new


def sizes_of(block: Block, units: list[Units]) -> Modules:
    """Return the sizes that the modules of linears hold, as they become, by names in the block."""
    names = {own: name for name, own in block.module.named_parameters()}
    found: Modules = {}
    for own in units:
        for linear, axis, places in own.parts():
            name = names[linear.parameter].rpartition(".")[0]
            module, gone = block.module.get_submodule(name), places[own.kept :].numel()
            for key in SIZES[axis]:
                if gone and type(size := getattr(module, key, None)) is int:
                    found.setdefault(name, {})[key] = size - gone
    return found


def find_settings(
    block: Block, call: Call, units: list[Units], shapes: dict[str, tuple[int, ...]], cut: Any
) -> list[Setting]:
    """Return the settings that count units, by a call of the block with one sample.

    shapes: those of its narrow parameters, by names in it; cut(block, shapes): these. Raises
    `GblmError` where no settings make the copy give the same.
    """
    known, error = [*_candidates(block, units)], "no setting counts them"
    given = call.arguments(slice(0, call.samples))
    before = Snapshot(block)
    dense = tensors(call.run(list(given)))
    try:
        for own in units:
            for linear, axis, places in own.parts():
                gone = places[own.kept :].flatten().to(linear.weight.device)
                linear.weight.index_fill_(axis, gone, 0)
        wanted = tensors(call.run(list(given)))
        for chosen in itertools.islice(_subsets(known), TRIALS):
            try:
                new = copied(block.module)
                narrow(new, modules_of(block, units, shapes, [*chosen]))
                own_shapes = {name: own.shape for name, own in new.named_parameters()}
                fill(new, block.module, cut(block, own_shapes))
                trial = replace(call, block=replace(block, module=new), forward=new.forward)
                found = tensors(trial.run(list(given)))
            except Exception as reason:  # whatever the model's code has against it
                error = str(reason)
                continue
            if all(map(_alike, found, wanted, dense)):
                return [*chosen]
            error = "a narrow copy gives something else"
    finally:
        before.write()
    raise GblmError(f"{type(block.module).__name__} cannot be narrower: {error[:200]}")


def modules_of(
    block: Block,
    units: list[Units],
    shapes: dict[str, tuple[int, ...]],
    settings: list[Setting],
) -> Modules:
    """Return what becomes of the modules of a block, by their names in it."""
    found = sizes_of(block, units)
    for name, old in block.module.named_parameters():
        if tuple(old.shape) != shapes[name]:
            owner, _, key = name.rpartition(".")
            found.setdefault(owner, {})[key] = [*shapes[name]]
    for name, key, i in settings:
        if units[i].kept == len(units[i].channels):
            continue
        value, counts = getattr(block.module.get_submodule(name), key), _counts(units[i])
        sizes = value.shape if isinstance(value, Tensor) else [value]
        new = [n * units[i].kept // len(units[i].channels) if n in counts else n for n in sizes]
        found.setdefault(name, {})[key] = new if isinstance(value, Tensor) else new[0]
    return found


def around(block: Block, units: Units) -> str:
    """Return the innermost module that holds all linears of units, by its name in the block."""
    names = {own: name for name, own in block.module.named_parameters()}
    paths = [names[linear.parameter].split(".")[:-1] for linear, _, _ in units.parts()]
    shared = itertools.takewhile(lambda part: len({*part}) == 1, zip(*paths, strict=False))
    return ".".join(part[0] for part in shared)


def _candidates(block: Block, units: list[Units]) -> Iterator[Setting]:
    """Yield the settings that may count units: of the modules around all linears of these."""
    names = {own: name for name, own in block.module.named_parameters()}
    linears = {names[x.parameter].rpartition(".")[0] for own in units for x, _, _ in own.parts()}
    seen: set[tuple[str, str]] = set()
    for i, own in enumerate(units):
        outer, counts = around(block, own), _counts(own)
        for inner, module in block.module.get_submodule(outer).named_modules():
            name = ".".join(filter(None, (outer, inner)))
            held = {} if name in linears else {**vars(module), **module._parameters}
            for key, value in held.items():
                counting = type(value) is int and bool(COUNTS.search(key))
                sizes = value.shape if isinstance(value, Tensor) else (value,) * counting
                if counts & {*sizes} and (name, key) not in seen:
                    seen.add((name, key))
                    yield name, key, i


def _counts(units: Units) -> set[int]:
    """Return the counts of units, of their inputs and rows, and of heads that share others."""
    rows = [own.shape[1] for _, own in units.writers]
    each = {1, units.channels.shape[1], *rows, *(n // min(rows) for n in rows)}
    return {len(units.channels) * n for n in each}


def _subsets(known: list[Setting]) -> Iterator[tuple[Setting, ...]]:
    for size in range(len(known), -1, -1):
        yield from itertools.combinations(known, size)


def _alike(found: Tensor, wanted: Tensor, dense: Tensor) -> bool:
    """Say whether two tensors are the same, beside how far the second is from a third."""
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    rounding = ROUNDING * torch.finfo(wanted.dtype).eps * wanted.double().norm()
    most = SAME * (wanted.double() - dense.double()).norm() + rounding
    return bool((found.double() - wanted.double()).norm() <= most)
