"""Token windows `[n, t]` for calibration and evaluation: from the hub, the demo or a local path."""

import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gblm.base import GblmError, explained
from gblm.llm.sources import Document, read
from gblm.report.wording import counted

Tokenise = Callable[[Document], Tensor]

C4_WINDOWS = 256  # of the c4 evaluation, as published


def calibration(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int = 0,
    bos: bool = False,
) -> Tensor:
    """Draw the calibration windows `[samples, length]` (int64 token ids) from a source.

    `source` is `c4`, `wikitext2`, `ptb`, `demo`, another data set of the hub (`owner/name` or
    `owner/name:split`) or a local path: a text file, `.json`/`.jsonl`, either `.gz`, `.csv` or
    `.parquet`, a `.tar` of WebDataset with `.txt` or `.json`, a folder of those, or
    `.npz`/`.safetensors` with `input_ids [n, t]`. A row has a
    `text`, or `messages` of a chat, or an `instruction` with an `output`; the last two go through
    the tokenizer's chat template. One text is tokenised whole and every window
    starts anywhere in it. Of documents (c4, json, parquet, a folder) one is drawn until it is
    longer than a window, then its start. Where the documents longer than a window hold fewer
    windows than asked for, all are joined by a space into one text. Ready windows are taken from
    the first on, cut to `length`. The draws are those of `random.seed(seed)`. bos: every window
    begins with the tokenizer's begin-of-text token, which counts.

    Raises `GblmError` where the source is missing, empty, damaged or too short.
    Source: the published code of SparseGPT, Wanda and GBLM (arXiv 2311.04902).
    """
    _check_positive(samples=samples, length=length)
    content = read(source, "calibration")
    if isinstance(content, Tensor):
        _check_width(content, length, source)
        if len(content) < samples:
            raise GblmError(
                f"calibration windows {source}: {counted(len(content), 'window')} there, {samples} "
                f"asked for; use --samples {len(content)} or less"
            )
        return content[:samples, :length].contiguous()
    start = begin(tokenizer) if bos else []
    tokenise, length = partial(_tokens, tokenizer, start), length - len(start)
    draw = random.Random(seed)
    windows = None
    if not isinstance(content, str):
        windows = _from_documents(content, tokenise, samples, length, draw)
        if windows is None:
            draw = random.Random(seed)
    if windows is None:
        windows = _from_text(_joined(tokenise, content), samples, length, draw, source)
    return _begun(start, windows)


