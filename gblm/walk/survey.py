"""What short runs tell of a model: its blocks, linears, and the order of use.

A run of one sample shows the blocks in their order and the linears that each uses. A run of the
same sample twice shows along which dimension tensors hold the samples. Runs of other samples show
which linears see only some of the positions, as those of routed experts do.
"""

import importlib.metadata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten

from gblm.base import Adapter, Batch, GblmError
from gblm.machine.device import memory_errors
from gblm.machine.offload import onload
from gblm.walk.blocks import (
    Block,
    Carried,
    Linear,
    frozen,
    hooked,
    micro_batches,
    parameters,
    to_device,
)

OTHERS = 16  # samples at most that are tried until every linear of a block has been used,
FRUITLESS = 3  # and the fewest before one that brings nothing new is the last

Shapes = list[torch.Size | None]  # of the leaves of arguments or outputs


def find_adapter(model: nn.Module) -> Adapter:
    """Return the adapter of the library the model comes from.

    Adapters are entry points of the group `gblm.adapters`: a line names a library and a function
    that makes the `Adapter` of a model, so that an installed package brings in its own families.

    Raises `GblmError` where no entry point names a library of the model's classes.
    """
    known = {entry.name: entry for entry in importlib.metadata.entry_points(group="gblm.adapters")}
    for kind in type(model).__mro__:
        if entry := known.get(kind.__module__.partition(".")[0]):
            adapter: Adapter = entry.load()(model)
            return adapter
    raise GblmError(
        f"no adapter for {type(model).__name__} (known: models of {', '.join(sorted(known))}); "
        "pass adapter="
    )


def survey(model: nn.Module, batch: Batch, adapter: Adapter) -> list[Block]:
    """Return the blocks of the model in the order of use, as short runs find them.

    Raises `GblmError` where the model has no blocks or no linears in them that can be pruned, uses
    a block more than once, or has a NaN or an Inf in a parameter.
    """
    blocks = {module: Block(name, module) for name, module in adapter.blocks(model).items()}
    if not blocks:
        raise GblmError(
            f"no blocks found in {type(model).__name__}; pass an Adapter that names them"
        )
    with memory_errors():
        _check_finite(model, blocks)
        owners: dict[nn.Parameter, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners[parameter].append(name)
        linears = {block.name: _linears(block, adapter, owners) for block in blocks.values()}
        names = {linear.name for within in linears.values() for linear in within}
        runs = _runs(model, batch, adapter, partial(_Watch, blocks, linears), names)
    ordered = [blocks[visit.module] for visit in runs[0]]
    modules = [block.module for block in ordered]
    if any([visit.module for visit in run] != modules for run in runs):
        raise GblmError(
            "some samples come to other blocks than others; a model that chooses its blocks by the "
            "sample cannot be pruned"
        )
    for i, block in enumerate(ordered):
        once, twice = runs[0][i], runs[1][i]
        block.arguments = _carried(once.arguments, twice.arguments)
        block.outputs = _carried(once.outputs, twice.outputs)
        others = [visit for run in runs[2:] for visit in run if visit.module is block.module]
        _describe(block, linears[block.name], [once, *others], twice)
    if not any(block.groups for block in ordered):
        raise GblmError(f"no linears to prune in the blocks of {type(model).__name__}")
    return ordered


@dataclass
class _Visit:
    """One call of a block: the shapes of its arguments and outputs, the uses of its linears.

    uses: how often each linear is called; rows: the shape of its input, but for the features;
    groups: those with the same input.
    """

    module: nn.Module
    arguments: Shapes
    outputs: Shapes = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)
    rows: dict[str, torch.Size] = field(default_factory=dict)
    groups: list[tuple[Tensor, list[Linear]]] = field(default_factory=list)


