"""Blocks and linears of a model, and batches of samples."""

import fnmatch
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gblm.base import Adapter, Batch, GblmError
from gblm.machine.offload import onload
from gblm.walk.products import Matrix

# Where a tensor holds its samples: the dimension, and how many entries of it each sample has.
Carried = tuple[int, int] | None


@dataclass
class Linear:
    """A matrix `[out, in]` of a parameter, in products y = x·Wᵀ of its block.

    positions: input vectors of one sample, the most where samples differ. routed: whether it sees
    only those positions that the model sends to it. mixed: whether samples do not stand first in
    its input. repeated: whether its block uses it more than once. everywhere: whether its
    statistics are of all positions all the same. chosen: whether the user has named it.
    """

    name: str
    parameter: nn.Parameter
    matrix: Matrix
    positions: int = 0
    routed: bool = False
    mixed: bool = False
    repeated: bool = False
    everywhere: bool = False
    chosen: bool = False

    @property
    def alone(self) -> bool:
        """Whether it must see one sample at a time, so that samples can be told apart."""
        return self.routed or self.mixed

    @property
    def weight(self) -> Tensor:
        """The matrix, written through."""
        return self.matrix.view(self.parameter.detach())

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides of its parameter, which an offloaded one lacks while it is away."""
        return torch.empty(self.parameter.shape, device="meta").stride()

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}"


@dataclass
class Units:
    """Parts of a block that go or stay whole: neurons of an MLP, heads of attention.

    kind: "neurons", which are one input of the reader each, or "heads". reader: the linear whose
    inputs they make; channels `[units, size]`: which of them each does. writers: the linears that
    feed these, with their rows `[units, k]` in each unit. kept: how many stay.
    """

    kind: str
    reader: Linear
    channels: Tensor
    writers: list[tuple[Linear, Tensor]]
    kept: int = 0

    @property
    def weights(self) -> int:
        """How many weights one of them has."""
        return sum(
            places.shape[1] * linear.shape[1 - axis] for linear, axis, places in self.parts()
        )

    def parts(self) -> Iterator[tuple[Linear, int, Tensor]]:
        """Yield each linear, the dimension of its matrix they lie in, and the places of each."""
        yield self.reader, 1, self.channels
        for linear, rows in self.writers:
            yield linear, 0, rows


@dataclass
class Block:
    """The repeated unit of a model.

    `groups` are its linears in the order of use, those that see the same input together; `dense`
    names the matrices that stay dense, and why. `arguments` and `outputs` say of every leaf of what
    the block is called with, and of what it gives, where that holds the samples. stateful: whether
    its modules keep something from one run of it, which a second one in between would change.
    uncut: whether something it is called with grows with the samples, but not by as much for each.
    units: what structured pruning chooses from.
    """

    name: str
    module: nn.Module
    groups: list[list[Linear]] = field(default_factory=list)
    units: list[Units] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    arguments: list[Carried] = field(default_factory=list)
    outputs: list[Carried] = field(default_factory=list)
    stateful: bool = False
    uncut: bool = False

    @property
    def whole(self) -> bool:
        """Whether it cannot wait in the middle of a run while others go on."""
        return self.stateful or any(linear.repeated for linear in self.linears)

    @property
    def linears(self) -> list[Linear]:
        return [linear for group in self.groups for linear in group]


class Snapshot:
    """The parameters of a block at some time, to be written again."""

    def __init__(self, block: Block) -> None:
        self.owners = list(block.module.parameters())
        self.parameters = [own.detach() for own in self.owners]
        self.values = [own.clone() for own in self.parameters]
        self.versions = [own._version for own in self.parameters]

    def write(self) -> None:
        """Give the parameters their values of then; those that nobody has written stay."""
        for i, (parameter, value) in enumerate(zip(self.parameters, self.values, strict=True)):
            if parameter._version != self.versions[i]:
                parameter.copy_(value)

    def changed(self) -> bool:
        """Whether anybody has written to the parameters since."""
        return [own._version for own in self.parameters] != self.versions

    @contextmanager
    def back(self) -> Iterator[None]:
        """Have the values of then for a time, to be read alone."""
        try:
            for owner, value in zip(self.owners, self.values, strict=True):
                owner.data = value
            yield
        finally:
            for owner, now in zip(self.owners, self.parameters, strict=True):
                owner.data = now


def choose(blocks: list[Block], include: list[str], exclude: list[str]) -> None:
    """Leave linears dense that `include` does not name, or that `exclude` does.

    Both hold patterns as a shell has them (`*.down_proj`, `model.layers.0.*`); no `include` names
    all. Raises `GblmError` where a pattern matches no linear, or none is left.
    """
    names = [linear.name for block in blocks for linear in block.linears]
    matches = {pattern: matching(names, pattern) for pattern in include + exclude}
    kept = set().union(*(matches[pattern] for pattern in include)) if include else set(names)
    kept = kept.difference(*(matches[pattern] for pattern in exclude))
    if not kept:
        raise GblmError("every linear layer is excluded; exclude fewer")
    for linear in (linear for block in blocks for linear in block.linears):
        linear.chosen = bool(include) and linear.name in kept
    for block in blocks:
        left = [linear.name for linear in block.linears if linear.name not in kept]
        block.dense |= dict.fromkeys(left, "excluded")
        groups = [[linear for linear in group if linear.name in kept] for group in block.groups]
        block.groups = [group for group in groups if group]


def matching(names: list[str], pattern: str) -> set[str]:
    """Return the names a pattern stands for; the brackets of an expert's name are themselves.

    Raises `GblmError` where there are none.
    """
    shell = pattern.replace("[", "[[]")
    found = set(fnmatch.filter(names, shell))
    if not found:
        near = f"*.{pattern}" if fnmatch.filter(names, f"*.{shell}") else f"*{pattern}*"
        hint = f"did you mean '{near}'? " if fnmatch.filter(names, near.replace("[", "[[]")) else ""
        raise GblmError(
            f"no linear layer is called {pattern}; {hint}names are like {names[0]}, * stands for "
            "anything"
        )
    return found


def by_name(blocks: list[Block], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every linear by its name, that of the first key that stands for it.

    None where none does. Raises `GblmError` where a key stands for no linear.
    """
    names = [linear.name for block in blocks for linear in block.linears]
    found: dict[str, Any] = {}
    for key, value in values.items():
        for name in matching(names, key):
            found.setdefault(name, value)
    return {name: found.get(name) for name in names}


