"""Packed checkpoints: the values that are kept and where they stand, in zstd frames, bit for bit.

A packed file is a safetensors file in which every tensor is `uint8` and holds, one after the other:

    4 bytes   the length of the head, little-endian
    head      JSON: the tensor's name, dtype and shape, whether it has a mask, the frames' lengths
    mask      a bit for each number, 0 where all of its own are 0; only where that saves bytes
    byte 0 …  the lowest byte of every kept number, then the next one, …

Each of them, the length aside, is a zstd frame with a checksum. The bytes of a number stand apart,
for those of the exponent are much alike and those of the mantissa are not. The header of the
ordinary file is in the metadata, with its CRC-32: unpacking gives that very file.
"""

import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gblm.base import GblmError
from gblm.machine.files import INDEX, check_output, read_json, written_beside

LEVEL = 1  # of zstd; higher ones are slower, and no smaller on such bytes
SUFFIX, PACKED_SUFFIX = ".safetensors", ".packed.safetensors"
PACKED_INDEX = INDEX.replace(".json", ".packed.json")  # as transformers names that of a variant
QUANT_METHOD = "gblm-packed"  # by which transformers finds `gblm.llm.packed`
MARK = f'"quantization_config": {{"quant_method": "{QUANT_METHOD}"}}, '  # of a packed config.json
DAMAGE = (ValueError, TypeError, KeyError, AttributeError, MemoryError)  # what it leads to
Raw = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass
class Sizes:
    """The bytes of tensors before and after packing: of all of them, and of those with a mask."""

    dense: int = 0
    packed: int = 0
    pruned_dense: int = 0
    pruned_packed: int = 0

    def add(self, other: "Sizes") -> None:
        """Add those of other tensors."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def __str__(self) -> str:
        pruned = self.pruned_packed / max(1, self.pruned_dense)
        return (
            f"packed to {self.packed / max(1, self.dense):.1%} of {self.dense / 1e6:.1f} MB; "
            f"weights with zeros to {pruned:.1%} of {self.pruned_dense / 1e6:.1f} MB"
        )


# One tensor.


def encode(name: str, tensor: Tensor) -> tuple[Tensor, bool]:
    """Return the bytes `[n]` that a tensor is packed to, and whether they hold a mask."""
    width = tensor.element_size()
    numbers = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(f"u{width}")
    places = np.flatnonzero(numbers)
    masked = 8 * width * (numbers.size - places.size) > numbers.size
    parts = [np.packbits(numbers != 0)] if masked else []
    kept = (numbers.take(places) if masked else numbers).view(np.uint8).reshape(-1, width)
    parts += [np.ascontiguousarray(kept[:, byte]) for byte in range(width)]
    zstd = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    frames = [zstd.compress(part.data) for part in parts]
    head = {
        "name": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "mask": masked,
        "frames": [len(frame) for frame in frames],
    }
    first = zstd.compress(json.dumps(head).encode())
    whole = bytearray(b"".join([len(first).to_bytes(4, "little"), first, *frames]))
    return torch.frombuffer(whole, dtype=torch.uint8), masked


def decode(packed: Tensor, name: str = "") -> Tensor:
    """Return the tensor that `encode` packed, under that name if one is given.

    Raises `ValueError` where a byte has changed.
    """
    raw = packed.view(torch.uint8).numpy()
    head, start = _head(raw)
    if name and head["name"] != name:
        raise ValueError(f"it is {head['name']}")
    parts = []
    for length in head["frames"]:
        parts.append(_decompressed(raw[start : start + length]))
        start += length
    if start != raw.size:
        raise ValueError("there are bytes behind its frames")
    dtype: torch.dtype = getattr(torch, head["dtype"])
    planes = parts[1:] if head["mask"] else parts
    kept = np.empty((planes[0].size, dtype.itemsize), np.uint8)
    for byte, plane in enumerate(planes):
        kept[:, byte] = plane
    numbers = kept.reshape(-1).view(f"u{dtype.itemsize}")
    if head["mask"]:
        size = int(np.prod(head["shape"]))
        places = np.flatnonzero(np.unpackbits(parts[0], count=size).view(bool))
        values, numbers = numbers, np.zeros(size, numbers.dtype)
        numbers[places] = values
    return torch.from_numpy(numbers.view(np.uint8)).view(dtype).reshape(head["shape"])


def _head(raw: Raw) -> tuple[dict[str, Any], int]:
    """Return the head of a packed tensor, and where its frames begin."""
    end = 4 + int.from_bytes(raw[:4].tobytes(), "little")
    return json.loads(_decompressed(raw[4:end]).tobytes()), end


def _decompressed(frame: Raw) -> Raw:
    try:
        whole = zstandard.ZstdDecompressor().decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return np.frombuffer(whole, np.uint8)


# One file.


def pack_file(source: Path, target: Path) -> Sizes:
    """Write the packed file of an ordinary one."""
    sizes, packed = Sizes(), {}
    with _open(source) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            packed[name], masked = encode(name, tensor)
            own = (tensor.nbytes, packed[name].nbytes)
            sizes.add(Sizes(*own, *(own if masked else ())))
    with source.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    metadata = {"format": "pt", "header": header.decode(), "crc32": str(zlib.crc32(header))}
    _write(target, packed, metadata)
    return sizes


def _write(path: Path, packed: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of bytes `[n]` by name; the same ones give the same file."""
    header: dict[str, Any] = {"__metadata__": metadata}  # which safetensors writes in any order
    end = 0
    for name, own in packed.items():
        offsets = [end, end := end + own.numel()]
        header[name] = {"dtype": "U8", "shape": [own.numel()], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for own in packed.values():
            stream.write(own.numpy().data)


def read_packed(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a packed file; raises `GblmError` that names what is damaged."""
    with _open(path) as file:
        return {name: _tensor(file, name, path) for name in _header(file, path)}


def unpack_file(source: Path, target: Path) -> None:
    """Write the ordinary file of a packed one, as it was."""
    with _open(source) as file, target.open("wb") as stream:
        entries = _header(file, source)
        header = file.metadata()["header"].encode()
        stream.write(len(header).to_bytes(8, "little") + header)
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            tensor = _tensor(file, name, source).reshape(-1)
            stream.write(tensor.view(torch.uint8).numpy().data)


def check_names(path: Path) -> None:
    """Raise `GblmError` where a packed file's header is damaged, or a tensor has another's name."""
    with _open(path) as file:
        for name in _header(file, path):
            with _named(path, name):
                found = _head(file.get_tensor(name).numpy())[0]["name"]
                if found != name:
                    raise ValueError(f"it is {found}")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise GblmError(f"{path} cannot be read ({error}); fetch or write it again") from error


def _header(file: Any, path: Path) -> dict[str, Any]:
    """Return what the header of the ordinary file says of its tensors, by name."""
    metadata = file.metadata() or {}
    header = metadata.get("header", "").encode()
    if metadata.get("crc32") != str(zlib.crc32(header)):
        what = "its header is damaged" if "crc32" in metadata else "it is no packed file"
        raise GblmError(f"{path}: {what}; fetch or pack it again")
    entries: dict[str, Any] = json.loads(header)
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


def _tensor(file: Any, name: str, path: Path) -> Tensor:
    with _named(path, name):
        return decode(file.get_tensor(name), name)


@contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    """Turn what damage to a tensor raises into a `GblmError` that names it."""
    try:
        yield
    except (SafetensorError, *DAMAGE) as error:
        raise GblmError(
            f"{path}: tensor {name} is damaged ({error}); fetch or pack it again"
        ) from error


# A folder.


def plain_share(folder: Path) -> float:
    """Return what zstd alone makes of the bytes of ordinary files: of 16 parts of each, 1 MB."""
    before = after = 0
    for file in weight_files(folder):
        with file.open("rb") as stream:
            for part in range(16):
                stream.seek(part * file.stat().st_size // 16)
                some = stream.read(min(2**20, file.stat().st_size // 16 + 1))
                before, after = before + len(some), after + len(zstandard.compress(some, 3))
    return after / max(1, before)


def pack(folder: Path | str, out: Path | str) -> Sizes:
    """Write the packed form of a folder of `.safetensors`: see the module.

    Whatever else is in the folder is copied; a config.json of transformers says how it is loaded.
    Raises `GblmError` where there is nothing to pack, or `out` is there.
    """
    source, files = Path(folder), weight_files(Path(folder))
    if not files:
        way = "it is packed already" if packed_files(source) else "give a folder of a model"
        raise GblmError(f"{folder} holds no {SUFFIX} to pack; {way}")
    check_output(Path(out), sum(file.stat().st_size for file in files), overwrite=False)
    _check_config(source)
    with written_beside(Path(out)) as beside:
        shutil.copytree(source, beside, dirs_exist_ok=True)
        return pack_there(beside)


def unpack(folder: Path | str, out: Path | str) -> None:
    """Write the ordinary form of a packed folder, every file as it was before.

    Raises `GblmError` where a file is damaged, which it names with the tensor, or `out` is there.
    """
    source, files = Path(folder), packed_files(Path(folder))
    if not files:
        raise GblmError(f"{folder} holds no {PACKED_SUFFIX} to unpack; give a packed folder")
    check_output(Path(out), sum(file.stat().st_size for file in files), overwrite=False)
    with written_beside(Path(out)) as beside:
        others = shutil.ignore_patterns(f"*{PACKED_SUFFIX}")
        shutil.copytree(source, beside, ignore=others, dirs_exist_ok=True)
        for file in files:
            unpack_file(file, beside / file.name.replace(PACKED_SUFFIX, SUFFIX))
        _rewrite(beside / "config.json", f"{{{MARK}", "{", beside / "config.json")
        _rewrite(beside / PACKED_INDEX, PACKED_SUFFIX, SUFFIX, beside / INDEX)


def pack_there(folder: Path) -> Sizes:
    """Put packed files in the place of the `.safetensors` of a folder."""
    sizes = Sizes()
    _check_config(folder)
    for file in weight_files(folder):
        sizes.add(pack_file(file, file.with_name(file.name.replace(SUFFIX, PACKED_SUFFIX))))
        file.unlink()
    _rewrite(folder / INDEX, SUFFIX, PACKED_SUFFIX, folder / PACKED_INDEX)
    if _config(folder).get("model_type"):  # of transformers
        _rewrite(folder / "config.json", "{", f"{{{MARK}", folder / "config.json", 1)
    return sizes


def weight_files(folder: Path) -> list[Path]:
    """Return the ordinary `.safetensors` of a folder."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    return [file for file in files if not file.name.endswith(PACKED_SUFFIX)]


def packed_files(folder: Path) -> list[Path]:
    """Return the packed files of a folder."""
    return sorted(folder.glob(f"*{PACKED_SUFFIX}"))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path, "give a whole folder") if path.is_file() else {}


def _check_config(folder: Path) -> None:
    if "quantization_config" in _config(folder):
        raise GblmError(f"{folder} holds a quantised model; pack it before it is quantised")


def _rewrite(path: Path, old: str, new: str, target: Path, count: int = -1) -> None:
    """Write a file anew, where it is there, with other words in the place of some."""
    if path.is_file():
        content = path.read_bytes()  # and no newline is another afterwards
        path.unlink()
        target.write_bytes(content.replace(old.encode(), new.encode(), count))
