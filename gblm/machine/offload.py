"""Offloading: weights that live in main memory or on disk, and come to the device block by block.

The parameters of a model are cut into units: each block, and each embedding or linear outside of
the blocks; what little is left stays on the device. While a unit is away its parameters hold NaN,
in the memory of a single number, so that whatever would use them by mistake is found out. Hooks
bring a unit to the device when its module runs, read the next one meanwhile, and put back what has
changed when it is done.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gblm.machine.device import free_memory
from gblm.machine.files import read_tensors, write_tensors

log = logging.getLogger(__name__)

OFFLOADS = ("auto", "none", "cpu", "disk")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
AGAIN = "check its disk, and run again"  # where a file of our own is damaged
Tensors = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


def find_offload(offload: str, size: int, device: torch.device) -> str:
    """Return where the weights of a model of `size` bytes live; for "auto" as near as they fit.

    That is on the device where they take at most half of its free memory, else in main memory by
    the same measure, else on disk.
    """
    free, cpu = free_memory(device), torch.device("cpu")
    if offload != "auto":
        found = offload
    elif size <= free / 2:
        found = "none"
    else:
        found = "cpu" if device.type != "cpu" and size <= free_memory(cpu) / 2 else "disk"
    log.debug(
        "weights: %.3g GB; free on %s: %.3g GB; offload %s", size / 1e9, device, free / 1e9, found
    )
    return found


class Memory:
    """Weights in main memory, pinned where a GPU fetches them from there."""

    shared = True  # what it reads is what it keeps, and must not be written to

    def __init__(self, tensors: Mapping[str, Tensor], pinned: bool) -> None:
        self.dense = {name: _pinned(tensor, pinned) for name, tensor in tensors.items()}
        self.changed: Tensors = {}

    def read(self, name: str, names: list[str]) -> Tensors:
        """Return the tensors of a unit."""
        return {name: self.changed.get(name, self.dense[name]) for name in names}

    def expect(self, name: str, names: list[str]) -> None:
        """Do nothing: the tensors of a unit are here."""

    def write(self, name: str, tensors: Tensors) -> None:
        """Keep the changed tensors of a unit."""
        for key, tensor in tensors.items():
            self.changed[key] = tensor.to("cpu", self.dense[key].dtype, copy=True)

    def revert(self) -> None:
        """Forget all changes."""
        self.changed.clear()


@dataclass
class Disk:
    """Weights in safetensors files: the dense ones where they lie, changed units in `folder`.

    files: the file of every tensor.
    """

    shared: ClassVar[bool] = False
    files: dict[str, Path]
    folder: Path
    units: dict[str, Path] = field(default_factory=dict)  # those that have changed

    def read(self, name: str, names: list[str]) -> Tensors:
        """Return the tensors of a unit."""
        if name in self.units:
            return read_tensors(self.units[name], way=AGAIN)
        found: Tensors = {}
        for file in dict.fromkeys(self.files[key] for key in names):
            way = {"way": AGAIN} if file.parent == self.folder else {}
            found |= read_tensors(file, [key for key in names if self.files[key] == file], **way)
        return found

    def expect(self, name: str, names: list[str]) -> None:
        """Let the system read the files of a unit ahead, where it can."""
        files = [self.units[name]] if name in self.units else {self.files[key] for key in names}
        for file in files if hasattr(os, "posix_fadvise") else []:
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def write(self, name: str, tensors: Tensors) -> None:
        """Write all tensors of a unit, some of which have changed, in the dtypes they came in."""
        before = self.read(name, list(tensors))
        path = self.folder / f"{name or 'rest'}.safetensors"
        write_tensors(path, {key: value.to(before[key].dtype) for key, value in tensors.items()})
        self.units[name] = path

    def revert(self) -> None:
        """Forget all changes."""
        self.units.clear()


@dataclass(eq=False)
class Unit:
    """Parameters, by their names in the model, that come to the device together."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    offload: Offload
    depth: int = 0
    version: int = 0
    hooked: bool = True  # whether it comes and goes with the runs of its module

    def hook(self) -> list[RemovableHandle]:
        """Let the parameters come when the module runs, and go when it is done."""
        return [
            self.module.register_forward_pre_hook(self.before, prepend=True),
            self.module.register_forward_hook(self.after, always_call=True),
        ]

    def enter(self) -> None:
        """Bring the parameters to the device, where they are not there yet."""
        self.depth += 1
        if self.depth == 1:
            for name, tensor in self.offload.fetch(self).items():
                own = self.parameters[name]
                copy = self.offload.store.shared
                own.data = tensor.to(self.offload.device, own.dtype, non_blocking=True, copy=copy)
            self.version = self._version()

    def leave(self) -> None:
        """Put back what has changed, and give the memory back, where nobody is left inside."""
        self.depth -= 1
        if self.depth:
            return
        if self._version() != self.version:
            self.offload.store.write(
                self.name, {name: value.detach() for name, value in self.parameters.items()}
            )
        self.forget()

    def before(self, *_: object) -> None:
        """Come to the device for a run of the module."""
        if self.hooked:
            self.enter()

    def after(self, *_: object) -> None:
        """Go again after it."""
        if self.hooked:
            self.leave()

    def forget(self) -> None:
        """Let the parameters hold NaN, in the memory of a single number."""
        for own in self.parameters.values():
            own.data = absent(own.shape, own.dtype, self.offload.device)

    def _version(self) -> int:
        return sum(own._version for own in self.parameters.values())


