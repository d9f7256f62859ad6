"""What a source of text holds: a data set of the hub, the demo, or a local file or folder."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gblm.base import GblmError, explained
from gblm.machine.tables import Rows, check_there, dtype_and_shape, read_arrays

Content = str | Sequence[str] | Tensor  # one text, documents, or ready windows [n, t]

WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
# One shard of a split: the sizes the data set states for the whole split cannot be checked.
C4 = {"path": "allenai/c4", "verification_mode": "no_checks"}
C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
C4_VALIDATION = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
C4_DOCUMENTS = 1100  # of the c4 evaluation, as published
# The hub's own parquet copy: the data set itself is a loading script, which no longer runs.
PTB_PATH = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"
PTB_FILES = {split: f"{PTB_PATH}/{split}/0000.parquet" for split in ("train", "test")}
PTB = {"path": "parquet", "data_files": PTB_FILES}

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
        "calibration": {**PTB, "split": "train"},
        "evaluation": {**PTB, "split": "test"},
    },
}
SOURCES = (*HUB, "demo")
DEMO_CHARACTERS = 1_000_000  # any first part of the demo's text is a sample of the whole


def read(source: str, split: str) -> Content:
    """Return what a source holds for a split, `calibration` or `evaluation`.

    That is one text, documents, or ready windows `[n, t]`; see `gblm.llm.data.calibration` for the
    sources. Raises `GblmError` where the source is missing, empty, damaged or not text.
    """
    if not source:
        raise GblmError(f"the {split} source is empty; give a path, or one of {', '.join(SOURCES)}")
    if source in HUB:
        content = _hub(source, split)
    elif source == "demo":
        from gblm.llm.demo import text

        content = text(split)[:DEMO_CHARACTERS]
    else:
        content = _local(Path(source).expanduser(), split)
    if isinstance(content, Tensor):
        return content
    if not any(text.strip() for text in ([content] if isinstance(content, str) else content)):
        raise GblmError(f"{split} text {source} is empty; give a path that holds text")
    return content


def _hub(source: str, split: str) -> Content:
    """Load a source from the hub, joined as published."""
    way = "check the connection, or give the path of a local text, .jsonl, .parquet or .npz file"
    with explained(f"the data set {source} could not be loaded", f"{way} instead"):
        import datasets

        column = "sentence" if source == "ptb" else "text"
        rows = datasets.load_dataset(**HUB[source][split])[column]
    if source == "c4":
        return rows if split == "calibration" else rows[:C4_DOCUMENTS]
    return ("\n\n" if (source, split) == ("wikitext2", "evaluation") else " ").join(rows)


def _local(path: Path, split: str) -> Content:
    """Read a local file or folder; the files of a folder are documents, in sorted order."""
    where = f"{split} text {path}"
    check_there(path, where, f"give a path, or one of {', '.join(SOURCES)}", SOURCES)
    if not path.is_dir():
        return _file(path, where)
    documents: list[str] = []
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if hidden or not file.is_file():
            continue
        content = _file(file, f"{split} text {file}")
        if isinstance(content, Tensor):
            raise GblmError(f"{where} holds ready windows; give {file} alone")
        documents += [content] if isinstance(content, str) else content
    return documents


def _file(path: Path, where: str) -> Content:
    """Read one file by its ending: texts, or windows `input_ids [n, t]` as int64."""
    name = path.name.lower()
    way = "check its rights, and that it is whole and what its ending says"
    with explained(f"{where} cannot be read", way):
        if name.endswith((".npz", ".safetensors")):
            (ids,) = read_arrays(path, ["input_ids"], where)
            no_integers = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
            if ids.ndim == 2 and ids.numel() and not no_integers:
                return ids.long()
            found = dtype_and_shape(ids)
            raise GblmError(f"{where}: `input_ids` is {found}; give integers [n, t]")
        if name.endswith(".parquet"):
            rows = Rows([path])
            if "text" in (names := rows.schema.names):
                return [_text(row, f"{where}, row {i}") for i, row in enumerate(rows["text"], 1)]
            raise GblmError(f"{where} has no `text` column, only {', '.join(names)}; rename one")
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as handle:
            if name.removesuffix(".gz").endswith((".json", ".jsonl")):
                return _json(handle, where)
            return _decode(handle.read(), where).replace("\r\n", "\n")


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
    first = next((line for line in handle if line.strip()), b"null")
    handle.seek(0)
    try:
        one_a_line = not isinstance(json.loads(first), list)
    except ValueError:  # a line of an object or of a list, or no JSON
        one_a_line = False
    if one_a_line:
        rows = ((f"{where}, line {number}", line) for number, line in enumerate(handle, 1))
        return [_text(_parse(line, place), place) for place, line in rows if line.strip()]
    value = _parse(handle.read(), where)
    items = value if isinstance(value, list) else [value]
    return [_text(item, f"{where}, item {number}") for number, item in enumerate(items, 1)]


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(data, where))
    except json.JSONDecodeError as error:
        line = "" if ", line " in where else f", line {error.lineno}"
        raise GblmError(
            f"{where}{line} is not JSON ({error.msg} at column {error.colno}); repair that line"
        ) from None


def _text(row: Any, where: str) -> str:
    """Return the text of a row: a string, or an object with a `text` field."""
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise GblmError(f"{where} has no `text` field that is a string; give each row one")
    return text
