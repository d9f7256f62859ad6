"""The folder of a result: checked before work is spent, written beside, then renamed."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gblm.base import GblmError


def check_output(folder: Path, size: int, overwrite: bool) -> None:
    """Raise `GblmError` where a result of `size` bytes cannot be written to the folder.

    That is where the folder holds something and `overwrite` is not given, where it is a file, where
    rights are missing, or the disk is too full.
    """
    parent = _parent(folder, "output")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise GblmError(f"output {folder} is not empty; give another folder, or --overwrite")
    _writable(parent, folder, "output")
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
    _writable(folder if folder.exists() else parent, folder, "report")


def _parent(folder: Path, what: str) -> Path:
    """Return the nearest folder above that is there; raises `GblmError` where a file is instead."""
    if folder.exists() and not folder.is_dir():
        raise GblmError(f"{what} {folder} is a file; give a folder")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise GblmError(f"{what} {folder}: {parent} is a file; give a folder in a folder")
    return parent


def _writable(place: Path, folder: Path, what: str) -> None:
    if not os.access(place, os.W_OK | os.X_OK):
        raise GblmError(f"{what} {folder}: no right to write in {place}; give another folder")


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes `folder` once all is written, and goes if not."""
    folder = folder.absolute()
    # Named before it is there, so that an interruption at any time finds what to remove.
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir(mode=0o755)
        yield beside
        for file in beside.iterdir():
            file.chmod(0o644)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, old)
            os.replace(beside, folder)
            shutil.rmtree(old)
        else:
            os.replace(beside, folder)
    except OSError as error:
        raise GblmError(
            f"output {folder}: {error.strerror or error}; give another folder"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
