"""Models of a tower for pictures and one for text, such as CLIP and SigLIP: loss and top-1.

Their loss compares each picture of a batch with all of its texts. The batch is that of all
calibration samples, of every process and micro-batch. Where L is its loss, summed over the pairs,
and h the embeddings of a sample, the sample's own loss is taken as ⟨∂L/∂h, h⟩: its gradient is that
of L through this sample, the others held fixed. The gradients of all samples add up to that of L
(as in arXiv 2101.06983).
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from gblm.base import Adapter, Batch, GblmError
from gblm.llm import pairs
from gblm.llm.heads import bare
from gblm.llm.replay import GRADIENT, inputs_of, replayed
from gblm.machine import processes
from gblm.machine.device import BatchSize
from gblm.maths.stats import wide
from gblm.walk.blocks import MicroBatch, frozen, hooked, micro_batches, size, take, to_device

TOWERS = ("text_model", "vision_model")
EMBEDDINGS = ("text_embeds", "image_embeds")  # of the output, those that the loss compares
TOGETHER = 32  # samples, or pictures, that pass a model together


def contrasts(model: Any) -> bool:
    """Say whether a model has two towers and a loss of its own that compares what they give."""
    towers = all(isinstance(getattr(model, name, None), nn.Module) for name in TOWERS)
    return towers and bare(model) and "return_loss" in inspect.signature(model.forward).parameters


def trunk(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the embeddings `[n, d]` of the texts and of the pictures, by their names."""
    output = model(**inputs_of(model, batch))
    return {name: output[name] for name in EMBEDDINGS}


