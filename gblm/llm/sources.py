"""What a source of text holds: a data set of the hub, the demo, or a local file or folder."""

import csv
import gzip
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gblm.base import GblmError, explained
from gblm.machine.tables import Rows, check_there, dtype_and_shape, read_arrays

Messages = list[dict[str, str]]  # of a chat: {"role": "user", "content": "Hello"}, …
Document = str | Messages
Content = str | Sequence[Document] | Tensor  # one text, documents, or ready windows [n, t]
Row = tuple[str, Any]  # of a table: where it stands, and its cells by column

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
ANY = re.compile(r"[\w-]+/[\w-]+(:[\w.+-]+)?")  # another data set of the hub, and its split
# The splits of a data set, by the words for them in names of files and folders, best first.
SPLITS = {"calibration": ("train",), "evaluation": ("test", "validation", "valid", "val", "dev")}
NO_TEXT = ("readme.md", "dataset_infos.json", "license", "license.md", "license.txt")
# Columns of texts, of chats, and of a task, what is said to it, and its answer.
TEXTS, CHATS = ("text", "content"), ("messages", "conversations", "conversation")
ASKED, SAID = ("instruction", "prompt", "question"), ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
ROLES = {"human": "user", "gpt": "assistant"}  # other words for them
WAY = "check its rights, and that it is whole and what its ending says"
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
    elif ANY.fullmatch(source) and not Path(source).exists():
        content = _any(source, split)
    else:
        content = _local(Path(source).expanduser(), split)
    if isinstance(content, Tensor):
        return content
    documents = [content] if isinstance(content, str) else content
    if not any(text.strip() if isinstance(text, str) else text for text in documents):
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


def _any(source: str, split: str) -> Content:
    """Load `owner/name` or `owner/name:split` from the hub: documents."""
    table = _of_hub(source, split)
    return rows_of(table, table.column_names, f"{split} text {source}")


def _of_hub(source: str, split: str) -> Any:
    """Load the table `owner/name` or `owner/name:split` from the hub."""
    way = "check its name and the connection, or give a local path"
    with explained(f"{split} text {source} is no local path, nor a data set to be had", way):
        import datasets

        name, _, part = source.partition(":")
        if not part:
            parts = datasets.get_dataset_split_names(name)
            part = next((own for own in (*SPLITS[split], "train") if own in parts), parts[0])
        return datasets.load_dataset(name, split=part)


def table(source: str, split: str) -> list[Row]:
    """Return the rows of a source, each with where it stands; none where it is no table.

    Tables are `.json`, `.jsonl`, `.csv` and `.tsv`, either `.gz`, `.parquet` and those of the hub.
    """
    path = Path(source).expanduser()
    where = f"{split} text {source}"
    if path.is_file() and source not in SOURCES:
        with explained(f"{where} cannot be read", WAY):
            return _rows(path, where)
    if path.exists() or source in SOURCES or not ANY.fullmatch(source):
        return []
    return [(f"{where}, row {i}", row) for i, row in enumerate(_of_hub(source, split), 1)]


