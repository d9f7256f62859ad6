"""Pictures or recordings with text, for models that see or hear: samples, and exact answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.base import Batch, GblmError, explained

WORDS = ("text", "question", "prompt")


@dataclass(frozen=True)
class Pair:
    """A picture, what is asked of it or said, the answer and its class, empty for none.

    Or a recording, and what is said there.
    """

    file: Path
    text: str
    answer: str = ""
    label: str = ""


def is_pairs(source: str) -> bool:
    """Say whether a source is a local file of pairs: lines of JSON, `image` or `audio` in each."""
    path = Path(source).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next(lines, "")
    return '"image"' in first or '"audio"' in first


def read(source: str, kind: str = "image") -> list[Pair]:
    """Return the pairs of a file, whose images lie relative to it, or recordings ("audio").

    A line is `{"image": "x.png", "text": "What is it?", "answer": "a cat"}`, or without an answer.
    Raises `GblmError` with the line that is none.
    """
    path = Path(source).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        raise GblmError(f"{source} is no .jsonl file of lines of an {kind} and a text; give one")
    pairs = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        with explained(f"{path}, line {number} is no pair", f"give an {kind} and a text, as JSON"):
            row = json.loads(line)
            text = next((row[word] for word in WORDS if word in row), "")
            rest = (str(row.get(name, "")) for name in ("answer", "label"))
            pairs.append(Pair(path.parent / row[kind], str(text), *rest))
    if missing := [pair.file for pair in pairs if not pair.file.is_file()]:
        raise GblmError(f"{path}: {missing[0]} is not there; paths are relative to that file")
    if not pairs:
        raise GblmError(f"{path} holds no pair; give lines of an {kind} and a text")
    return pairs


def prompt(pair: Pair, processor: Any) -> str:
    """Return what the model is asked: by its chat template, or the image token and the text."""
    if getattr(processor, "chat_template", None):
        said = [{"type": "image"}, {"type": "text", "text": pair.text}]
        asked: str = processor.apply_chat_template(
            [{"role": "user", "content": said}], add_generation_prompt=True
        )
        return asked
    token = getattr(processor, "image_token", None) or "<image>"
    return f"{token}{pair.text} " if pair.answer else f"{token}{pair.text}"


def inputs(pair: Pair, processor: Any, text: str) -> dict[str, Tensor]:
    """Return what the processor makes of a picture and a text, `[1, …]` each."""
    return dict(processor(images=[_opened(pair.file)], text=[text], return_tensors="pt"))


def _opened(path: Path) -> Any:
    from PIL import Image

    with explained(f"{path} is no picture", "save it anew"), Image.open(path) as image:
        return image.convert("RGB")


def pictures(paths: list[Path], processor: Any) -> Batch:
    """Return the `pixel_values [n, …]` of pictures alone."""
    images = [_opened(path) for path in paths]
    return dict(processor.image_processor(images=images, return_tensors="pt"))


def words(texts: list[str], processor: Any, config: Any) -> Batch:
    """Return the `input_ids [n, t]` of texts alone, cut to what the model can take, and their mask.

    Texts of SigLIP are filled up to that without a mask, as it was trained.
    """
    whole = config.model_type.startswith("siglip")
    options = {"padding": "max_length" if whole else True, "truncation": True}
    most = config.get_text_config().max_position_embeddings
    found = dict(processor.tokenizer(texts, max_length=most, return_tensors="pt", **options))
    return {"input_ids": found["input_ids"]} if whole else found


def contrasted(pairs: list[Pair], processor: Any, config: Any, template: str) -> Batch:
    """Return pairs as samples of a model that compares pictures with texts.

    template: the text of a pair that has a label alone, with {} for that.
    """
    texts = [pair.text or template.format(pair.label) for pair in pairs]
    said = words(texts, processor, config)
    return said | pictures([pair.file for pair in pairs], processor)


def batch(pairs: list[Pair], processor: Any) -> Batch:
    """Return pairs as samples with `labels`, padded to the longest; −100 where nothing is asked.

    The targets are the answer and the end of the text, or all text where there is no answer.
    """
    end = processor.tokenizer.eos_token or ""
    samples = []
    for pair in pairs:
        asked = prompt(pair, processor)
        one = inputs(pair, processor, f"{asked}{pair.answer}{end}" if pair.answer else asked)
        labels = one["input_ids"].clone()
        if pair.answer:
            labels[:, : inputs(pair, processor, asked)["input_ids"].shape[1]] = -100
        image = getattr(processor, "image_token_id", None)
        labels[labels == (-1 if image is None else image)] = -100
        samples.append(one | {"labels": labels})
    if "image_grid_thw" in samples[0]:  # its patches stand one after the other
        samples = [one | {"pixel_values": one["pixel_values"][None]} for one in samples]
    fill = {"labels": -100, "input_ids": processor.tokenizer.pad_token_id or 0}
    names = samples[0].keys()
    return {name: _padded([one[name] for one in samples], fill.get(name, 0)) for name in names}


def _padded(values: list[Tensor], fill: int) -> Tensor:
    """Return tensors `[1, …]` as one, filled up at the end of every dimension but the first."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = values[0].new_full((len(values), *shape), fill)
    for row, value in zip(padded, values, strict=True):
        row[tuple(slice(0, n) for n in value.shape[1:])] = value[0]
    return padded


def exact_match(
    model: Any,
    pairs: list[Pair],
    processor: Any,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Return the share of the answers that a model gives word by word, in percent.

    It writes the most likely token over and over; case and spaces around do not count.
    """
    right = 0
    for i, pair in enumerate(pairs, 1):
        one = {
            k: v.to(model.device)
            for k, v in inputs(pair, processor, prompt(pair, processor)).items()
        }
        most = len(processor.tokenizer(pair.answer)["input_ids"]) + 2
        with torch.no_grad():
            ids = model.generate(**one, max_new_tokens=most, do_sample=False)
        written = ids[0, one["input_ids"].shape[1] :]
        said = processor.tokenizer.decode(written, skip_special_tokens=True)
        right += said.strip().lower() == pair.answer.strip().lower()
        progress(i, len(pairs))
    return 100 * right / len(pairs)
