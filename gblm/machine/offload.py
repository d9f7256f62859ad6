"""Offloading: weights that live in main memory or on disk, and come to the device block by block.

The parameters of a model are cut into units: each block, and each embedding or linear outside of
the blocks; what little is left stays on the device, such as an embedding of positions, whose
weight the model's code may read by itself. While a unit is away its parameters hold NaN,
in the memory of a single number, so that whatever would use them by mistake is found out. Hooks
bring a unit to the device when its module runs, read the next one meanwhile, and put back what has
changed when it is done.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gblm.machine.device import free_memory
from gblm.machine.files import read_tensors, write_tensors

log = logging.getLogger(__name__)

OFFLOADS = ("auto", "none", "cpu", "disk")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LITTLE = 0.1  # of the parameters of the largest block
AGAIN = "check its disk, and run again"  # where a file of our own is damaged
Tensors = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


def find_offload(offload: str, size: int, device: torch.device) -> str:
    """Return where the weights of a model of `size` bytes live; for "auto" as near as they fit.

    That is on the device where they take at most half of its free memory, else in main memory by
    the same measure, else on disk.
    """
    free = free_memory(device)
    if offload == "auto":
        if size <= free / 2:
            offload = "none"
        elif device.type != "cpu" and size <= free_memory(torch.device("cpu")) / 2:
            offload = "cpu"
        else:
            offload = "disk"
    log.debug(
        "weights: %.3g GB; free on %s: %.3g GB; offload %s", size / 1e9, device, free / 1e9, offload
    )
    return offload


@dataclass(frozen=True, eq=False)
class Converted:
    """Parameters that files hold in another form: the file of each tensor, what makes them."""

    files: Mapping[str, Path]
    convert: Callable[[Tensors], Tensors]

    def read(self) -> Tensors:
        """Return the parameters by their names."""
        return self.convert(
            {name: read_tensors(file, [name])[name] for name, file in self.files.items()}
        )


@dataclass
class Store:
    """Where the weights of a model rest: tensors in main memory, or the files that hold them.

    dense: the tensor, the file or what is made of files, of every name. folder: for files of what
    has changed, None to keep that in main memory.
    """

    dense: Mapping[str, Tensor | Path | Converted]
    folder: Path | None = None
    changed: dict[str, Tensor | Path] = field(default_factory=dict)

    def read(self, names: Iterable[str]) -> Tensors:
        """Return tensors by their names; what rests in memory is not to be written to."""
        places = {name: self.changed.get(name, self.dense[name]) for name in names}
        tensors = {name: place for name, place in places.items() if isinstance(place, Tensor)}
        for file in {place for place in places.values() if isinstance(place, Path)}:
            way = {"way": AGAIN} if file.parent == self.folder else {}
            tensors |= read_tensors(file, [n for n in places if places[n] == file], **way)
        for made in {place for place in places.values() if isinstance(place, Converted)}:
            tensors |= {name: own for name, own in made.read().items() if places.get(name) is made}
        return tensors

    def read_ahead(self, names: Iterable[str]) -> None:
        """Let the system read the files of tensors ahead, where it can."""
        places = {self.changed.get(name, self.dense[name]) for name in names}
        files = {place for place in places if isinstance(place, Path)}
        for made in (place for place in places if isinstance(place, Converted)):
            files |= {*made.files.values()}
        for file in files:
            if hasattr(os, "posix_fadvise"):
                with file.open("rb") as handle:
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def write(self, unit: str, tensors: Tensors) -> None:
        """Keep all tensors of a unit, some of which have changed, in the dtypes they came in."""
        kept = self.read(tensors)
        for name, tensor in tensors.items():
            kept[name] = tensor.to("cpu", kept[name].dtype, copy=not self.folder)
        if self.folder:
            file = self.folder / f"{unit}.safetensors"
            write_tensors(file, kept)
            self.changed |= dict.fromkeys(kept, file)
        else:
            self.changed |= kept


@dataclass(eq=False)
class Unit:
    """Parameters, by their names in the model, that come to the device together.

    depth: how many uses of them are under way. hooked: whether they come and go with the runs of
    the module. past: where they rest once another module has taken its place.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    offload: Offload
    depth: int = 0
    version: int = 0
    hooked: bool = True
    past: Store | None = None

    @property
    def store(self) -> Store:
        """Where they rest."""
        return self.past or self.offload.store

    def enter(self) -> None:
        """Bring the parameters to the device, where they are not there yet."""
        self.depth += 1
        if self.depth == 1:
            device, copy = self.offload.device, not self.offload.store.folder
            for name, tensor in self.offload.fetch(self).items():
                parameter = self.parameters[name]
                parameter.data = tensor.to(device, parameter.dtype, non_blocking=True, copy=copy)
            self.version = self._version()

    def leave(self) -> None:
        """Put back what has changed, and give the memory back, where no other use is under way."""
        self.depth -= 1
        if self.depth:
            return
        if self._version() != self.version:
            changed = {name: parameter.detach() for name, parameter in self.parameters.items()}
            self.store.write(self.name, changed)
        self.forget()

    def before(self, *_: object) -> None:
        if self.hooked:
            self.enter()

    def after(self, *_: object) -> None:
        if self.hooked:
            self.leave()

    def forget(self) -> None:
        for parameter in self.parameters.values():
            parameter.data = placeholder(parameter.shape, parameter.dtype, self.offload.device)

    def _version(self) -> int:
        return sum(parameter._version for parameter in self.parameters.values())


