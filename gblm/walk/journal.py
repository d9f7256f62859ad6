"""The work folder of a run: the gradients of the dense model and the finished blocks.

    gradients/gradients.json, LINEAR.safetensors   sums of the dense model, for any run
    gradients/sweep.json, sweep-N.safetensors      while they are made: after how many blocks
    RUN/journal.json                               settings, finished blocks, their reports
    RUN/BLOCK.safetensors                          a pruned block

A run that goes on gives the finished blocks their weights and takes the samples through them again.

Every file is written beside its place, forced to the disk and renamed, the journal last: whenever a
run is cut off, the journal and what it names are whole.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.base import Batch, GblmError, Statistics
from gblm.machine.files import read_json, read_tensors, write_json, write_tensors
from gblm.machine.processes import rank, wait, world
from gblm.report import LinearReport, Report
from gblm.walk.blocks import Block, parameters, size

Fingerprint = dict[str, Any]
WAY = "remove its folder"  # out, where a file is damaged
# What a file says of the sums beside it, in the order of `StoredGradients`.
SUMS: dict[str, Any] = {"linears": list, "samples": int, "positions": int}


@dataclass(eq=False)
class StoredGradients(Mapping[str, Statistics]):
    """Sums of gradients in a folder, read linear by linear."""

    folder: Path
    linears: list[str] = field(default_factory=list)
    samples: int = 0
    positions: int = 0

    def __getitem__(self, name: str) -> Statistics:
        if name not in self.linears:
            raise KeyError(name)
        found = read_tensors(_file(self.folder, name), way=WAY)
        sums = {k: v.float() if v.dtype.itemsize < 4 else v for k, v in found.items()}
        return Statistics(sums, self.samples, self.positions)

    def __iter__(self) -> Iterator[str]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)


class GradientFolder:
    """Where sums of gradients are written block by block, and found again by later runs."""

    def __init__(
        self,
        folder: Path,
        settings: Fingerprint,
        dtype: torch.dtype | None = None,
        journal: bool = False,
    ) -> None:
        """Open a folder. journal: keep where the sweep is, and go on from there."""
        self.folder, self.settings, self.dtype, self.journal = folder, settings, dtype, journal
        self.finished: list[str] = []
        self.sums = StoredGradients(folder)
        self.sweep = folder / "sweep.json"
        if journal and self.sweep.is_file():
            found = read_json(self.sweep, settings=dict, finished=list, **SUMS)
            if found["settings"] == as_read(settings):  # else the sweep begins anew
                self.finished = found["finished"]
                self.sums = StoredGradients(folder, *(found[name] for name in SUMS))

    def has(self, block: Block) -> bool:
        """Say whether the sums of a block are here."""
        return block.name in self.finished

    def on_the_way(self) -> dict[str, Tensor]:
        """Return the gradients that the sweep had passed on when it left the last block."""
        return read_tensors(self._inputs(len(self.finished)), way=WAY)

    def keep(
        self, block: Block, sums: Mapping[str, Statistics], on_the_way: dict[str, Tensor]
    ) -> None:
        """Write the sums of a block, in the dtype of the folder where one is set.

        on_the_way: the gradients passed on to the blocks before, from which a sweep goes on.
        """
        if not (self.finished or rank()):
            self.sweep.unlink(missing_ok=True)  # of other settings, whose sums are written over
        for name, one in sums.items():
            self.sums.linears.append(name)
            self.sums.samples, self.sums.positions = one.samples, one.positions
            tensors = {key: value.to(self.dtype or value.dtype) for key, value in one.sums.items()}
            if not rank():  # the sums are the same in all processes
                write_tensors(_file(self.folder, name), tensors)
        self.finished.append(block.name)
        count = len(self.finished)
        if self.journal:
            write_tensors(self._inputs(count), on_the_way)
            wait()  # until all processes have written theirs
            self._write(self.sweep, settings=as_read(self.settings), finished=self.finished)
            self._inputs(count - 1).unlink(missing_ok=True)

    def finish(self) -> StoredGradients:
        """Write what the folder holds, which makes it whole, and return its sums."""
        self._write(self.folder / "gradients.json", settings=self.settings)
        self._inputs(len(self.finished)).unlink(missing_ok=True)
        if not rank():
            self.sweep.unlink(missing_ok=True)
        return self.sums

    def stored(self, must: bool = False) -> StoredGradients | None:
        """Return the sums of a former run, None where there are none.

        must: raise `GblmError` then, too. It is raised where they are of other settings, by name;
        more statistics than asked for do no harm, nor do gradients of more samples.
        """
        path = self.folder / "gradients.json"
        if not path.is_file():
            if must:
                raise GblmError(f"{self.folder} holds no gradients.json; give a former --work-dir")
            return None
        found = read_json(path, settings=dict, **SUMS)
        theirs = found["settings"]
        if not isinstance(theirs.get("needs"), list):
            raise GblmError(f"{path} names no statistics; remove its folder")
        if set(self.settings["needs"]) <= set(theirs["needs"]):
            theirs["needs"] = self.settings["needs"]
        if must and theirs["share"] > self.settings["share"]:
            theirs["share"] = self.settings["share"]
        refuse_others(self.folder, theirs, self.settings)
        return StoredGradients(self.folder, *(found[name] for name in SUMS))

    def _inputs(self, count: int) -> Path:
        of = f"-of-process-{rank()}" if world() > 1 else ""
        return self.folder / f"sweep-{count}{of}.safetensors"

    def _write(self, path: Path, **found: Any) -> None:
        """Write in process 0 which sums there are, and wait for it in the others."""
        if not rank():
            write_json(path, found | {name: getattr(self.sums, name) for name in SUMS})
        wait()


class Journal:
    """The finished blocks of a run, to go on from."""

    def __init__(self, folder: Path, settings: Fingerprint, resume: bool) -> None:
        """Open a folder; raises `GblmError` where it holds another run, or one to be resumed."""
        self.folder, self.path = folder, folder / "journal.json"
        self.settings = as_read(settings)
        self.finished: list[str] = []
        self.entries: list[dict[str, Any]] = []
        self.report: Report | None = None
        if not self.path.is_file():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise GblmError(f"{folder}: {error.strerror}; give another --work-dir") from error
            return
        if not resume:
            raise GblmError(f"{folder} holds a run; --resume goes on with it, or remove the folder")
        found = read_json(self.path, settings=dict, finished=list, linears=list)
        refuse_others(folder, found["settings"], self.settings)
        self.finished = found["finished"]
        self.entries = found["linears"]

    def begin(self, report: Report, blocks: list[Block]) -> None:
        """Take the report of a run, and give it what became of the finished blocks.

        Raises `GblmError` where these are not the first blocks of the model.
        """
        self.report = report
        try:
            report.linears = [LinearReport(**entry) for entry in self.entries]
        except TypeError as error:
            raise GblmError(f"{self.path} is damaged ({error}); remove its folder") from error
        if self.finished != [block.name for block in blocks[: len(self.finished)]]:
            raise GblmError(f"{self.path} names other blocks than the model; remove its folder")

    def has(self, block: Block) -> bool:
        """Say whether a block is finished."""
        return block.name in self.finished

    def restore(self, block: Block) -> None:
        """Give a finished block its weights."""
        parameters = dict(block.module.named_parameters())
        stored = read_tensors(_file(self.folder, block.name), list(parameters), way=WAY)
        for name, parameter in parameters.items():
            parameter.detach().copy_(stored[name])

    def finish(self, block: Block) -> None:
        """Write a block, and last the journal that names it."""
        assert self.report is not None
        self.finished.append(block.name)
        if not rank():
            own = {name: value.detach() for name, value in block.module.named_parameters()}
            write_tensors(_file(self.folder, block.name), own)
            linears = [asdict(entry) for entry in self.report.linears]
            found = {"settings": self.settings, "finished": self.finished, "linears": linears}
            write_json(self.path, found)
        wait()


def as_read(settings: Fingerprint) -> Fingerprint:
    """Return settings as JSON gives them back, with the number of processes."""
    found: Fingerprint = json.loads(json.dumps({**settings, "processes": world()}))
    return found


def fingerprint(model: nn.Module, batch: Batch, blocks: list[Block]) -> Fingerprint:
    """Return what tells a model and a calibration batch apart, as hashes.

    The model: names, shapes and some values of all parameters and buffers, 64 of each, as they are
    now. The batch: all of it, so that its source, seed, number and length of samples count.
    """
    weights, data = hashlib.sha256(), hashlib.sha256()
    own = parameters(model, [block.module for block in blocks])
    for name, value in chain(own, model.named_buffers()):
        weights.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        flat = value.detach().reshape(-1)
        values = flat[:: max(1, len(flat) // 64)].to("cpu", torch.float64)
        weights.update(values.numpy().tobytes())
    for name, samples in sorted(batch.items()):
        data.update(f"{name} {list(samples.shape)} {samples.dtype}".encode())
        flat = samples.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data.update(flat.numpy().tobytes())
    linears = sorted(linear.name for block in blocks for linear in block.linears)
    return {
        "model": weights.hexdigest()[:16],
        "choice of linears": hashlib.sha256(" ".join(linears).encode()).hexdigest()[:16],
        "calibration batch": data.hexdigest()[:16],
        "samples": size(batch),
    }


def refuse_others(folder: Path, theirs: Fingerprint, ours: Fingerprint) -> None:
    """Raise `GblmError` that names the settings in which a folder is another's."""
    names = sorted(set(theirs) | set(ours))
    other = [name for name in names if theirs.get(name) != ours.get(name)]
    if other:
        said = ", ".join(f"{n} ({theirs.get(n)}, here {ours.get(n)})" for n in other[:3])
        raise GblmError(f"{folder} is of a run with another {said}; give another folder")


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
