"""What a source of text holds: a data set of the hub, the demo, or a local file or folder."""

from __future__ import annotations

import difflib
import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from gblm.base import GblmError

Found = str | Sequence[str] | Tensor  # one text, documents, or ready windows [n, t]

WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
# One shard of a split: the sizes the data set states for the whole split cannot be checked.
C4 = {"path": "allenai/c4", "verification_mode": "no_checks"}
C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
C4_VALIDATION = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
C4_DOCUMENTS = 1100  # of the c4 evaluation, as published
# The hub's own parquet copy: the data set itself is a loading script, which no longer runs.
PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"
PTB_FILES = {split: f"{PTB}/{split}/0000.parquet" for split in ("train", "test")}

HUB: dict[str, dict[str, dict[str, Any]]] = {  # arguments of datasets.load_dataset
    "c4": {
        "calibration": {**C4, "data_files": C4_TRAIN, "split": "train"},
        "evaluation": {**C4, "data_files": C4_VALIDATION, "split": "validation"},
    },
    "wikitext2": {
        "calibration": {**WIKITEXT, "split": "train"},
        "evaluation": {**WIKITEXT, "split": "test"},
    },
    "ptb": {
        "calibration": {"path": "parquet", "data_files": PTB_FILES, "split": "train"},
        "evaluation": {"path": "parquet", "data_files": PTB_FILES, "split": "test"},
    },
}
SOURCES = (*HUB, "demo")
DEMO_CHARACTERS = 1_000_000  # any first part of the demo's text is a sample of the whole


def read(source: str, split: str) -> Found:
    """Return what a source holds for a split, `calibration` or `evaluation`.

    That is one text, documents, or ready windows `[n, t]`; see `gblm.llm.data.calibration` for the
    sources. Raises `GblmError` where the source is missing, empty, damaged or not text.
    """
    if source in HUB:
        found = _hub(source, split)
    elif not source:
        raise GblmError(f"the {split} source is empty; give a path, or one of {', '.join(SOURCES)}")
    elif source == "demo":
        from gblm.llm.demo import text

        found = text(split)[:DEMO_CHARACTERS]
    else:
        found = _local(Path(source).expanduser(), split)
    if isinstance(found, Tensor):
        return found
    if not any(part.strip() for part in ([found] if isinstance(found, str) else found)):
        raise GblmError(f"{split} text {source} is empty; give a path that holds text")
    return found


def _hub(source: str, split: str) -> Found:
    """Load a source from the hub, joined as published."""
    where = HUB[source][split]
    try:
        import datasets

        rows = datasets.load_dataset(**where)["sentence" if source == "ptb" else "text"]
    except Exception as error:  # whatever the hub, the network or the cache had against it
        raise GblmError(
            f"the data set {source} could not be loaded ({_reason(error)}); check the connection, "
            "or give the path of a local text, .jsonl, .parquet or .npz file instead"
        ) from error
    if source == "c4":
        return rows if split == "calibration" else rows[:C4_DOCUMENTS]
    return ("\n\n" if (source, split) == ("wikitext2", "evaluation") else " ").join(rows)


def _local(path: Path, split: str) -> Found:
    """Read a local file or folder; the files of a folder are documents, in sorted order."""
    with _reading(f"{split} text {path}"):
        if not path.exists():
            raise GblmError(f"{split} text {path}: no such file or source{_nearest(path)}")
        if not path.is_dir():
            return _file(path, f"{split} text {path}")
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
    documents: list[str] = []
    for file in files:
        found = _file(file, f"{split} text {file}")
        if isinstance(found, Tensor):
            raise GblmError(f"{split} text {path} holds ready windows; give {file} alone")
        documents += [found] if isinstance(found, str) else found
    return documents


def _nearest(path: Path) -> str:
    """Say which source or neighbouring file has the nearest name."""
    names = {name: name for name in SOURCES} if path.parent == Path() else {}
    if path.parent.is_dir():
        names |= {file.name: str(file) for file in path.parent.iterdir()}
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"; did you mean {names[near[0]]}?"
    return f"; give a path, or one of {', '.join(SOURCES)}"


def _file(path: Path, where: str) -> Found:
    """Read one file by its ending."""
    with _reading(where):
        name = path.name.lower()
        if name.endswith((".npz", ".safetensors")):
            return _windows(path, where)
        if name.endswith(".parquet"):
            return _parquet(path, where)
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as handle:
            if name.removesuffix(".gz").endswith((".json", ".jsonl")):
                return _json(handle, where)
            return _decode(handle.read(), where).replace("\r\n", "\n")


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn whatever a reader raises on a damaged or forbidden file into a `GblmError`."""
    try:
        yield
    except GblmError:
        raise
    except Exception as error:  # every format has exceptions of its own
        raise GblmError(
            f"{where} cannot be read ({_reason(error)}); check its rights, and that it is whole "
            "and what its ending says"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise GblmError(
            f"{where} is not UTF-8 (byte {data[error.start]:#04x} at {error.start}); "
            "save it as UTF-8"
        ) from None


def _json(handle: IO[bytes] | gzip.GzipFile, where: str) -> list[str]:
    """Read documents from JSON: a list, or one object or string a line."""
    first = next((line for line in handle if line.strip()), b"")
    handle.seek(0)
    if not first:
        return []
    if _one_a_line(first):
        rows = ((f"{where}, line {number}", line) for number, line in enumerate(handle, 1))
        return [_text(_parse(line, place), place) for place, line in rows if line.strip()]
    whole = _parse(handle.read(), where)
    items = whole if isinstance(whole, list) else [whole]
    return [_text(item, f"{where}, item {number}") for number, item in enumerate(items, 1)]


def _one_a_line(first: bytes) -> bool:
    """Whether the first line of a JSON file is complete and no list."""
    if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(data, where))
    except json.JSONDecodeError as error:
        line = "" if ", line " in where else f", line {error.lineno}"
        raise GblmError(
            f"{where}{line} is not JSON ({error.msg} at column {error.colno}); repair that line"
        ) from None


def _text(item: Any, where: str) -> str:
    """Return the text of a row: a string, or an object with a `text` field."""
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise GblmError(f"{where} has no `text` field that is a string; give each row one")
    return text


def _parquet(path: Path, where: str) -> list[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if "text" not in names:
            raise GblmError(f"{where} has no `text` column, only {', '.join(names)}; rename one")
        rows = file.read(columns=["text"])["text"].to_pylist()
    return [_text(row, f"{where}, row {number}") for number, row in enumerate(rows, 1)]


def _windows(path: Path, where: str) -> Tensor:
    """Read `input_ids [n, t]` of a `.npz` or `.safetensors` file as int64."""
    if path.name.lower().endswith(".npz"):
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name == "input_ids"}
            names = list(file.files)
    else:
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            arrays = {name: file.get_tensor(name) for name in names if name == "input_ids"}
    if not arrays:
        raise GblmError(f"{where} has no `input_ids`, only {', '.join(names)}; rename one")
    ids = arrays["input_ids"]
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise GblmError(
            f"{where}: `input_ids` is {ids.dtype} {list(ids.shape)}; give integers [n, t]"
        )
    return torch.from_numpy(ids.astype(np.int64))
