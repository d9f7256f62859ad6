"""What short runs tell of a model: its blocks, linears, and the order of use.

A run of one sample shows the blocks in their order and the linears that each uses. A run of the
same sample twice shows along which dimension tensors hold the samples. Runs of other samples show
which linears see only some of the positions, as those of routed experts do.
"""

import importlib.metadata
import math
from collections import Counter, defaultdict
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten

from gblm.base import Adapter, Batch, GblmError, reason
from gblm.machine.device import memory_errors, out_of_memory
from gblm.machine.offload import onload
from gblm.maths import stats
from gblm.walk.blocks import (
    Block,
    Carried,
    Linear,
    frozen,
    hooked,
    micro_batches,
    parameters,
    size,
    to_device,
)
from gblm.walk.products import CONVOLUTIONS, Matrix, Products, Use, depthwise, valueless

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

    A block that is used more than once stays dense, and the first block names it. Raises
    `GblmError` where the model has no blocks or no linears in them that can be pruned, or has a NaN
    or an Inf in a parameter.
    """
    blocks = {module: Block(name, module) for name, module in adapter.blocks(model).items()}
    if not blocks:
        raise GblmError(
            f"no blocks found in {type(model).__name__}; pass an Adapter that names them"
        )
    with memory_errors():
        _check_finite(model, blocks)
        found = {module: Found(block) for module, block in blocks.items()}
        runs, repeated = _runs(model, batch, adapter, found)
    runs = [[visit for visit in run if visit.module not in repeated] for run in runs]
    ordered = [blocks[visit.module] for visit in runs[0]]
    modules = [block.module for block in ordered]
    if any([visit.module for visit in run] != modules for run in runs):
        raise GblmError(
            "some samples come to other blocks than others; a model that chooses its blocks by the "
            "sample cannot be pruned"
        )
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[parameter].append(name)
    for i, block in enumerate(ordered):
        once, twice = runs[0][i], runs[1][i]
        block.arguments = _carried(once.arguments, twice.arguments)
        block.outputs = _carried(once.outputs, twice.outputs)
        pairs = zip(block.arguments, once.arguments, twice.arguments, strict=False)
        block.uncut = any(place is None and one != two for place, one, two in pairs)
        others = [visit for run in runs[2:] for visit in run if visit.module is block.module]
        with onload(block.module):
            linears = found[block.module].linears_of(owners)
        _describe(block, linears, [once, *others], twice)
        for linear in linears:
            linear.everywhere = linear.routed and adapter.everywhere is not nullcontext
    again = dict.fromkeys((blocks[module].name for module in repeated), "used more than once")
    if not any(block.groups for block in ordered):
        if again:
            raise GblmError(
                f"block {next(iter(again))} is used more than once; its weights cannot be solved "
                "block by block; choose a model whose layers are its own"
            )
        raise GblmError(f"no linear layers to prune in the blocks of {type(model).__name__}")
    ordered[0].dense |= again
    return ordered


@dataclass
class _Visit:
    """One call of a block: the shapes of its arguments and outputs, the uses of its linears.

    uses: how often each linear is used; rows: the shape of its input, but for the features;
    groups: those with the same input, by what tells it, and the input itself.
    """

    module: nn.Module
    arguments: Shapes
    outputs: Shapes = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)
    rows: dict[str, torch.Size] = field(default_factory=dict)
    groups: dict[tuple, list[Linear]] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)


class Found:
    """The linears of a block that have been seen, and what else uses its parameters."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.linears: dict[tuple[str, Matrix], Linear] = {}
        self.others: dict[str, str] = {}  # by parameter, what they are
        self.names = {own: name for name, own in block.module.named_parameters()}

    def linear(self, parameter: nn.Parameter, matrix: Matrix) -> Linear:
        """Return the linear of a matrix, new where it has not been seen."""
        name = self.names[parameter]
        if (name, matrix) not in self.linears:
            title = self._title(name) + matrix.index(parameter)
            self.linears[name, matrix] = Linear(title, parameter, matrix)
        return self.linears[name, matrix]

    def _title(self, name: str) -> str:
        """Return what a parameter is called: by its module where that has one matrix, `weight`."""
        module = name.partition(".parametrizations.")[0].removesuffix("weight_orig")
        return f"{self.block.name}.{module.removesuffix('weight')}".rstrip(".")

    def linears_of(self, owners: dict[nn.Parameter, list[str]]) -> list[Linear]:
        """Return the linears that can be pruned; names the other matrices of the block as dense.

        Of a parameter that holds a matrix for each expert, those that no sample has come to are
        linears as well. They have the order of the parameters.
        """
        linears = []
        for parameter, name in self.names.items():
            if parameter.squeeze().ndim < 2:
                continue
            seen = [matrix for known, matrix in self.linears if known == name]
            title = self._title(name)
            if not seen:
                why = self.others.get(name, "not used by its block")
                self.block.dense[title] = _unfit(parameter) or why
            elif why := (
                _unfit(parameter)
                or _adapter(name)
                or self._shared(owners[parameter])
                or _overlap(parameter, seen)
            ):
                self.block.dense[title] = why
            else:
                every = _experts(parameter, seen) if parameter.ndim > 2 else seen
                linears += [self.linear(parameter, matrix) for matrix in every]
        return linears

    def _shared(self, owners: list[str]) -> str:
        """Return that a parameter is used outside of the block as well, where it is."""
        others = [name for name in owners if not name.startswith(f"{self.block.name}.")]
        return f"shares its weight with {others[0]}" if others else ""


