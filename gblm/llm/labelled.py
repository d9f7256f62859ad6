"""Texts with labels, for classifiers of texts and of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from gblm.base import Batch, GblmError, nearest
from gblm.llm.heads import REGRESSION, SEVERAL, TOKENS, head, problem
from gblm.llm.models import positions
from gblm.llm.sources import TEXTS, Row, table
from gblm.walk.blocks import joined

LABELS = ("label", "labels", "tags", "ner_tags")


def read(source: str, split: str) -> list[Row]:
    """Return the rows of a source for a split; raises `GblmError` where it is no table."""
    if found := table(source, split):
        return found
    raise GblmError(
        f"{split} source {source} is no table of texts with labels; give a .jsonl or .csv file "
        "with a `text` and a `label` in each row, or calibrate by the model's own predictions "
        "(--unlabelled)"
    )


def batch(
    rows: Sequence[Row],
    config: PreTrainedConfig,
    tokenizer: Any,
    length: int | None = None,
    labelled: bool = True,
) -> Batch:
    """Return rows as samples `input_ids [n, t]`, …, with `labels`, padded to the longest.

    A row has a `text`, with a `text_pair` where the model compares two, and a `label`; of a
    classifier of tokens `tokens`, a list of words, and `labels`, one for each word, which stands
    at the word's first token. length: of the longest text; the rest of it is cut off.

    Raises `GblmError` for a row that lacks these, and for a label that the model does not have.
    """
    most = [length, positions(config), getattr(tokenizer, "model_max_length", None)]
    cut = {"truncation": True, "max_length": min(n for n in most if n)}
    by_word = head(config) == TOKENS
    samples = []
    for place, row in rows:
        text = _cell(row, ("tokens", "words") if by_word else (*TEXTS, "sentence"), place)
        if by_word != isinstance(text, list):
            raise GblmError(f"{place}: give {'`tokens`, a list of words' if by_word else 'a text'}")
        found = tokenizer(text, row.get("text_pair"), is_split_into_words=by_word, **cut)
        one = {name: torch.tensor([own]) for name, own in found.items()}
        one.setdefault("attention_mask", torch.ones_like(one["input_ids"]))
        if labelled:
            way = "add it, or take the model's own predictions (--unlabelled)"
            label = _cell(row, LABELS, place, way)
            targets: Any = (
                _of_words(label, text, found, config, place)
                if by_word
                else target(label, config, place)
            )
            one["labels"] = torch.tensor([targets])
        samples.append(one)
    return joined(samples)


def target(label: Any, config: Any, place: str) -> int | float | list[float]:
    """Return the number of a label, given by number or by name (`label2id` of config.json).

    A list of labels of a model that gives several at once is a list of 0 and 1; of a regression a
    label is a number. Raises `GblmError`, which says where, for any other.
    """
    kind = problem(config)
    if kind == SEVERAL:
        if not isinstance(label, list):
            raise GblmError(f"{place}: the model gives several labels at once; give a list of them")
        held = {_number(own, config, place) for own in label}
        return [float(i in held) for i in range(config.num_labels)]
    if kind == REGRESSION:
        try:
            return float(label)
        except (TypeError, ValueError):
            raise GblmError(f"{place}: label {label!r} is no number, as the model gives") from None
    return _number(label, config, place)


def _number(label: Any, config: Any, place: str) -> int:
    known: dict[str, int] = config.label2id or {}
    if isinstance(label, str) and label in known:
        return known[label]
    number = int(label) if str(label).isdecimal() else -1
    if 0 <= number < config.num_labels:
        return number
    names = ", ".join(list(known)[:8]) + (", …" if len(known) > 8 else "")
    raise GblmError(
        f"{place}: the model has no label {label!r}; {nearest(str(label), known)}"
        f"it has {names}, or 0 to {config.num_labels - 1}"
    )


def _of_words(
    labels: Any, words: list[str], found: Any, config: PreTrainedConfig, place: str
) -> list[int]:
    """Return the targets of tokens: a word's label at its first token, −100 at the others."""
    if not isinstance(labels, list) or len(labels) != len(words):
        raise GblmError(f"{place}: give a list of labels, one for each of its {len(words)} tokens")
    if not getattr(found, "encodings", None):
        raise GblmError("the tokenizer does not say which word a token is of; save a fast one")
    numbers = [_number(own, config, place) for own in labels]
    places = found.word_ids()
    return [
        -100 if word is None or word == before else numbers[word]
        for word, before in zip(places, [None, *places], strict=False)
    ]


def _cell(row: dict[str, Any], names: Sequence[str], place: str, way: str = "add it") -> Any:
    """Return the first of these columns that a row has; raises `GblmError` where it has none."""
    found = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if found is None:
        raise GblmError(f"{place} has no `{names[0]}`; {way}")
    return found