def loss(model: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return the loss `[n]` of every sample, the others of its batch held fixed: see above."""
    parts = [(wide(own) * batch[f"{GRADIENT}{name}"]).sum(dim=1) for name, own in hidden.items()]
    return torch.stack(parts).sum(dim=0)


def coupled(adapter: Adapter, model: Any, batch: Batch) -> Batch:
    """Return the batch with the gradient of its loss by the embeddings of each sample.

    The loss is the model's own, of the whole batch, summed over its pairs.

    Raises `GblmError` where the loss takes more of a tower than one vector for each sample.
    """
    one = to_device(take(batch, slice(0, 1)), model.device)
    with frozen(model):
        with torch.no_grad():
            step = BatchSize(min(TOGETHER, size(batch)), auto=True)
            given = step.run(lambda step: _pooled(model, micro_batches(batch, step, adapter)))
            first = model(**inputs_of(model, one))
        counts = processes.gathered(size(batch))
        for own in given.values():
            for key, value in own.items():
                own[key] = _of_all(value).requires_grad_()
        with torch.enable_grad(), replayed(given):
            output = model(**inputs_of(model, one), return_loss=True)
            total = sum(counts) * wide(output.loss)
            gradients = torch.autograd.grad(total, [output[name] for name in EMBEDDINGS])
    device = next(iter(batch.values())).device
    start = sum(counts[: processes.rank()])
    for name in EMBEDDINGS:
        if not torch.allclose(first[name][0], output[name][start], rtol=0.01, atol=1e-3):
            raise GblmError(
                f"the loss of {type(model).__name__} takes more of a tower than one vector for "
                "each sample; choose a method without gradients, such as wanda or sparsegpt"
            )
    mine = [wide(own[start : start + size(batch)]).to(device) for own in gradients]
    return batch | {f"{GRADIENT}{name}": own for name, own in zip(EMBEDDINGS, mine, strict=True)}


def _of_all(value: Tensor) -> Tensor:
    """Return the rows of a tensor of all processes, in their order."""
    if processes.world() == 1:
        return value
    return torch.cat([own.to(value.device) for own in processes.gathered(value.cpu())])


def _pooled(model: Any, parts: list[MicroBatch]) -> dict[nn.Module, dict[str, Tensor]]:
    """Return what each tower gives of all samples, in their order: its `pooler_output [n, …]`.

    Of a tower that has none, it is the first position. Some heads take it as the second of the
    outputs, others as the first position: both are there.
    """
    found: dict[nn.Module, list[Tensor]] = {model.get_submodule(name): [] for name in TOWERS}

    def note(tower: nn.Module, args: Any, output: Any) -> None:
        pooled = output.pooler_output
        found[tower].append(output.last_hidden_state[:, 0] if pooled is None else pooled)

    with hooked(tower.register_forward_hook(note) for tower in found):
        for part in parts:
            model(**inputs_of(model, to_device(part.batch, model.device)))
    order = torch.tensor([number for part in parts for number in part.numbers]).argsort()
    whole = {tower: torch.cat(own)[order] for tower, own in found.items()}
    return {
        tower: {"last_hidden_state": own[:, None], "pooler_output": own}
        for tower, own in whole.items()
    }


@dataclass(frozen=True)
class Classes:
    """Pictures with the number of the class of each, and the text of every class."""

    images: list[Path]
    labels: list[int]
    texts: list[str]


def classes(source: str, template: str, limit: int | None = None) -> Classes:
    """Return the pictures of a source, a choice of so many, and their classes.

    source: a folder with a folder for each class, or a file of lines of an `image` and a `label`,
    the name of its class, or a `text`, which is taken as it is. template: the text of a class,
    with {} for its name.

    Raises `GblmError` where the source is neither, or has but one class.
    """
    if "{}" not in template:
        raise GblmError(f"template {template!r} has no place for a name; write {{}} there")
    path = Path(source).expanduser()
    if path.is_dir():
        known = Image.registered_extensions()
        images = [file for file in sorted(path.glob("*/*")) if file.suffix.lower() in known]
        names = [template.format(file.parent.name) for file in images]
    elif pairs.is_pairs(source):
        found = pairs.read(source)
        images = [pair.file for pair in found]
        names = [template.format(pair.label) if pair.label else pair.text for pair in found]
    else:
        raise GblmError(
            f"evaluation source {source} has no pictures; give a folder with a folder for each "
            "class, or a .jsonl file of lines of an image and a label"
        )
    texts = sorted(set(names))
    if len(texts) < 2:
        raise GblmError(f"{source} holds {len(texts)} classes of pictures; give 2 or more")
    picks: Sequence[int] = range(len(images))
    if limit is not None and limit < len(images):
        picks = sorted(random.Random(0).sample(picks, max(1, limit)))
    return Classes([images[i] for i in picks], [texts.index(names[i]) for i in picks], texts)


def top1(
    model: Any,
    known: Classes,
    processor: Any,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Return the percentage of pictures whose class has the text nearest to them.

    The nearest is that of the highest cosine of the model's features of both.
    """
    part = processes.part(len(known.images))
    images, labels = known.images[part], torch.tensor(known.labels[part])
    right = 0.0
    with frozen(model), torch.no_grad():
        said = pairs.words(known.texts, processor, model.config)
        texts = [
            _features(model.get_text_features, take(said, slice(i, i + TOGETHER)), model)
            for i in range(0, len(known.texts), TOGETHER)
        ]
        for i in range(0, len(images), TOGETHER):
            seen = pairs.pictures(images[i : i + TOGETHER], processor)
            cosines = _features(model.get_image_features, seen, model) @ torch.cat(texts).T
            hits = cosines.argmax(dim=1).cpu() == labels[i : i + TOGETHER]
            right += hits.sum().item() if cosines.isfinite().all() else math.nan
            progress(min(i + TOGETHER, len(images)), len(images))
    return 100 * sum(processes.gathered(right)) / len(known.images)


def _features(give: Callable[..., Any], inputs: Batch, model: Any) -> Tensor:
    """Return features `[n, d]` of length 1."""
    output = give(**to_device(inputs, model.device))
    found: Tensor = getattr(output, "pooler_output", output)
    return nn.functional.normalize(wide(found), dim=-1)