class Offload:
    """The units of a model, and the store they come from; ends with `close`."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        store: Memory | Disk,
        device: torch.device | None = None,
    ) -> None:
        map_large()
        self.store = store
        self.device = device or next(model.parameters()).device
        self.units = _units(self, model, blocks)
        self.blocks = [unit for unit in self.units if unit.name in blocks]
        self.last: Unit | None = None
        self.next: tuple[Unit, Future[Tensors]] | None = None
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gblm-read")
        self.hooks: list[RemovableHandle] = []
        away = {own for unit in self.units for own in unit.parameters.values()}
        stays = {name: own for name, own in model.named_parameters() if own not in away}
        for name, tensor in store.read("", list(stays)).items():
            stays[name].data = tensor.to(self.device, stays[name].dtype, copy=True)
        for buffer in model.buffers():
            buffer.data = buffer.to(self.device)
        for unit in self.units:
            unit.forget()
            KNOWN[id(unit.module)] = unit
            self.hooks += unit.hook()

    @property
    def kind(self) -> str:
        """Where the weights live: "cpu" or "disk"."""
        return "cpu" if isinstance(self.store, Memory) else "disk"

    def fetch(self, unit: Unit) -> Tensors:
        """Return the tensors of a unit from the store, and start to read the one likely next."""
        ready, self.next = self.next, None
        tensors = ready[1].result() if ready and ready[0] is unit else self._read(unit)
        if unit in self.blocks:
            at = self.blocks.index(unit)
            back = self.last in self.blocks[at + 1 :]
            after = at - 1 if back else at + 1
            if 0 <= after < len(self.blocks):
                following = self.blocks[after]
                if self.device.type == "cpu":  # no room of our own for what is near already
                    self.store.expect(following.name, list(following.parameters))
                else:
                    self.next = (following, self.reader.submit(self._read, following))
            self.last = unit
        return tensors

    def _read(self, unit: Unit) -> Tensors:
        return self.store.read(unit.name, list(unit.parameters))

    def shards(self, parameters: dict[str, nn.Parameter]) -> dict[str, tuple[str, list[str]]]:
        """Return the files to write a model's parameters to: the unit of each, and its names.

        That is a file for every unit, and one for the rest; a tied weight goes with the first.
        """
        units = []
        for unit in self.units:
            names = [name for name in unit.parameters if name in parameters]
            parameters = {key: own for key, own in parameters.items() if key not in names}
            units += [(unit.name, names)] if names else []
        units += [("", list(parameters))] if parameters else []
        of = f"of-{len(units):05}.safetensors"
        return {f"model-{number:05}-{of}": unit for number, unit in enumerate(units, 1)}

    def revert(self) -> None:
        """Make all weights dense again."""
        self.next = None
        self.store.revert()

    @contextmanager
    def home(self) -> Iterator[None]:
        """Have all parameters in main memory, as they are now, for a time."""
        try:
            for unit in self.units:
                for name, tensor in self._read(unit).items():
                    own = unit.parameters[name]
                    own.data = tensor.to("cpu", own.dtype)
            yield
        finally:
            for unit in self.units:
                unit.forget()

    def close(self) -> None:
        """Leave the modules to themselves; parameters that are away hold NaN for good."""
        self.next = None
        self.reader.shutdown(cancel_futures=True)
        for hook in self.hooks:
            hook.remove()
        for unit in self.units:
            KNOWN.pop(id(unit.module), None)


def map_large() -> None:
    """Let large tensors lie in mappings of their own, which go back to the system when freed.

    glibc otherwise raises the size from which it does so to that of what was freed last, and its
    heap comes to consist of holes: a third of the peak of two blocks of 50 million weights.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def absent(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of NaN, in the memory of a single number."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


def offloaded(
    offload: str,
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    folder: Path,
    device: torch.device,
) -> Offload | None:
    """Let the weights of a model in main memory live where `offload` says: see `find_offload`.

    On disk that is in the folder. None where they live on the device, and are there then.
    """
    kind = find_offload(offload, sum(own.nbytes for own in model.parameters()), device)
    if kind == "none":
        model.to(device)
        return None
    if kind == "cpu":
        store = Memory(dict(model.named_parameters()), pinned=device.type == "cuda")
        return Offload(model, blocks, store, device)
    files: dict[str, Path] = {}
    for i, (name, tensor) in enumerate(model.named_parameters()):
        files[name] = folder / f"dense-{i}.safetensors"
        write_tensors(files[name], {name: tensor.detach()})
    return Offload(model, blocks, Disk(files, folder), device)


def read_when_used(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    files: dict[str, Path],
    folder: Path,
    device: torch.device,
) -> Offload:
    """Let a model made on the meta device read its parameters from files, unit by unit.

    files: the file of every tensor, buffers too where they are in one. Changed units go into the
    folder.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, own in module.named_parameters(recurse=False):
            if own not in made:
                empty = absent(own.shape, own.dtype, device)
                made[own] = nn.Parameter(empty, requires_grad=False)
            module.register_parameter(name, made[own])
    for name, buffer in model.named_buffers():
        if name in files:
            buffer.copy_(read_tensors(files[name], [name])[name])
    return Offload(model, blocks, Disk(files, folder), device)


# By the id of the module, which its unit keeps alive as long as it is here itself.
KNOWN: weakref.WeakValueDictionary[int, Unit] = weakref.WeakValueDictionary()


@contextmanager
def here(module: nn.Module) -> Iterator[None]:
    """Have the parameters of a module on the device for a time: nothing to do where they live."""
    unit = KNOWN.get(id(module))
    if unit is None:
        yield
        return
    unit.enter()
    try:
        yield
    finally:
        unit.leave()


@contextmanager
def stay_away(module: nn.Module) -> Iterator[None]:
    """Let the parameters of a module not come and go with its runs for a time; `here` has them."""
    unit = KNOWN.get(id(module))
    if unit is None:
        yield
        return
    unit.hooked = False
    try:
        yield
    finally:
        unit.hooked = True


def offload_of(model: nn.Module) -> Offload | None:
    """Return how a model is offloaded, None where it is not."""
    units = (KNOWN.get(id(module)) for module in model.modules())
    return next((unit.offload for unit in units if unit), None)


@contextmanager
def in_memory(model: M, dtype: torch.dtype | None) -> Iterator[M]:
    """Give a model with all its weights in memory and in a dtype, as it is for None, for a time."""
    offload = offload_of(model)
    with offload.home() if offload else nullcontext():
        same = dtype in (None, next(model.parameters()).dtype)
        yield model if same else copy.deepcopy(model).to(dtype)


def _units(offload: Offload, model: nn.Module, blocks: Mapping[str, nn.Module]) -> list[Unit]:
    known = {own: name for name, own in model.named_parameters()}  # one name of tied weights
    within = {inner for block in blocks.values() for inner in block.modules()}
    chosen = {
        name: module
        for name, module in model.named_modules()
        if name in blocks or (isinstance(module, nn.Embedding | nn.Linear) and module not in within)
    }
    return [
        Unit(name, module, {known[own]: own for own in module.parameters()}, offload)
        for name, module in chosen.items()
    ]


def _pinned(tensor: Tensor, pinned: bool) -> Tensor:
    tensor = tensor.detach().to("cpu")
    return tensor.pin_memory() if pinned else tensor
