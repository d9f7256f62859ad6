"""What short runs tell of a model: its blocks, linears, and the order of use.

A run of one sample shows the blocks in their order and the linears that each uses. A run of the
same sample twice shows along which dimension tensors hold the samples. Runs of other samples show
which linears see only some of the positions, as those of routed experts do.
"""

import fnmatch
import importlib.metadata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten

from gblm.base import Adapter, Batch, GblmError, Kind
from gblm.machine.device import MicroBatch
from gblm.machine.offload import onload

OTHERS = 16  # samples at most that are tried until every linear of a block has been used,
FRUITLESS = 3  # and the fewest before one that brings nothing new is the last

# Where a tensor holds its samples: the dimension, and how many entries of it each sample has.
Carried = tuple[int, int] | None


@dataclass
class Linear:
    """One prunable weight, seen as a matrix `[out, in]`.

    positions: input vectors of one sample, the most where samples differ. routed: whether it sees
    only those positions that the model sends to it.
    """

    name: str
    module: nn.Module
    kind: Kind
    positions: int = 0
    routed: bool = False

    @property
    def weight(self) -> Tensor:
        return self.kind.weight(self.module).detach()

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter("weight")

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.weight.shape
        return outputs, inputs

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}"

    def rows(self, value: Tensor) -> Tensor:
        """Return an input or output of the module as `[samples, …, features]`."""
        return value.movedim(self.kind.features, -1)


@dataclass
class Block:
    """The repeated unit of a model.

    `groups` are its linears in the order of use, those that see the same input together; `dense`
    names the linears that stay dense, and why. `arguments` and `outputs` say of every leaf of what
    the block is called with, and of what it gives, where that holds the samples.
    """

    name: str
    module: nn.Module
    groups: list[list[Linear]] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    arguments: list[Carried] = field(default_factory=list)
    outputs: list[Carried] = field(default_factory=list)

    @property
    def linears(self) -> list[Linear]:
        return [linear for group in self.groups for linear in group]


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


def take(batch: Batch, samples: slice) -> Batch:
    """Return some samples of a batch."""
    return {name: value[samples] for name, value in batch.items()}


def size(batch: Batch) -> int:
    """Return the number of samples of a batch."""
    return len(next(iter(batch.values())))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def check_samples(batch: Batch) -> None:
    """Raise `GblmError` where a batch holds no sample, or its tensors other numbers of them."""
    if not batch or not size(batch):
        raise GblmError("the calibration batch holds no sample; give one or more")
    if wrong := [name for name, value in batch.items() if len(value) != size(batch)]:
        raise GblmError(
            f"the calibration batch holds {size(batch)} samples, but {len(batch[wrong[0]])} of "
            f"{wrong[0]}; every tensor has the samples first"
        )


@dataclass
class Part:
    """Samples that go together, and their numbers in the batch they come from."""

    batch: Batch
    numbers: list[int]


