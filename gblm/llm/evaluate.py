"""Perplexity of a language model, as published; accuracy of a classifier."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gblm.base import Batch
from gblm.llm.adapters import adapter
from gblm.llm.heads import REGRESSION, SEVERAL, classifies, problem
from gblm.llm.loss import losses
from gblm.llm.models import length_of, vocabulary
from gblm.llm.replay import inputs_of
from gblm.machine import processes
from gblm.machine.device import BatchSize
from gblm.walk.blocks import micro_batches, size, to_device

POSITIONS = 4096  # of a batch of windows, at most
LOGITS = 2**25  # about so many of them


def metrics(
    model: PreTrainedModel,
    batch: Batch,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Return what a model is judged by, by name: see `classified` and `perplexity`."""
    if classifies(model.config):
        return classified(model, batch, progress=progress)
    return {"perplexity": perplexity(model, batch, progress=progress)}


def perplexity(
    model: PreTrainedModel,
    windows: Tensor | Batch,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Return exp of the mean, over windows, of the mean loss over a window's targets.

    windows: token ids `[n, t]`, each with t − 1 targets, or samples with `labels` of their own: the
    continuation of an encoder-decoder, the masked tokens of a masked model, an answer. Source: the
    published code of GBLM (arXiv 2311.04902).
    """
    batch = {"input_ids": windows} if isinstance(windows, Tensor) else windows
    most = min(POSITIONS, LOGITS // vocabulary(model.config))
    mean = measured(model, batch, most, partial(losses, model), progress)
    return mean.double().mean().exp().item()


def classified(
    model: PreTrainedModel,
    batch: Batch,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Return the `accuracy` (percent of the labels) and the `cross_entropy` of a classifier.

    batch: samples with `labels`. Where the model gives numbers: their `squared_error`, the mean.
    """
    several = problem(model.config) == SEVERAL

    def measure(logits: Tensor, some: Batch) -> Tensor:
        labels, loss = some["labels"], losses(model, logits, some)
        right = (logits > 0) == (labels > 0) if several else logits.argmax(dim=-1) == labels
        asked = labels != -100
        counts = [own.reshape(len(loss), -1).sum(dim=1) for own in (right & asked, asked)]
        return torch.stack([loss, *counts], dim=1)

    if problem(model.config) == REGRESSION:
        found = measured(model, batch, POSITIONS, partial(losses, model), progress)
        return {"squared_error": found.double().mean().item()}
    found = measured(model, batch, POSITIONS, measure, progress).double()
    loss, right, asked = found[:, 0].mean(), found[:, 1].sum(), found[:, 2].sum()
    return {"accuracy": (100 * right / asked).item(), "cross_entropy": loss.item()}


def measured(
    model: PreTrainedModel,
    batch: Batch,
    positions: int,
    measure: Callable[[Tensor, Batch], Tensor],
    progress: Callable[[int, int], None],
) -> Tensor:
    """Return what is measured of the logits of every sample `[n, …]`; several processes share them.

    positions: about so many go together. measure(logits, batch): of some samples.
    """
    total = size(batch)

    def run(step: int) -> list[Tensor]:
        found, done = [], 0
        for part in micro_batches(batch, step, adapter(model)):
            some = to_device(part.batch, model.device)
            found.append(measure(model(**inputs_of(model, some)).logits, some))
            progress(done := done + size(some), total)
        return found

    if total >= processes.world():
        batch = processes.share(batch)
        total = size(batch)
    step = max(1, min(total, positions // length_of(batch)))
    with torch.no_grad():
        values = torch.cat(BatchSize(step, auto=True).run(run)).cpu()
    return torch.cat(processes.gathered(values))