def _adapter(name: str) -> str:
    """Return that a parameter is one of a low-rank adapter of peft, where it is."""
    return "a matrix of a LoRA adapter" if ".lora_" in name else ""


def _experts(parameter: Tensor, seen: list[Matrix]) -> list[Matrix]:
    """Return the matrices of all experts, where some have been seen, each within one expert."""
    experts, stride = len(parameter), parameter.stride(0)
    if any(matrix.offset // stride != matrix.last // stride for matrix in seen):
        return seen
    within = dict.fromkeys((x.offset % stride, x.shape, x.stride) for x in seen)
    return [
        Matrix(i * stride + offset, shape, strides)
        for offset, shape, strides in within
        for i in range(experts)
    ]


def _overlap(parameter: Tensor, seen: list[Matrix]) -> str:
    """Return that the matrices of a parameter share some of its elements, where they do."""
    if len(seen) == 1:
        return ""
    counts = torch.zeros(parameter.numel(), dtype=torch.uint8)
    for matrix in seen:
        counts.as_strided(matrix.shape, matrix.stride, matrix.offset).add_(1)
    return "used by products with parts of it that overlap" if counts.max() > 1 else ""


class _Watch(Products):
    """Notes what a run of the model does with its blocks and their parameters."""

    def __init__(self, found: dict[nn.Module, Found]) -> None:
        super().__init__(())
        self.found, self.visits = found, list[_Visit]()
        self.repeated: dict[nn.Module, None] = {}
        self.multiplied = False  # whether the function at work is a product of a parameter
        self.hooks: list[Any] = []
        for module in found:
            self.hooks.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self.leave))

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if any(visit.module is module for visit in self.visits):
            self.repeated[module] = None
        self.visits.append(_Visit(module, _shapes((args, kwargs))))
        self.tensors = {own.untyped_storage()._cdata: own for own in self.found[module].names}
        self.attributes = _attributes(module)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        visit = self.visits[-1]
        visit.outputs = _shapes(output)
        visit.inputs.clear()
        self.tensors = {}
        now = _attributes(module)
        if any(now.get(key) is not value for key, value in self.attributes.items()):
            self.found[module].block.stateful = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.multiplied = False
        output = super().__torch_function__(func, types, args, kwargs)
        if self.tensors and not self.multiplied:
            self._note_other(func, (args, kwargs), output)
        return output

    def _note_other(self, func: Any, arguments: Any, output: Any) -> None:
        """Note a function that makes something else of a parameter."""
        made = [own for own in tree_flatten(output)[0] if isinstance(own, Tensor)]
        if not any(own.is_floating_point() and not self.knows(own) for own in made):
            return
        found = self.found[self.visits[-1].module]
        for leaf in filter(self.knows, tree_flatten(arguments)[0]):
            parameter = self.tensors[leaf.untyped_storage()._cdata]
            assert isinstance(parameter, nn.Parameter)
            name = found.names[parameter]
            alone = func in CONVOLUTIONS and depthwise(parameter)
            other = f"used by {getattr(func, '__name__', func)}, not in a product"
            found.others.setdefault(name, "a depthwise kernel" if alone else other)

    def linear(self, weight: Tensor) -> Linear | None:
        parameter = self.tensors.get(weight.untyped_storage()._cdata)
        if not isinstance(parameter, nn.Parameter) or weight.ndim != 2:
            return None
        return self.found[self.visits[-1].module].linear(parameter, Matrix.of(weight, parameter))

    def before(self, linear: Linear, use: Use) -> None:
        visit, name = self.visits[-1], linear.name
        self.multiplied = True
        visit.uses[name] += 1
        if visit.uses[name] == 1:
            visit.rows[name] = use.x.shape[:-1]
            visit.groups.setdefault(use.input_key(), []).append(linear)
            visit.inputs.append(use.input)  # so that no other input takes its place in memory