class _Watch:
    """Notes what a run of the model does with its blocks and linears."""

    def __init__(self, blocks: dict[nn.Module, Block], linears: dict[str, list[Linear]]) -> None:
        self.blocks, self.visits = blocks, list[_Visit]()
        self.hooks: list[Any] = []
        for module in blocks:
            self.hooks.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self.leave))
        for linear in (linear for within in linears.values() for linear in within):
            use = partial(self.use, linear)
            self.hooks.append(linear.module.register_forward_pre_hook(use))

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if any(visit.module is module for visit in self.visits):
            name = self.blocks[module].name
            raise GblmError(f"block {name} is used more than once; it cannot be pruned")
        self.visits.append(_Visit(module, _shapes((args, kwargs))))

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        visit = self.visits[-1]
        visit.outputs = _shapes(output)
        visit.groups = [(x.new_empty(0), linears) for x, linears in visit.groups]  # frees inputs

    def use(self, linear: Linear, module: nn.Module, args: tuple) -> None:
        visit, x = self.visits[-1], args[0]
        visit.uses[linear.name] += 1
        visit.rows[linear.name] = linear.rows(x).shape[:-1]
        group = next((linears for other, linears in visit.groups if other is x), None)
        if group is None:
            visit.groups.append((x, [linear]))
        else:
            group.append(linear)


def _shapes(value: Any) -> Shapes:
    leaves = tree_flatten(value)[0]
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]


def _runs(
    model: nn.Module, batch: Batch, adapter: Adapter, watch: partial[_Watch], unused: set[str]
) -> list[list[_Visit]]:
    """Return the visits of runs of the longest sample, of it twice, and of others.

    One other at least, and more while some linear has not been used and each brings news.
    """
    device = next(model.parameters()).device
    singles = [part.batch for part in micro_batches(batch, 1, adapter)]
    singles.sort(key=lambda single: -sum(value.numel() for value in single.values()))
    first, *others = singles[: OTHERS + 1]
    double = {name: torch.cat([value, value]) for name, value in first.items()}
    runs = []
    for i, samples in enumerate([first, double, *others]):
        with frozen(model), torch.no_grad(), hooked((watching := watch()).hooks):
            adapter.trunk(model, to_device(samples, device))
        runs.append(watching.visits)
        new = unused & {name for visit in watching.visits for name in visit.uses}
        unused = unused - new
        if i > 1 and (not unused or (i > 1 + FRUITLESS and not new)):
            break
    return runs


def _carried(once: Shapes, twice: Shapes) -> list[Carried]:
    """Return where the leaves hold the samples: along the one dimension that has doubled."""
    found: list[Carried] = []
    for one, two in zip(once, twice, strict=False):
        pairs = list(zip(one, two, strict=True)) if one and two and len(one) == len(two) else []
        grown = [(dim, n) for dim, (n, double) in enumerate(pairs) if double == 2 * n]
        found.append(grown[0] if len(grown) == 1 else None)
    return found


def _describe(block: Block, linears: list[Linear], visits: list[_Visit], double: _Visit) -> None:
    """Group the linears of a block by their inputs, in the order of use; name those left dense."""
    for linear in linears:
        name = linear.name
        uses = [visit.uses[name] for visit in visits]
        by_shape: dict[tuple, set[int]] = defaultdict(set)  # positions, of samples that are alike
        for visit in visits:
            rows = visit.rows.get(name)
            by_shape[tuple(visit.arguments)].add(rows.numel() if rows is not None else 0)
        linear.positions = max(count for counts in by_shape.values() for count in counts)
        linear.routed = 0 in uses or any(len(counts) > 1 for counts in by_shape.values())
        one, two = visits[0].rows.get(name), double.rows.get(name)
        linear.mixed = one is not None and two is not None and _mixed(one, two)
        if not any(uses):
            block.dense[name] = "not used by its block"
        elif max(uses) > 1:
            block.dense[name] = "used more than once by its block"
        elif one is not None and one == two and one.numel():
            block.dense[name] = "sees no samples"
    for name, parameter in block.module.named_parameters():
        if parameter.ndim == 3 and min(parameter.shape) > 1:
            block.dense[f"{block.name}.{name}"] = "a tensor of expert matrices, seen as no linear"
    runs = [[linears for _, linears in visit.groups] for visit in visits]
    runs = [[[x for x in group if x.name not in block.dense] for group in run] for run in runs]
    block.groups = _ordered(runs, [linear.name for linear in linears])


