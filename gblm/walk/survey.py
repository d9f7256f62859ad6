"""What runs of one and two samples tell of a model: its blocks, linears, and the order of use."""

import fnmatch
import importlib.metadata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten

from gblm.base import Adapter, Batch, GblmError, Kind
from gblm.machine import processes
from gblm.machine.device import MicroBatch
from gblm.machine.offload import here

# A micro-batch of about this many positions keeps a CPU's caches and a GPU's cores busy.
POSITIONS = {"cpu": 2048, "cuda": 32768}


@dataclass
class Linear:
    """One prunable weight, seen as a matrix `[out, in]`."""

    name: str
    module: nn.Module
    kind: Kind
    positions: int = 0  # input vectors of one sample

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
    names the linears that stay dense, and why. `leading` holds the first dimension of every tensor
    the block is called with, None for other values.
    """

    name: str
    module: nn.Module
    groups: list[list[Linear]] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    leading: list[int | None] = field(default_factory=list)

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


def take(batch: Batch, chosen: slice) -> Batch:
    """Return the chosen samples of a batch."""
    return {name: value[chosen] for name, value in batch.items()}


def size(batch: Batch) -> int:
    """Return the number of samples of a batch."""
    return len(next(iter(batch.values())))


def placed(batch: Batch, model: nn.Module) -> Batch:
    """Return the batch on the model's device; raises `GblmError` where it holds no sample."""
    if not batch or not size(batch):
        raise GblmError("the calibration batch holds no sample; give one or more")
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


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
    """Return the blocks of the model in the order of use, as runs of one and two samples find them.

    Raises `GblmError` where the model has no blocks or no linears in them that can be pruned, uses
    a block more than once, or has a NaN or an Inf in a parameter.
    """
    names = {module: name for name, module in adapter.blocks(model).items()}
    if not names:
        raise GblmError(
            f"no blocks found in {type(model).__name__}; pass an Adapter that names them"
        )
    linears = {module: _linears(name, module, adapter) for module, name in names.items()}
    _check_finite(model, names)
    first = take(batch, slice(0, 1))
    twice = {name: torch.cat([value, value]) for name, value in first.items()}
    once = _visits(model, first, adapter, names, linears)
    again = _visits(model, twice, adapter, names, linears)
    # The parameter, not its memory: that of an offloaded block is elsewhere now.
    owners = Counter(linear.parameter for found in linears.values() for linear in found)
    blocks = []
    for visit, other in zip(once, again, strict=True):
        block = Block(names[visit.module], visit.module, leading=visit.leading)
        grown = {use.linear.name: use.positions for use in other.uses}
        uses = Counter(use.linear.name for use in visit.uses)
        for linear in linears[visit.module]:
            if not uses[linear.name]:
                block.dense[linear.name] = "not used by its block"
            elif uses[linear.name] > 1:
                block.dense[linear.name] = "used more than once by its block"
            elif owners[linear.parameter] > 1:
                block.dense[linear.name] = "shares its weight with another linear"
        groups: dict[int, list[Linear]] = {}
        for use in visit.uses:
            if use.linear.name in block.dense:
                continue
            if grown.get(use.linear.name) == use.positions:
                block.dense[use.linear.name] = "sees no samples"
                continue
            use.linear.positions = use.positions
            groups.setdefault(use.group, []).append(use.linear)
        block.groups = list(groups.values())
        block.dense.update(_experts(block))
        blocks.append(block)
    if not any(block.groups for block in blocks):
        raise GblmError(f"no linears to prune in the blocks of {type(model).__name__}")
    return blocks


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
    """One call of a block: the first dimensions of its arguments, the uses of its linears."""

    module: nn.Module
    leading: list[int | None]
    uses: list[_Use] = field(default_factory=list)


def _visits(
    model: nn.Module,
    batch: Batch,
    adapter: Adapter,
    names: dict[nn.Module, str],
    linears: dict[nn.Module, list[Linear]],
) -> list[_Visit]:
    """Return what a run of the model does with its blocks and linears."""
    visits: list[_Visit] = []
    inputs: list[Tensor] = []  # of every group of the block that runs now

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if any(visit.module is module for visit in visits):
            raise GblmError(f"block {names[module]} is used more than once; it cannot be pruned")
        leaves, _ = tree_flatten((args, kwargs))
        leading = [len(v) if isinstance(v, Tensor) and v.ndim else None for v in leaves]
        visits.append(_Visit(module, leading))
        inputs.clear()

    def see(linear: Linear) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0]
            group = next((i for i, other in enumerate(inputs) if other is x), len(inputs))
            if group == len(inputs):
                inputs.append(x)
            positions = linear.rows(x).shape[:-1].numel()
            visits[-1].uses.append(_Use(linear, group, positions))

        return linear.module.register_forward_pre_hook(hook)

    with quiet(model), torch.no_grad(), ExitStack() as stack:
        hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in names]
        hooks += [see(linear) for found in linears.values() for linear in found]
        stack.enter_context(hooked(hooks))
        MicroBatch(size(batch)).run(lambda samples: adapter.trunk(model, batch))
    return visits


def _experts(block: Block) -> dict[str, str]:
    """Return the weights of a block that hold a matrix per expert, which are not pruned."""
    return {
        f"{block.name}.{name}": "a tensor of expert matrices, seen as no linear"
        for name, parameter in block.module.named_parameters()
        if parameter.ndim == 3 and min(parameter.shape) > 1
    }


def micro_batch(
    blocks: list[Block], samples: int, fixed: int | None, device: torch.device | None = None
) -> MicroBatch:
    """Return the micro-batch the user fixed, None for one of about `POSITIONS` positions.

    device: that of the blocks where None.
    """
    if fixed is not None:
        if fixed < 1:
            raise GblmError(f"micro-batches of {fixed} samples are none; use 1 or more, or auto")
        return MicroBatch(fixed)
    linears = [linear for block in blocks for linear in block.linears]
    device = device or linears[0].weight.device
    wanted = POSITIONS.get(device.type, POSITIONS["cuda"])
    wanted //= max(linear.positions for linear in linears)
    # Processes that begin anew by themselves would wait for each other in different places.
    return MicroBatch(max(1, min(samples, wanted)), auto=processes.world() == 1)


def valueless(tensor: Tensor) -> bool:
    """Say whether a tensor is a shape alone: on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _linears(name: str, block: nn.Module, adapter: Adapter) -> list[Linear]:
    return [
        Linear(f"{name}.{inner}" if inner else name, module, kind)
        for inner, module in block.named_modules()
        if (kind := adapter.kind(module))
    ]


def _check_finite(model: nn.Module, blocks: Collection[nn.Module]) -> None:
    """Raise `GblmError` where a parameter holds a NaN or an Inf, within the blocks or outside."""
    within = {module for block in blocks for module in block.modules()} - set(blocks)
    for name, module in model.named_modules():
        if module in within:
            continue
        with here(module):  # all of a block at once, of another module what is its own
            for own, value in module.named_parameters(name, recurse=module in blocks):
                if not valueless(value) and not torch.isfinite(value).all():
                    raise GblmError(
                        f"{own} {list(value.shape)} holds a NaN or an Inf; load a sound checkpoint"
                    )