def evaluation(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None = None,
    bos: bool = False,
) -> Tensor:
    """Cut the evaluation text of a source into consecutive windows `[n, length]` of token ids.

    The sources are those of `calibration`. The text (wikitext2: its test split joined by two
    newlines; ptb: its test sentences joined by a space; c4: the first 1100 documents of the first
    validation shard, and at most 256 windows; other documents joined by a space) is tokenised as
    one and the ragged tail dropped; so is that of every ready window. `limit` keeps the first. bos:
    see `calibration`.

    Raises `GblmError` where the source is missing, empty, damaged or shorter than one window.
    Source: the published code of SparseGPT, Wanda and GBLM (arXiv 2311.04902).
    """
    _check_positive(length=length, limit=1 if limit is None else limit)
    content = read(source, "evaluation")
    if isinstance(content, Tensor):
        _check_width(content, length, source)
        return content[:, : content.shape[1] // length * length].reshape(-1, length)[:limit]
    start = begin(tokenizer) if bos else []
    ids, length = _joined(partial(_tokens, tokenizer, start), content), length - len(start)
    if len(ids) < length:
        raise GblmError(
            f"evaluation text {source} holds {counted(len(ids), 'token')}, less than one window of "
            f"{length}; give a longer text or a smaller --length"
        )
    windows = ids[: len(ids) // length * length].view(-1, length)
    return _begun(start, windows[: C4_WINDOWS if source == "c4" else None][:limit])


def begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the id that begins a text; raises `GblmError` where the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise GblmError("the tokenizer has no begin-of-text token; leave --bos out")
    return [int(tokenizer.bos_token_id)]


def _begun(start: list[int], windows: Tensor) -> Tensor:
    return torch.cat([torch.tensor(start).long().expand(len(windows), -1), windows], dim=1)


def _tokens(tokenizer: PreTrainedTokenizerBase, start: list[int], text: Document) -> Tensor:
    """Return the ids of a text, without those that every window gets."""
    ids = tokens(tokenizer, text)
    return ids[1:] if start and ids[:1].tolist() == start else ids


def tokens(tokenizer: PreTrainedTokenizerBase, text: Document) -> Tensor:
    """Return the ids `[t]` of a text, special tokens as the tokenizer adds them by default.

    Messages of a chat go through its chat template; raises `GblmError` where it has none.
    """
    if isinstance(text, str):
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if not getattr(tokenizer, "chat_template", None):
        raise GblmError(
            "the calibration data are chats and the tokenizer has no chat template; give texts, "
            "or add the model's chat_template.jinja to its folder"
        )
    with explained("the chat template does not take these messages", "give texts instead"):
        said = tokenizer.apply_chat_template(text, tokenize=False)
        ids = tokenizer(said, verbose=False, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)


def _joined(tokenise: Tokenise, content: str | Sequence[Document]) -> Tensor:
    """Return the ids `[t]` of one text, or of documents: texts joined by a space, chats as such."""
    if isinstance(content, str):
        return tokenise(content)
    texts = [text for text in content if isinstance(text, str)]
    if len(texts) == len(content):
        return tokenise(" ".join(texts))
    return torch.cat([tokenise(text) for text in content])


def check_ids(ids: Tensor, vocabulary: int, source: str) -> None:
    """Check that the ids `[n, t]` lie in a vocabulary; raises `GblmError` naming the first not."""
    wrong = (ids < 0) | (ids >= vocabulary)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise GblmError(
            f"{source}: token id {int(ids[row, column])} in row {row} is outside the vocabulary of "
            f"{vocabulary} (0 to {vocabulary - 1}); it was made for another model or tokenizer"
        )


def _from_text(ids: Tensor, samples: int, length: int, draw: random.Random, source: str) -> Tensor:
    """Draw windows that start anywhere in a text `[t]`."""
    if len(ids) // length < samples:
        raise GblmError(
            f"calibration text {source} holds {counted(len(ids), 'token')}, that is "
            f"{counted(len(ids) // length, 'window')} of {length}, and {samples} are asked for; "
            "give a longer text, fewer --samples or a smaller --length"
        )
    last = max(len(ids) - length - 1, 0)
    starts = [draw.randint(0, last) for _ in range(samples)]
    return torch.stack([ids[start : start + length] for start in starts])


def _from_documents(
    documents: Sequence[Document],
    tokenise: Tokenise,
    samples: int,
    length: int,
    draw: random.Random,
) -> Tensor | None:
    """Draw windows from documents longer than a window; None where those hold too few."""

    @cache  # each is tokenised once
    def long(index: int) -> Tensor | None:
        ids = tokenise(documents[index])
        return ids if len(ids) > length else None

    count = len(documents)
    if all(long(index) is None for index in range(count)):
        return None
    windows: list[Tensor] = []
    drawn: list[int] = []
    while len(windows) < samples:
        index = draw.randint(0, count - 1)
        if (ids := long(index)) is not None:
            start = draw.randint(0, len(ids) - length - 1)
            windows.append(ids[start : start + length])
            drawn.append(index)
    indices = dict.fromkeys([*drawn, *range(count)])  # mostly the documents drawn suffice
    held = (len(ids) // length for index in indices if (ids := long(index)) is not None)
    enough = any(total >= samples for total in accumulate(held))
    return torch.stack(windows) if enough else None


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise GblmError(f"{name} is {value}; give 1 or more")


def _check_width(windows: Tensor, length: int, source: str) -> None:
    if windows.shape[1] < length:
        raise GblmError(
            f"{source}: its ready windows hold {counted(windows.shape[1], 'token')}, {length} "
            f"asked for; use --length {windows.shape[1]} or less"
        )