def _mixed(one: torch.Size, two: torch.Size) -> bool:
    """Whether the rows of two samples are not those of the first, then those of the second."""
    grown = next((dim for dim, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
    return one[:grown].numel() > 1


def _ordered(runs: list[list[list[Linear]]], names: list[str]) -> list[list[Linear]]:
    """Return the groups of all runs, each before those that come after it in some run.

    Where no run tells, the order is that of the names.
    """
    groups: dict[str, list[Linear]] = {}  # by each of its linears; the first one is its name
    before: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        passed: set[str] = set()
        for group in run:
            new = [linear for linear in group if linear.name not in groups]
            groups |= dict.fromkeys((linear.name for linear in new), new)
            for name in {groups[linear.name][0].name for linear in group}:
                before[name] |= passed - {name}
                passed.add(name)
    rank = {name: i for i, name in enumerate(names)}
    sorter, ordered, ready = TopologicalSorter(before), list[str](), set[str]()
    try:
        sorter.prepare()
    except CycleError:  # samples that use them in other orders
        return [groups[name] for name in sorted(before, key=rank.__getitem__)]
    while sorter.is_active():
        ready |= {*sorter.get_ready()}
        ordered.append(min(ready, key=rank.__getitem__))
        ready.remove(ordered[-1])
        sorter.done(ordered[-1])
    return [groups[name] for name in ordered]


def valueless(tensor: Tensor) -> bool:
    """Say whether a tensor is a shape alone: on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _linears(block: Block, adapter: Adapter, owners: dict[nn.Parameter, list[str]]) -> list[Linear]:
    """Return the linears of a block that can be pruned; names the others as dense."""
    linears = []
    for inner, module in block.module.named_modules():
        if kind := adapter.kind(module):
            linear = Linear(f"{block.name}.{inner}" if inner else block.name, module, kind)
            if why := _unfit(block, linear, owners):
                block.dense[linear.name] = why
            else:
                linears.append(linear)
    return linears


def _unfit(block: Block, linear: Linear, owners: dict[nn.Parameter, list[str]]) -> str:
    """Return why a linear cannot be pruned, nothing where it can.

    Raises `GblmError` where its kind copies the weight, so that nothing could be written to it.
    """
    module = linear.module
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    weight = module.get_parameter("weight")
    if type(weight.data) is not Tensor and not isinstance(weight.data, FakeTensor):
        return f"its weight is a {type(weight.data).__name__}"
    if not weight.is_floating_point() or weight.itemsize < 2:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    with onload(block.module):
        matrix = linear.kind.weight(module)
        if not valueless(matrix) and matrix.data_ptr() != weight.data_ptr():
            raise GblmError(
                f"{linear.name}: its Kind copies the weight, so that no mask could be written to "
                "it; return a view"
            )
    others = [name for name in owners[weight] if name != f"{linear.name}.weight"]
    return f"shares its weight with {others[0]}" if others else ""


def _check_finite(model: nn.Module, blocks: dict[nn.Module, Block]) -> None:
    """Raise `GblmError` where a parameter holds a NaN or an Inf, within the blocks or outside."""
    for name, value in parameters(model, blocks):
        wide = value.itemsize > 1 and not valueless(value)  # narrower ones are not pruned
        if wide and not torch.isfinite(value).all():
            raise GblmError(
                f"{name} {list(value.shape)} holds a NaN or an Inf; load a sound checkpoint"
            )