def parameters(model: nn.Module, blocks: Collection[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a model with its name, on the device meanwhile."""
    within = {module for block in blocks for module in block.modules()} - set(blocks)
    for name, module in model.named_modules():
        if module not in within:
            with onload(module):  # all of a block at once, of another module what is its own
                yield from module.named_parameters(name, recurse=module in blocks)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Have the model in evaluation mode, without gradients of its parameters, for a time."""
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
    """Keep the given hook handles for a time."""
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def joined(batches: Iterable[Batch], samples: int | None = None) -> Batch:
    """Return the samples of several batches as one, so many of them at most.

    What is shorter than others in a dimension is filled up with 0 at its end, labels with −100.
    Raises `GblmError` where there is no batch, or what is given is none.
    """
    parts, held = list[Batch](), 0
    for batch in batches:
        tensors = isinstance(batch, Mapping) and all(isinstance(x, Tensor) for x in batch.values())
        if not tensors or not batch:
            raise GblmError(
                f"{type(batch).__name__} is no batch of samples; give a dict of tensors [n, …], or "
                "some of them"
            )
        parts.append(dict(batch))
        held += size(parts[-1])
        if samples is not None and held >= samples:
            break
    if not parts:
        raise GblmError("the calibration data hold no sample; give one or more")
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        most = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
        fill = -100 if name == "labels" else 0
        whole[name] = values[0].new_full((sum(map(len, values)), *most), fill)
        rows = whole[name].split([len(value) for value in values])
        for row, value in zip(rows, values, strict=True):
            row[(slice(None), *(slice(0, n) for n in value.shape[1:]))] = value
    return take(whole, slice(0, samples))


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
class MicroBatch:
    """Samples that go together, and their numbers in the batch they come from."""

    batch: Batch
    numbers: list[int]


def micro_batches(batch: Batch, most: int, adapter: Adapter) -> list[MicroBatch]:
    """Return a batch as parts of at most so many samples, without padding.

    Samples of one shape stand together, in their order.
    """
    singles = adapter.unpad(batch)
    if singles is None:
        numbers = [*range(size(batch))]
        starts = range(0, len(numbers), most)
        return [MicroBatch(take(batch, slice(i, i + most)), numbers[i : i + most]) for i in starts]
    alike: dict[tuple, list[int]] = defaultdict(list)
    for i, single in enumerate(singles):
        alike[tuple(value.shape for value in single.values())].append(i)
    groups = [same[i : i + most] for same in alike.values() for i in range(0, len(same), most)]
    return [
        MicroBatch({name: torch.cat([singles[i][name] for i in group]) for name in batch}, group)
        for group in groups
        for batch in [singles[group[0]]]
    ]
