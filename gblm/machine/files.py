"""The folder of a result: checked before work is spent, written beside, then renamed."""

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from gblm.base import GblmError


def check_output(folder: Path, size: int, overwrite: bool) -> None:
    """Raise `GblmError` where a result of `size` bytes cannot be written to the folder.

    That is where the folder holds something and `overwrite` is not given, where it is a file, where
    rights are missing, or the disk is too full.
    """
    parent = _parent(folder, "output")
    if folder.is_dir():
        _writable(folder, folder, "output")
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
    try:
        there = folder.exists()
    except OSError as error:  # no folder can have that name
        raise GblmError(f"{what} {str(folder)[:60]}…: {error.strerror}; give another") from error
    if there and not folder.is_dir():
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
def locked(folder: Path, file: Path) -> Iterator[None]:
    """Keep other runs out of a folder for a time, by a lock on a file that goes with the time.

    A run that is killed leaves the file, but no lock. Raises `GblmError` where another run is in
    the folder, or the file cannot be made.
    """
    handle = _lock(folder, file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        handle.close()


def _lock(folder: Path, file: Path) -> IO[str]:
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = file.open("a")
        except OSError as error:
            raise GblmError(f"{folder}: {error.strerror}; give another folder") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise GblmError(f"{folder} is in use by another run; wait, or go elsewhere") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(file.stat(), os.fstat(handle.fileno())):
                return handle
        handle.close()  # of a run that ended between our opening of its file and our lock


def claimed(folder: Path) -> AbstractContextManager[None]:
    """Keep other runs out of an output folder for a time: see `locked`."""
    whole = folder.absolute()
    return locked(folder, whole.with_name(f".{whole.name}.lock"))


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