def rows_of(rows: Any, names: Sequence[str], where: str) -> list[Document]:
    """Return the documents of a table, by its columns."""
    used = [name for name in names if name in (*TEXTS, *CHATS, *ASKED, *SAID, *ANSWERS)]
    if not {*TEXTS, *CHATS, *ASKED} & {*used}:
        raise GblmError(f"{where} has no `text` column, only {', '.join(names)}; rename one")
    cells = zip(*(rows[name] for name in used), strict=True)
    found = (dict(zip(used, row, strict=True)) for row in cells)
    return [_document(row, f"{where}, row {i}") for i, row in enumerate(found, 1)]


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Return the files of a split, all where their names tell of none, as `datasets` does."""
    words = {
        file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files
    }
    others = [word for name in SPLITS if name != split for word in SPLITS[name]]
    for word in (*SPLITS[split], *others):
        if found := [file for file in files if word in words[file]]:
            return found
    return files


def _local(path: Path, split: str) -> Content:
    """Read a local file or folder; the files of a folder are documents, in sorted order.

    Where their names tell of splits, they are those of the split.
    """
    where = f"{split} text {path}"
    check_there(path, where, f"give a path, or one of {', '.join(SOURCES)}", SOURCES)
    if not path.is_dir():
        return _file(path, where)
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.name.lower() not in NO_TEXT
    ]
    documents: list[Document] = []
    for file in _of_split(files, path, split):
        content = _file(file, f"{split} text {file}")
        if isinstance(content, Tensor):
            raise GblmError(f"{where} holds ready windows; give {file} alone")
        documents += [content] if isinstance(content, str) else content
    return documents


def _file(path: Path, where: str) -> Content:
    """Read one file by its ending: texts, or windows `input_ids [n, t]` as int64."""
    name = path.name.lower()
    with explained(f"{where} cannot be read", WAY):
        if name.endswith((".npz", ".safetensors")):
            (ids,) = read_arrays(path, ["input_ids"], where)
            no_integers = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
            if ids.ndim == 2 and ids.numel() and not no_integers:
                return ids.long()
            found = dtype_and_shape(ids)
            raise GblmError(f"{where}: `input_ids` is {found}; give integers [n, t]")
        if name.endswith(".parquet"):
            rows = Rows([path])
            return rows_of(rows, rows.schema.names, where)
        if name.endswith(".tar"):
            return _samples(path, where)
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as handle:
            if name.removesuffix(".gz").endswith((".json", ".jsonl")):
                return _json(handle, where)
            if name.removesuffix(".gz").endswith((".csv", ".tsv")):
                cells = _csv(handle, name, where)
                columns = {key: [row[key] for row in cells] for key in cells[0]} if cells else {}
                return rows_of(columns, list(columns), where)
            return _decode(handle.read(), where).replace("\r\n", "\n")


def _samples(path: Path, where: str) -> list[Document]:
    """Read a shard of WebDataset: the text of each sample, or else what its JSON says."""
    import datasets

    datasets.disable_progress_bars()
    found = datasets.load_dataset("webdataset", data_files=str(path.resolve()), split="train")
    column = next((name for name in ("txt", "text", "json") if name in found.column_names), None)
    if column is None:
        held = ", ".join(name for name in found.column_names if not name.startswith("__"))
        raise GblmError(f"{where} holds no .txt and no .json, only {held}; give it one of them")
    keys = (f"{where}, sample {key}" for key in found["__key__"])
    return [_document(row, place) for row, place in zip(found[column], keys, strict=True)]


def _rows(path: Path, where: str) -> list[Row]:
    """Read the rows of one file by its ending, none of one that is no table."""
    name = path.name.lower()
    found: Any = ()
    if name.endswith(".parquet"):
        table = Rows([path])
        found = map(table.__getitem__, range(len(table)))
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as handle:
        if name.removesuffix(".gz").endswith((".json", ".jsonl")):
            return _values(handle, where)
        if name.removesuffix(".gz").endswith((".csv", ".tsv")):
            found = _csv(handle, name, where)
    return [(f"{where}, row {i}", row) for i, row in enumerate(found, 1)]


def _csv(handle: IO[bytes] | gzip.GzipFile, name: str, where: str) -> list[dict[str, str]]:
    text = io.StringIO(_decode(handle.read(), where), "")
    return list(csv.DictReader(text, delimiter="\t,"["csv" in name]))


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise GblmError(
            f"{where} is not UTF-8 (byte {data[error.start]:#04x} at {error.start}); "
            "save it as UTF-8"
        ) from None


def _json(handle: IO[bytes] | gzip.GzipFile, where: str) -> list[Document]:
    """Read documents from JSON: a list, or one object or string a line."""
    return [_document(value, place) for place, value in _values(handle, where)]


def _values(handle: IO[bytes] | gzip.GzipFile, where: str) -> list[Row]:
    """Read the values of JSON, a list or one a line, each with where it stands."""
    first = next((line for line in handle if line.strip()), b"null")
    handle.seek(0)
    try:
        one_a_line = not isinstance(json.loads(first), list)
    except ValueError:  # a line of an object or of a list, or no JSON
        one_a_line = False
    if one_a_line:
        rows = ((f"{where}, line {number}", line) for number, line in enumerate(handle, 1))
        return [(place, _parse(line, place)) for place, line in rows if line.strip()]
    value = _parse(handle.read(), where)
    items = value if isinstance(value, list) else [value]
    return [(f"{where}, item {number}", item) for number, item in enumerate(items, 1)]


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(data, where))
    except json.JSONDecodeError as error:
        line = "" if ", line " in where else f", line {error.lineno}"
        raise GblmError(
            f"{where}{line} is not JSON ({error.msg} at column {error.colno}); repair that line"
        ) from None


def _document(row: Any, where: str) -> Document:
    """Return what a row says: a string, its text, its chat, or a task and its answer as a chat."""
    fields = row if isinstance(row, dict) else {"text": row}
    own = {name: fields[name] for name in fields if fields[name] not in (None, "")}
    for name in CHATS:
        if isinstance(own.get(name), list):
            return [_message(part, where) for part in own[name]]
    text = next((own[name] for name in TEXTS if name in own), fields.get("text"))
    asked = [own[name] for names in (ASKED, SAID) for name in names if name in own]
    answer = next((own[name] for name in ANSWERS if name in own), None)
    if text is None and asked and answer is not None:
        said = {"role": "user", "content": "\n\n".join(map(str, asked))}
        return [_message(said, where), _message({"role": "assistant", "content": answer}, where)]
    if not isinstance(text, str):
        raise GblmError(
            f"{where} has no `text` field that is a string, no `messages` of a chat, and no "
            "instruction with an output; give each row one"
        )
    return _sound(text, where)


def _message(part: Any, where: str) -> dict[str, str]:
    """Return a message of a chat, by role and content or by from and value."""
    role = part.get("role") or part.get("from") if isinstance(part, dict) else None
    text = part.get("content", part.get("value")) if isinstance(part, dict) else None
    if isinstance(text, list):  # parts, of which texts are taken
        text = "\n".join(str(own.get("text", "")) for own in text if isinstance(own, dict))
    if not isinstance(role, str) or not isinstance(text, str):
        raise GblmError(f"{where}: a message has no role and content; give it both, as strings")
    return {"role": ROLES.get(role, role), "content": _sound(text, where)}


def _sound(text: str, where: str) -> str:
    """Return a text; raises `GblmError` for half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise GblmError(f"{where} holds {half}, half of a character; repair that text") from None
    return text