class Offload:
    """The units of a model, and the store they come from; ends with `close`."""

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, nn.Module], store: Store, device: torch.device
    ) -> None:
        map_large()
        self.store, self.device = store, device
        names = {value: name for name, value in model.named_parameters()}  # one of tied weights
        inside = {module for block in blocks.values() for module in block.modules()}
        attentions = [own for own in model.modules() if isinstance(own, nn.MultiheadAttention)]
        inside |= {own.out_proj for own in attentions}  # whose weight they read by themselves
        sizes = {own: sum(value.numel() for value in own.parameters()) for own in model.modules()}
        little = LITTLE * max(sizes[block] for block in blocks.values())
        apart = {
            own
            for own in model.modules()
            if isinstance(own, nn.Embedding | nn.Linear) and sizes[own] > little
        }
        self.units = [
            Unit(name, module, {names[value]: value for value in module.parameters()}, self)
            for name, module in model.named_modules()
            if name in blocks or module in apart - inside
        ]
        self.blocks = [unit for unit in self.units if unit.name in blocks]
        self.last: Unit | None = None
        self.next: tuple[Unit, Future[Tensors]] | None = None
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gblm-read")
        self.hooks: list[RemovableHandle] = []
        self.numbers = itertools.count()  # of modules that take the place of others
        away = {name for unit in self.units for name in unit.parameters}
        stays = {name: value for name, value in model.named_parameters() if name not in away}
        for name, tensor in store.read(stays).items():
            stays[name].data = tensor.to(self.device, stays[name].dtype, copy=True)
        for buffer in model.buffers():
            buffer.data = buffer.to(self.device)
        for unit in self.units:
            self._watch(unit)

    @property
    def kind(self) -> str:
        """Where the weights live: "cpu" or "disk"."""
        return "disk" if self.store.folder else "cpu"

    def fetch(self, unit: Unit) -> Tensors:
        """Return the tensors of a unit from the store, and start to read the block likely next."""
        ahead, self.next = self.next, None
        tensors = (
            ahead[1].result() if ahead and ahead[0] is unit else unit.store.read(unit.parameters)
        )
        if unit not in self.blocks:
            return tensors
        at = self.blocks.index(unit)
        backwards = self.last in self.blocks[at + 1 :]
        for block in self.blocks[at - 1 : at] if backwards else self.blocks[at + 1 : at + 2]:
            if self.device.type == "cpu":  # no room of our own for what is near already
                self.store.read_ahead(block.parameters)
            else:
                self.next = (block, self.reader.submit(self.store.read, block.parameters))
        self.last = unit
        return tensors

    def shards(self, parameters: dict[str, nn.Parameter]) -> dict[str, list[str]]:
        """Return the files to write a model's parameters to, and the names in each.

        That is a file for every unit, and one for the rest; a tied weight goes with the first.
        """
        units = []
        for unit in self.units:
            names = [name for name in unit.parameters if name in parameters]
            parameters = {key: own for key, own in parameters.items() if key not in names}
            units += [names] if names else []
        units += [list(parameters)] if parameters else []
        of = f"of-{len(units):05}.safetensors"
        return {f"model-{number:05}-{of}": names for number, names in enumerate(units, 1)}

    def exchange(self, old: nn.Module, new: nn.Module | None, name: str = "") -> Callable[[], None]:
        """Let a module that takes the place of another come and go as that did.

        new: None where none does; name: of it in the model. The old one keeps what it has. Returns
        what undoes it.
        """
        unit, before = UNITS[id(old)], (list(self.units), list(self.blocks))
        changed = dict(self.store.changed)
        places = {key: changed.get(key, self.store.dense[key]) for key in unit.parameters}
        unit.past, written = Store(places, self.store.folder), {*places}
        instead, hooks = list[Unit](), list[RemovableHandle]()
        if new is not None:
            parameters = {f"{name}.{key}": value for key, value in new.named_parameters()}
            own = Unit(f"{next(self.numbers)}-{name}", new, parameters, self)
            self.store.write(own.name, {key: value.detach() for key, value in parameters.items()})
            hooks = self._watch(own)
            instead, written = [own], {*places, *parameters}
        for units in (self.units, self.blocks):
            at = units.index(unit)
            units[at : at + 1] = instead

        def undo() -> None:
            self.units, self.blocks = before
            unit.past = None
            for hook in hooks:
                hook.remove()
            for key in written:
                self.store.changed.pop(key, None)
            self.store.changed |= {key: changed[key] for key in written & changed.keys()}

        return undo

    def _watch(self, unit: Unit) -> list[RemovableHandle]:
        """Let the parameters of a unit come and go with its module."""
        unit.forget()
        UNITS[id(unit.module)] = unit
        hooks = [
            unit.module.register_forward_pre_hook(unit.before, prepend=True),
            unit.module.register_forward_hook(unit.after, always_call=True),
        ]
        self.hooks += hooks
        return hooks

    def revert(self) -> None:
        """Make all weights dense again."""
        self.next = None
        self.store.changed.clear()

    @contextmanager
    def home(self) -> Iterator[None]:
        """Have all parameters in main memory, as they are now, for a time."""
        try:
            for unit in self.units:
                for name, tensor in self.store.read(unit.parameters).items():
                    parameter = unit.parameters[name]
                    parameter.data = tensor.to("cpu", parameter.dtype)
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
            UNITS.pop(id(unit.module), None)


