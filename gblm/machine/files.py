"""Files and folders: written beside, then renamed; checked before work; one run at a time.

What is written here is whole or not there, lies on the disk before its name does, and has the
rights that the umask gives. An interruption or a failure leaves nothing behind.
"""

import errno
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gblm.base import GblmError

log = logging.getLogger(__name__)


def portable(text: str, home: str = "~/") -> str:
    """Return a path, or a text with some, without the folders of this machine and user.

    An absolute path is given from the current folder where it is in it, and from the home folder,
    which is called `home`, where it is there.
    """
    for folder, short in ((Path.cwd(), ""), (Path.home(), home)):
        if folder != Path(folder.anchor):
            text = re.sub(rf"(?<![\w.~/-]){re.escape(str(folder))}/+", short, text)
    return text


INDEX = "model.safetensors.index.json"  # of shards, as every library names it


def read_tensors(
    path: Path, names: list[str] | None = None, way: str = "fetch or write it again"
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, all or those of the names.

    Raises `GblmError`, with the way out, where it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys() if names is None else names
            return {name: file.get_tensor(name) for name in keys}
    except (SafetensorError, OSError) as error:
        raise GblmError(f"{path} cannot be read ({error}); {way}") from error


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor of a safetensors file, empty where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return {}


def weights_size(folder: Path) -> int:
    """Return the bytes of the safetensors in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def zeros(folder: Path) -> float:
    """Return the share of the numbers in the safetensors of a folder that is exactly 0."""
    found = whole = 0
    for file in folder.glob("*.safetensors"):
        for name in tensor_shapes(file):
            tensor = read_tensors(file, [name])[name]
            found, whole = found + int((tensor == 0).sum()), whole + tensor.numel()
    return found / max(1, whole)


def check_depth(model: str | Path, blocks: int, what: str, tensors: int) -> None:
    """Raise `GblmError` where a config names more blocks than its checkpoint can hold.

    A library would make millions of them for hours, before it finds their weights missing.
    """
    if tensors and blocks > tensors:
        raise GblmError(
            f"model {model}: config.json names {blocks} {what} and the checkpoint holds {tensors} "
            "tensors; give the config and the weights of one model"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; raises `GblmError` where the disk is full or rights are missing."""
    contiguous = {name: tensor.contiguous().to("cpu") for name, tensor in tensors.items()}
    with _beside(path, Path.touch, os.replace) as beside:
        save_file(contiguous, beside, metadata={"format": "pt"})


def write_shards(
    folder: Path, shards: Collection[str], read: Callable[[str], Mapping[str, Tensor]]
) -> None:
    """Write safetensors files, whose tensors `read(shard)` gives, and their index."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        tensors = read(shard)
        write_tensors(folder / shard, tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def read_json(path: Path, /, way: str = "remove its folder", **kinds: type) -> dict[str, Any]:
    """Return the object in a JSON file, which holds a value of each of the kinds.

    Raises `GblmError`, with the way out, where it does not.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GblmError(f"{path} cannot be read ({error}); {way}") from error
    entries = value if isinstance(value, dict) else {}
    if wrong := [name for name, kind in kinds.items() if not isinstance(entries.get(name), kind)]:
        raise GblmError(f"{path} is damaged: it lacks {', '.join(wrong)}; {way}")
    return entries


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON: see `write_text`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8; raises `GblmError` where the disk is full or rights are missing."""
    with _beside(path, Path.touch, os.replace) as beside:
        beside.write_text(text, "utf-8")


def written_beside(folder: Path) -> AbstractContextManager[Path]:
    """Give a folder to write to, which takes the place of `folder` and all in it once it is whole.

    Raises `GblmError` where the disk is full, or rights are missing.
    """
    return _beside(folder, Path.mkdir, _exchange)


def written_into(folder: Path) -> AbstractContextManager[Path]:
    """Give a folder to write to, whose files go into `folder`, beside others, once they are whole.

    Raises `GblmError` where the disk is full, or rights are missing.
    """
    return _beside(folder / "new files", Path.mkdir, _unpack)


@contextmanager
def _beside(
    path: Path, make: Callable[[Path], None], place: Callable[[Path, Path], None]
) -> Iterator[Path]:
    """Give what `make` has made beside a path; `place(beside, path)` it where nothing fails.

    It is on the disk before it is placed, with the rights of a new folder, or of a file in it.
    """
    path = Path(os.path.realpath(path))
    # Named before it is there, so that an interruption at any time finds what to remove.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make(beside)
        rights = stat.S_IMODE(beside.stat().st_mode)
        yield beside
        for written in (*beside.rglob("*"), beside):
            if written.is_symlink():
                continue
            _sync(written)
            mode = rights if written.is_dir() else rights & 0o666
            if stat.S_IMODE(written.stat().st_mode) != mode:  # libraries have rights of their own
                written.chmod(mode)
        place(beside, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GblmError(
            f"{path} cannot be written ({reason}); make space, check the rights, or go elsewhere"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _exchange(beside: Path, folder: Path) -> None:
    """Rename a folder to one that may be there, which is removed once the new one is in place."""
    old = beside.with_name(f"{beside.name}.old")
    try:
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(beside, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        try:
            if old.exists():
                shutil.rmtree(old)
        except BaseException as error:
            log.warning(
                "%s is written; what it held before is in %s (%s); remove that", folder, old, error
            )
            if not isinstance(error, OSError):
                raise


def _unpack(beside: Path, path: Path) -> None:
    """Move the files of a folder into the one it lies in."""
    for file in sorted(beside.rglob("*")):
        place = path.parent / file.relative_to(beside)
        if file.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(file, place)
            _sync(place.parent)


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that do so by themselves
            raise
    finally:
        os.close(handle)


def check_output(folder: Path, size: int, overwrite: bool) -> None:
    """Raise `GblmError` where a result of `size` bytes cannot be written to the folder.

    That is where the folder holds something and `overwrite` is not given, where it is a file or a
    mount point, where rights are missing, or the disk is too full.
    """
    parent = _parent(folder, "output")
    if folder.is_mount():
        raise GblmError(f"output {folder} is a mount point; give a folder in it")
    if folder.is_dir():
        _check_rights(folder, folder, "output")
        if any(folder.iterdir()) and not overwrite:
            raise GblmError(f"output {folder} is not empty; give another folder, or --overwrite")
    _check_rights(parent, folder, "output")
    free = shutil.disk_usage(parent).free
    if free < size:
        raise GblmError(
            f"output {folder}: {size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            "make space, or give a folder on another disk"
        )


def check_report(folder: Path, overwrite: bool) -> None:
    """Raise `GblmError` where a report cannot be written to the folder.

    That is where the folder holds a report and `overwrite` is not given, where it is a file, or
    rights are missing.
    """
    parent = _parent(folder, "report")
    if (folder / "report.html").exists() and not overwrite:
        raise GblmError(f"report {folder} is there already; give another folder, or --overwrite")
    _check_rights(folder if folder.exists() else parent, folder, "report")


def _parent(folder: Path, what: str) -> Path:
    """Return the nearest folder above that is there; raises `GblmError` where a file is instead."""
    try:
        is_file = folder.exists() and not folder.is_dir()
    except OSError as error:  # no folder can have that name
        raise GblmError(f"{what} {str(folder)[:60]}…: {error.strerror}; give another") from error
    if is_file:
        raise GblmError(f"{what} {folder} is a file; give a folder")
    parent = Path(os.path.realpath(folder)).parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise GblmError(f"{what} {folder}: {parent} is a file; give a folder in a folder")
    return parent


def _check_rights(place: Path, folder: Path, what: str) -> None:
    if not os.access(place, os.W_OK | os.X_OK):
        raise GblmError(f"{what} {folder}: no right to write in {place}; give another folder")


@contextmanager
def locked(folder: Path, file: Path) -> Iterator[None]:
    """Keep other runs out of a folder for a time, by a lock on a file that goes with the time.

    A run that is killed leaves the file, but no lock. Raises `GblmError` where another run is in
    the folder, or the file cannot be made.
    """
    lock = FileLock(file, timeout=0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise GblmError(f"{folder} is in use by another run; wait, or go elsewhere") from None
    except OSError as error:
        raise GblmError(f"{folder}: {error.strerror}; give another folder") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is ours
        lock.release()


def claimed(folder: Path) -> AbstractContextManager[None]:
    """Keep other runs out of an output folder for a time: see `locked`."""
    place = Path(os.path.realpath(folder))
    return locked(folder, place.with_name(f".{place.name}.lock"))
