"""A result is its source with the changed weights in it; all else has the source's bytes."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gblm.machine import narrowed
from gblm.machine.files import INDEX, read_tensors, tensor_shapes, write_json
from gblm.machine.offload import Tensors, values

# Weights in other formats, and what training keeps: files of the source that hold dense weights.
WEIGHTS: tuple[str, ...] = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
)
WEIGHTS += (".onnx_data", ".ot", ".npz", ".index.json")
SINGLE = "model.safetensors"
LOADER = Path(narrowed.__file__)
SHORTER = "_gblm_shorter"  # a model has, whose source holds blocks that are no longer in it
OWN = ("README.md", "report.json", "config.toml")  # a result has these of its own


@dataclass
class Source:
    """A checkpoint on disk.

    files: the safetensors file of every tensor. folder: of what lies beside them, None where that
    is not the model's. named: gives tensors by their names in a model the names and forms that they
    have in the files.
    """

    files: dict[str, Path] = field(default_factory=dict)
    folder: Path | None = None
    named: Callable[[Tensors], Tensors] = field(default=lambda tensors: tensors)

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating dtype that most of its bytes have, None where it has none."""
        sizes: dict[torch.dtype, int] = {}
        for file in set(self.files.values()):
            for tensor in read_tensors(file).values():  # mapped, not read
                if tensor.is_floating_point():
                    sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None

    def lacks(self, model: nn.Module) -> list[str]:
        """Return the parameters of a model that are not in the files, or in another shape.

        A tied one is there if one of its names is.
        """
        owners = dict(model.named_parameters(remove_duplicate=False))
        empty = {own: torch.empty_like(own, device="meta") for own in set(owners.values())}
        wanted = self.named({name: empty[own] for name, own in owners.items()})
        shapes = {
            name: shape
            for file in set(self.files.values())
            for name, shape in tensor_shapes(file).items()
        }
        held = {name for name, own in wanted.items() if shapes.get(name) == list(own.shape)}
        tied = {id(wanted[name]) for name in held}
        return [
            name
            for name, own in wanted.items()
            if name not in held and (name in shapes or id(own) not in tied)
        ]

    def holds(self, model: nn.Module) -> bool:
        """Say whether the files hold all of a model: see `lacks`."""
        shorter = vars(model).get(SHORTER)
        return bool(self.files) and not shorter and not self.lacks(model)

    def write(self, model: nn.Module, blocks: Collection[str], folder: Path) -> None:
        """Write the files into a folder, with the weights of the model where they are others.

        A single file has the name by which libraries look for it.
        """
        files = set(self.files.values())
        index = next(iter(files)).with_name(INDEX)
        shards = len(files) > 1 or (index.exists() and SINGLE not in {file.name for file in files})
        copies = {file: folder / (file.name if shards else SINGLE) for file in files}
        for file, copy in copies.items():
            shutil.copyfile(file, copy)
        if shards:
            shutil.copyfile(index, folder / INDEX)
        for names in _parts(model, blocks):
            tensors = self.named(values(model, names))
            for file, copy in copies.items():
                own = {key: new for key, new in tensors.items() if self.files.get(key) == file}
                _overwrite(copy, own)


def _parts(model: nn.Module, blocks: Collection[str]) -> Iterator[list[str]]:
    """Yield the names of a model's parameters: those of each block together, then the others."""
    parts: dict[str, list[str]] = {block: [] for block in blocks}
    for name, _ in model.named_parameters(remove_duplicate=False):
        around = [block for block in blocks if name.startswith(f"{block}.")]
        parts.setdefault(max(around, key=len, default=""), []).append(name)
    yield from parts.values()


def _overwrite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a safetensors file, in the dtypes it has them; equal numbers stay."""
    with file.open("r+b") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(start - 8))
        for name, old in read_tensors(file, [*tensors]).items():
            new = tensors[name].to("cpu")
            same = old.to(new.dtype) == new
            if not same.all():
                merged = torch.where(same, old, new.to(old.dtype)).contiguous()
                handle.seek(start + header[name]["data_offsets"][0])
                handle.write(merged.view(-1).view(torch.uint8).numpy().data)


def write_widths(model: nn.Module, folder: Path, auto: str = "") -> None:
    """State widths that no config can, and write beside them what loads the model.

    auto: the class of transformers that loads it, in config.json.
    """
    if modules := vars(model).get("narrowed"):
        config = json.loads((folder / "config.json").read_text())
        config["narrowed"] = modules
        if auto:
            config["auto_map"] = {auto: f"{LOADER.stem}.{type(model).__name__}"}
        write_json(folder / "config.json", config)
        shutil.copyfile(LOADER, folder / LOADER.name)


def copy_files(source: Source, folder: Path) -> None:
    """Copy what lies beside the weights of a checkpoint: config, code, licence, ….

    Other weights, hidden files, checkpoints of training and models in folders of their own stay.
    """
    if source.folder is None:
        return
    parts = (source.folder / "modules.json").is_file()  # then its folders are parts of one model
    for place, inner, names in os.walk(source.folder):
        here = Path(place)
        inside = here.relative_to(source.folder)
        inner[:] = [
            name
            for name in inner
            if not name.startswith((".", "checkpoint-"))
            and (parts or not (here / name / "config.json").exists())
        ]
        for name in names:
            weights = name.endswith(WEIGHTS) and not (inside.parts and name.endswith("tensors"))
            if not weights and name[0] != "." and str(inside / name) not in OWN:
                (folder / inside).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / name, folder / inside / name)
