"""Token windows `[n, t]` for calibration and evaluation: from the hub, the demo or a local path."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gblm.base import GblmError
from gblm.llm.sources import read
from gblm.llm.tokens import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C4_WINDOWS = 256  # of the c4 evaluation, as published


def calibration(
    source: str, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int = 0
) -> Tensor:
    """Draw the calibration windows `[samples, length]` (int64 token ids) from a source.

    `source` is `c4`, `wikitext2`, `ptb`, `demo` or a local path: a text file, `.json`/`.jsonl`
    with a `text` field, either `.gz`, `.parquet` with a `text` column, a folder of those, or
    `.npz`/`.safetensors` with `input_ids [n, t]`. One text is tokenised whole and every window
    starts anywhere in it. Of documents (c4, json, parquet, a folder) one is drawn until it is
    longer than a window, then its start. Where the documents longer than a window hold fewer
    windows than asked for, all are joined by a space into one text. Ready windows are taken from
    the first on, cut to `length`. The draws are those of `random.seed(seed)`.

    Raises `GblmError` where the source is missing, empty, damaged or too short.
    Source: the published code of SparseGPT, Wanda and GBLM (arXiv 2311.04902).
    """
    _positive(samples=samples, length=length)
    found = read(source, "calibration")
    if isinstance(found, Tensor):
        _wide_enough(found, length, source)
        if len(found) < samples:
            raise GblmError(
                f"calibration windows {source}: {_count(len(found), 'window')} there, {samples} "
                f"asked for; use --samples {len(found)} or less"
            )
        return found[:samples, :length].contiguous()
    if not isinstance(found, str):
        windows = _from_documents(found, tokenizer, samples, length, seed)
        if windows is not None:
            return windows
        found = " ".join(found)
    return _from_text(tokens(tokenizer, found), samples, length, seed, source)


def evaluation(
    source: str, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> Tensor:
    """Cut the evaluation text of a source into consecutive windows `[n, length]` of token ids.

    The sources are those of `calibration`. The text (wikitext2: its test split joined by two
    newlines; ptb: its test sentences joined by a space; c4: the first 1100 documents of the first
    validation shard, and at most 256 windows; other documents joined by a space) is tokenised as
    one and the ragged tail dropped; so is that of every ready window. `limit` keeps the first.

    Raises `GblmError` where the source is missing, empty, damaged or shorter than one window.
    Source: the published code of SparseGPT, Wanda and GBLM (arXiv 2311.04902).
    """
    _positive(length=length, limit=1 if limit is None else limit)
    found = read(source, "evaluation")
    if isinstance(found, Tensor):
        _wide_enough(found, length, source)
        return found[:, : found.shape[1] // length * length].reshape(-1, length)[:limit]
    ids = tokens(tokenizer, found if isinstance(found, str) else " ".join(found))
    if len(ids) < length:
        raise GblmError(
            f"evaluation text {source} holds {_count(len(ids), 'token')}, less than one window of "
            f"{length}; give a longer text or a smaller --length"
        )
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows[: C4_WINDOWS if source == "c4" else None][:limit]


def check_ids(ids: Tensor, vocabulary: int, source: str) -> None:
    """Check that the ids `[n, t]` lie in a vocabulary; raises `GblmError` naming the first not."""
    wrong = (ids < 0) | (ids >= vocabulary)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise GblmError(
            f"{source}: token id {int(ids[row, column])} in row {row} is outside the vocabulary of "
            f"{vocabulary} (0 to {vocabulary - 1}); it was made for another model or tokenizer"
        )


def _from_text(ids: Tensor, samples: int, length: int, seed: int, source: str) -> Tensor:
    """Draw windows that start anywhere in a text `[t]`."""
    if len(ids) // length < samples:
        held = _count(len(ids) // length, "window")
        raise GblmError(
            f"calibration text {source} holds {_count(len(ids), 'token')}, that is {held} of "
            f"{length}, and {samples} are asked for; give a longer text, fewer --samples or a "
            "smaller --length"
        )
    draw, last = random.Random(seed), max(len(ids) - length - 1, 0)
    starts = [draw.randint(0, last) for _ in range(samples)]
    return torch.stack([ids[start : start + length] for start in starts])


def _from_documents(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
) -> Tensor | None:
    """Draw windows from documents longer than a window; None where those hold too few."""
    long: dict[int, Tensor] = {}
    short: set[int] = set()

    def look(index: int) -> None:  # every document is tokenised once at most
        if index not in long and index not in short:
            ids = tokens(tokenizer, documents[index])
            if len(ids) > length:
                long[index] = ids
            else:
                short.add(index)

    draw = random.Random(seed)
    windows: list[Tensor] = []
    while len(windows) < samples and len(short) < len(documents):
        look(index := draw.randint(0, len(documents) - 1))
        if index in long:
            start = draw.randint(0, len(long[index]) - length - 1)
            windows.append(long[index][start : start + length])

    held = sum(len(ids) // length for ids in long.values())
    for index in range(len(documents)):  # mostly the documents drawn suffice
        if held >= samples:
            return torch.stack(windows)
        if index not in long:
            look(index)
            held += len(long[index]) // length if index in long else 0
    return torch.stack(windows) if held >= samples else None


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise GblmError(f"{name} is {value}; give 1 or more")


def _wide_enough(windows: Tensor, length: int, source: str) -> None:
    if windows.shape[1] < length:
        raise GblmError(
            f"{source}: its ready windows hold {_count(windows.shape[1], 'token')}, {length} asked "
            f"for; use --length {windows.shape[1]} or less"
        )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