def map_large() -> None:
    """Let large tensors lie in mappings of their own, which go back to the system when freed.

    glibc otherwise raises the size from which it does so to that of what was freed last, and its
    heap comes to consist of holes: a third of the peak of two blocks of 50 million weights.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of NaN, of integers the least one, in the memory of a single number."""
    numbers = dtype.is_floating_point or dtype.is_complex or dtype == torch.bool
    value = torch.nan if numbers else torch.iinfo(dtype).min
    return torch.full((), value, dtype=dtype, device=device).expand(shape)


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
    parameters = dict(model.named_parameters())
    kind = find_offload(offload, sum(value.nbytes for value in parameters.values()), device)
    if kind == "none":
        model.to(device)
        return None
    if kind == "cpu":
        dense = {name: value.detach().to("cpu") for name, value in parameters.items()}
        if device.type == "cuda":  # which fetches faster from pinned memory
            dense = {name: tensor.pin_memory() for name, tensor in dense.items()}
        return Offload(model, blocks, Store(dense), device)
    files = {name: folder / f"dense-{i}.safetensors" for i, name in enumerate(parameters)}
    for name, parameter in parameters.items():
        write_tensors(files[name], {name: parameter.detach()})
    return Offload(model, blocks, Store(files, folder), device)


def read_when_used(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    places: Mapping[str, Path | Converted],
    folder: Path,
    device: torch.device,
) -> Offload:
    """Let a model made on the meta device read its parameters from files, unit by unit.

    places: of every parameter, buffers too where they are in a file. Changed units go into the
    folder.
    """
    store = Store(places, folder)
    replaced: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay so
    for module in model.modules():
        for name, meta in module.named_parameters(recurse=False):
            if meta not in replaced:
                empty = placeholder(meta.shape, meta.dtype, device)
                replaced[meta] = nn.Parameter(empty, requires_grad=False)
            module.register_parameter(name, replaced[meta])
    for name, buffer in model.named_buffers():
        if name in places:
            buffer.copy_(store.read([name])[name])
    return Offload(model, blocks, store, device)


# By the id of the module, which its unit keeps alive as long as it is in here.
UNITS: weakref.WeakValueDictionary[int, Unit] = weakref.WeakValueDictionary()


@contextmanager
def onload(module: nn.Module) -> Iterator[None]:
    """Have the parameters of a module on the device for a time: nothing to do where they live."""
    unit = UNITS.get(id(module))
    if unit:
        unit.enter()
    try:
        yield
    finally:
        if unit:
            unit.leave()


@contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Let parameters not come and go with runs of their module for a time; `onload` has them."""
    unit = UNITS.get(id(module))
    if unit:
        unit.hooked = False
    try:
        yield
    finally:
        if unit:
            unit.hooked = True


def offload_of(model: nn.Module) -> Offload | None:
    """Return how a model is offloaded, None where it is not."""
    units = (UNITS.get(id(module)) for module in model.modules())
    return next((unit.offload for unit in units if unit), None)


def values(model: nn.Module, names: Iterable[str]) -> Tensors:
    """Return parameters of a model by their names, as they are now, wherever they live."""
    owners, offload = dict(model.named_parameters(remove_duplicate=False)), offload_of(model)
    units = offload.units if offload else []
    away = {own: name for unit in units for name, own in unit.parameters.items()}
    found = {}
    for name in names:
        own = owners[name]
        found[name] = own.detach()
        if offload and own in away:
            found[name] = offload.store.read([away[own]])[away[own]].to(own.dtype)
    return found


@contextmanager
def in_memory(model: M, dtype: torch.dtype | None) -> Iterator[M]:
    """Give a model with all its weights in memory and in a dtype, as it is for None, for a time."""
    offload = offload_of(model)
    with offload.home() if offload else nullcontext():
        same = dtype in (None, next(model.parameters()).dtype)
        yield model if same else copy.deepcopy(model).to(dtype)