def cut(batch: Batch, most: int, adapter: Adapter) -> list[Part]:
    """Return a batch as parts of at most so many samples, without padding.

    Samples of one shape stand together, in their order.
    """
    singles = adapter.unpad(batch)
    if singles is None:
        starts = range(0, size(batch), most)
        parts = [take(batch, slice(start, start + most)) for start in starts]
        return [Part(x, [*range(i, i + size(x))]) for i, x in zip(starts, parts, strict=True)]
    alike: dict[tuple, list[int]] = defaultdict(list)
    for i, single in enumerate(singles):
        alike[tuple(value.shape for value in single.values())].append(i)
    numbers = [same[i : i + most] for same in alike.values() for i in range(0, len(same), most)]
    return [
        Part({name: torch.cat([singles[i][name] for i in own]) for name in singles[own[0]]}, own)
        for own in numbers
    ]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode with frozen parameters, and back at the end."""
    training = {module: module.training for module in model.modules()}
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, mode in learning.items():
            parameter.requires_grad_(mode)


@contextmanager
def hooked(hooks: Iterable[Any]) -> Iterator[None]:
    """Keep the given hook handles for the time of a run."""
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def survey(model: nn.Module, batch: Batch, adapter: Adapter) -> list[Block]:
    """Return the blocks of the model in the order of use, as short runs find them.

    Raises `GblmError` where the model has no blocks or no linears in them that can be pruned, uses
    a block more than once, or has a NaN or an Inf in a parameter.
    """
    names = {module: name for name, module in adapter.blocks(model).items()}
    if not names:
        raise GblmError(
            f"no blocks found in {type(model).__name__}; pass an Adapter that names them"
        )
    _check_finite(model, names)
    blocks = {module: Block(name, module) for module, name in names.items()}
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[parameter].append(name)
    linears = {module: _linears(block, adapter, owners) for module, block in blocks.items()}
    runs = _runs(model, batch, adapter, blocks, linears)
    once, twice, others = runs[0], runs[1], [runs[0], *runs[2:]]
    ordered = [blocks[visit.module] for visit in once]
    for i, block in enumerate(ordered):
        block.arguments = _carried(once[i].arguments, twice[i].arguments)
        block.outputs = _carried(once[i].outputs, twice[i].outputs)
        visits = [visit for run in others for visit in run if visit.module is block.module]
        _group(
            block,
            linears[block.module],
            visits,
            {use.linear.name: use.positions for use in twice[i].uses},
        )
        block.dense.update(_experts(block))
    if not any(block.groups for block in ordered):
        raise GblmError(f"no linears to prune in the blocks of {type(model).__name__}")
    return ordered


def _runs(
    model: nn.Module,
    batch: Batch,
    adapter: Adapter,
    blocks: dict[nn.Module, Block],
    linears: dict[nn.Module, list[Linear]],
) -> list[list["_Visit"]]:
    """Return the visits of runs of the longest sample, of it twice, and of others.

    One other at least, and more while some linear has not been used and each brings news.
    """
    device = next(model.parameters()).device
    singles = [part.batch for part in cut(batch, 1, adapter)]
    singles.sort(key=lambda single: -sum(value.numel() for value in single.values()))
    first, *others = [to_device(single, device) for single in singles[: OTHERS + 1]]
    double = {name: torch.cat([value, value]) for name, value in first.items()}
    runs = [_visits(model, samples, adapter, blocks, linears) for samples in (first, double)]
    unused = {linear.name for within in linears.values() for linear in within}
    unused -= _used(runs[0])
    for i, other in enumerate(others):
        runs.append(_visits(model, other, adapter, blocks, linears))
        new = unused & _used(runs[-1])
        unused -= new
        if not unused or (i >= FRUITLESS and not new):
            break
    return runs


def _used(run: list["_Visit"]) -> set[str]:
    return {use.linear.name for visit in run for use in visit.uses}


def _carried(one: list[torch.Size | None], two: list[torch.Size | None]) -> list[Carried]:
    """Return where the leaves hold the samples: along the one dimension that has doubled."""
    found: list[Carried] = []
    for shape, double in zip(one, two, strict=False):
        grown = [
            (dim, shape[dim])
            for dim in range(len(shape or ()))
            if shape and double and len(shape) == len(double) and double[dim] == 2 * shape[dim]
        ]
        found.append(grown[0] if len(grown) == 1 else None)
    return found


def _group(
    block: Block, linears: list[Linear], visits: list["_Visit"], doubled: dict[str, int]
) -> None:
    """Group the linears of a block by their inputs, in the order of use; name those left dense."""
    single = {use.linear.name: use.positions for use in visits[0].uses}
    for linear in linears:
        counts = [Counter(use.linear.name for use in visit.uses)[linear.name] for visit in visits]
        uses = [use for visit in visits for use in visit.uses if use.linear is linear]
        linear.positions = max((use.positions for use in uses), default=0)
        linear.routed = 0 in counts or _differ(visits, linear)
        if not uses:
            block.dense[linear.name] = "not used by its block"
        elif max(counts) > 1:
            block.dense[linear.name] = "used more than once by its block"
        elif linear.name in doubled and doubled[linear.name] == single.get(linear.name):
            block.dense[linear.name] = "sees no samples"
    block.groups = _ordered(
        [
            [[x for x in group if x.name not in block.dense] for group in visit.groups()]
            for visit in visits
        ],
        [linear.name for linear in linears],
    )


def _ordered(runs: list[list[list[Linear]]], names: list[str]) -> list[list[Linear]]:
    """Return the groups of all runs, each before those that come after it in some run.

    Where no run tells, the order is that of the names.
    """
    groups: dict[str, list[Linear]] = {}  # by each of its linears
    later: dict[str, set[str]] = defaultdict(set)  # names of groups, by their first linears
    for run in runs:
        before: set[str] = set()
        for group in run:
            if new := [x for x in group if x.name not in groups]:
                groups |= dict.fromkeys((x.name for x in new), new)
            for name in dict.fromkeys(groups[x.name][0].name for x in group):
                later[name] |= before - {name}
                before.add(name)
    ordered: list[str] = []
    while left := [name for name in names if name in later and name not in ordered]:
        free = [name for name in left if later[name] <= {*ordered}]
        ordered.append((free or left)[0])
    return [groups[name] for name in ordered]


def _differ(visits: list["_Visit"], linear: Linear) -> bool:
    """Whether samples of one shape show a linear different numbers of positions."""
    by_shape: dict[tuple, set[int]] = defaultdict(set)
    for visit in visits:
        for use in visit.uses:
            if use.linear is linear:
                by_shape[tuple(visit.arguments)].add(use.positions)
    return any(len(positions) > 1 for positions in by_shape.values())


def choose(blocks: list[Block], include: list[str], exclude: list[str]) -> None:
    """Leave linears dense that `include` does not name, or that `exclude` does.

    Both hold patterns as a shell has them (`*.down_proj`, `model.layers.0.*`); no `include` names
    all. Raises `GblmError` where a pattern matches no linear, or none is left.
    """
    names = [linear.name for block in blocks for linear in block.linears]
    for pattern in include + exclude:
        if not fnmatch.filter(names, pattern):
            raise GblmError(
                f"no linear is called {pattern}; names are like {names[0]}, * stands for anything"
            )
    for block in blocks:
        for linear in block.linears:
            named = not include or any(fnmatch.fnmatch(linear.name, p) for p in include)
            if not named or any(fnmatch.fnmatch(linear.name, p) for p in exclude):
                block.dense[linear.name] = "excluded"
        groups = [[x for x in group if x.name not in block.dense] for group in block.groups]
        block.groups = [group for group in groups if group]
    if not any(block.groups for block in blocks):
        raise GblmError("every linear is excluded; exclude fewer")


@dataclass
class _Use:
    """One call of a linear; uses of one group have the same input tensor."""

    linear: Linear
    group: int
    positions: int


@dataclass
class _Visit:
    """One call of a block: the shapes of its arguments and outputs, the uses of its linears."""

    module: nn.Module
    arguments: list[torch.Size | None]
    outputs: list[torch.Size | None] = field(default_factory=list)
    uses: list[_Use] = field(default_factory=list)

    def groups(self) -> list[list[Linear]]:
        """Return the linears by their inputs, in the order of use."""
        groups: dict[int, list[Linear]] = defaultdict(list)
        for use in self.uses:
            groups[use.group].append(use.linear)
        return list(groups.values())


class _Watch:
    """Notes what a run of the model does with its blocks and linears."""

    def __init__(self, blocks: dict[nn.Module, Block]) -> None:
        self.blocks = blocks
        self.visits: list[_Visit] = []
        self.inputs: list[Tensor] = []  # of every group of the block that runs now

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if any(visit.module is module for visit in self.visits):
            name = self.blocks[module].name
            raise GblmError(f"block {name} is used more than once; it cannot be pruned")
        self.visits.append(_Visit(module, _shapes((args, kwargs))))
        self.inputs.clear()

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.visits[-1].outputs = _shapes(output)

    def use(self, linear: Linear, x: Tensor) -> None:
        group = next((i for i, other in enumerate(self.inputs) if other is x), len(self.inputs))
        if group == len(self.inputs):
            self.inputs.append(x)
        positions = linear.rows(x).shape[:-1].numel()
        self.visits[-1].uses.append(_Use(linear, group, positions))


def _visits(
    model: nn.Module,
    batch: Batch,
    adapter: Adapter,
    blocks: dict[nn.Module, Block],
    linears: dict[nn.Module, list[Linear]],
) -> list[_Visit]:
    """Return what a run of the model does with its blocks and linears."""
    watch = _Watch(blocks)
    hooks: list[Any] = []
    for module in blocks:
        hooks.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(watch.leave))
    for linear in (linear for within in linears.values() for linear in within):
        hooks.append(
            linear.module.register_forward_pre_hook(
                lambda module, args, linear=linear: watch.use(linear, args[0])
            )
        )
    with quiet(model), torch.no_grad(), hooked(hooks):
        MicroBatch(size(batch)).run(lambda samples: adapter.trunk(model, batch))
    return watch.visits


def _shapes(value: Any) -> list[torch.Size | None]:
    leaves = tree_flatten(value)[0]
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]


def _experts(block: Block) -> dict[str, str]:
    """Return the weights of a block that hold a matrix per expert, which are not pruned."""
    return {
        f"{block.name}.{name}": "a tensor of expert matrices, seen as no linear"
        for name, parameter in block.module.named_parameters()
        if parameter.ndim == 3 and min(parameter.shape) > 1
    }


def valueless(tensor: Tensor) -> bool:
    """Say whether a tensor is a shape alone: on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _linears(block: Block, adapter: Adapter, owners: dict[nn.Parameter, list[str]]) -> list[Linear]:
    """Return the linears of a block that can be pruned; names the others as dense."""
    linears = []
    for inner, module in block.module.named_modules():
        if kind := adapter.kind(module):
            name = f"{block.name}.{inner}" if inner else block.name
            linear = Linear(name, module, kind)
            if why := _unfit(block, linear, owners):
                block.dense[name] = why
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
        seen = linear.kind.weight(module)
        if not valueless(seen) and seen.data_ptr() != weight.data_ptr():
            raise GblmError(
                f"{linear.name}: its Kind copies the weight, so that no mask could be written to "
                "it; return a view"
            )
    others = [name for name in owners[weight] if name != f"{linear.name}.weight"]
    return f"shares its weight with {others[0]}" if others else ""


def parameters(model: nn.Module, blocks: Collection[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a model with its name, on the device meanwhile."""
    within = {module for block in blocks for module in block.modules()} - set(blocks)
    for name, module in model.named_modules():
        if module not in within:
            with onload(module):  # all of a block at once, of another module what is its own
                yield from module.named_parameters(name, recurse=module in blocks)


def _check_finite(model: nn.Module, blocks: Collection[nn.Module]) -> None:
    """Raise `GblmError` where a parameter holds a NaN or an Inf, within the blocks or outside."""
    for name, value in parameters(model, blocks):
        wide = value.itemsize > 1 and not valueless(value)  # narrower ones are not pruned
        if wide and not torch.isfinite(value).all():
            raise GblmError(
                f"{name} {list(value.shape)} holds a NaN or an Inf; load a sound checkpoint"
            )