def _attributes(module: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    """Return what the modules of a block hold beside parameters and buffers."""
    return {(own, name): value for own in module.modules() for name, value in vars(own).items()}


def _shapes(value: Any) -> Shapes:
    leaves = tree_flatten(value)[0]
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]


def _runs(
    model: nn.Module, batch: Batch, adapter: Adapter, found: dict[nn.Module, Found]
) -> tuple[list[list[_Visit]], dict[nn.Module, None]]:
    """Return the visits of runs of the longest sample, of it twice, and of others.

    And the blocks that a run has used more than once.

    One other at least, and more while a parameter has not been used, and each brings news.
    """
    device = next(model.parameters()).device
    singles = [part.batch for part in micro_batches(batch, 1, adapter)]
    singles.sort(key=lambda single: -sum(value.numel() for value in single.values()))
    first, *others = singles[: OTHERS + 1]
    double = {name: torch.cat([value, value]) for name, value in first.items()}
    runs, repeated = [], dict[nn.Module, None]()
    for i, samples in enumerate([first, double, *others]):
        known = sum(len(own.linears) for own in found.values())
        watch = _Watch(found)
        with ExitStack() as stack:
            for module in found:
                stack.enter_context(adapter.everywhere(module))
            with frozen(model), torch.no_grad(), hooked(watch.hooks), watch:
                try:
                    adapter.trunk(model, to_device(samples, device))
                except RuntimeError as error:
                    if size(batch) == 1 or out_of_memory(error):
                        raise
                    raise GblmError(
                        f"{type(model).__name__} does not run on one sample of the batch "
                        f"({reason(error)}); give batches whose tensors hold the samples in their "
                        "first dimension"
                    ) from error
        runs.append(watch.visits)
        repeated |= watch.repeated
        news = sum(len(own.linears) for own in found.values()) > known
        if i > 1 and not any(_unused(own) for own in found.values()):
            break
        if i > 1 + FRUITLESS and not news:
            break
    return runs, repeated


def _unused(found: Found) -> bool:
    """Say whether some matrix of a block has not been seen in any use."""
    seen = {name for name, _ in found.linears} | {*found.others}
    matrices = {name for own, name in found.names.items() if own.squeeze().ndim > 1}
    return not matrices <= seen


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
        by_shape: dict[tuple, set[int]] = defaultdict(set)  # positions, of samples that are alike
        for visit in visits:
            rows = visit.rows.get(name)
            by_shape[tuple(visit.arguments)].add(rows.numel() if rows is not None else 0)
        uses = [visit.uses[name] for visit in visits]
        counts = {count for own in by_shape.values() for count in own}
        linear.positions, linear.repeated = max(counts) * max(uses), max(uses) > 1
        one, two = visits[0].rows.get(name), double.rows.get(name)
        whole = math.prod(linear.shape) == linear.parameter.numel()
        expert = (
            not whole
            and linear.parameter.ndim > 2
            and any(len(visit.rows.get(name, ())) == 1 for visit in visits)
        )
        linear.routed = expert or 0 in uses or any(len(own) > 1 for own in by_shape.values())
        linear.mixed = one is not None and two is not None and _mixed(one, two)
        if one is not None and one == two and one.numel():
            block.dense[name] = "sees no samples"
    pruned = {linear.name for linear in linears} - block.dense.keys()
    runs = [[[x for x in g if x.name in pruned] for g in visit.groups.values()] for visit in visits]
    block.groups = _ordered([[g for g in run if g] for run in runs], [x.name for x in linears])
    grouped = {linear.name for linear in block.linears}
    unseen = [linear for linear in linears if linear.name in pruned - grouped]
    block.groups += [[linear] for linear in unseen]


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


def _unfit(parameter: nn.Parameter) -> str:
    """Return why the matrices of a parameter cannot be pruned, nothing where they can."""
    data = parameter.data
    if type(data) is not Tensor and not isinstance(data, FakeTensor):
        return f"its weight is a {type(data).__name__}"
    if not parameter.is_floating_point() or parameter.itemsize < 2:
        return f"its weight is {str(parameter.dtype).removeprefix('torch.')}"
    return ""


def _check_finite(model: nn.Module, blocks: dict[nn.Module, Block]) -> None:
    """Raise `GblmError` where a parameter holds a NaN or an Inf, within the blocks or outside."""
    for name, value in parameters(model, blocks):
        wide = value.itemsize > 1 and not valueless(value)  # narrower ones are not pruned
        if wide and not stats.is_finite(value):
            raise GblmError(
                f"{name} {list(value.shape)} holds a NaN or an Inf; load a sound checkpoint"
            )
