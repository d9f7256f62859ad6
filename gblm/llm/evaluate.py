"""Perplexity of a language model, as published."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gblm.base import Batch
from gblm.llm.adapters import adapter, inputs_of, losses
from gblm.llm.models import vocabulary
from gblm.machine import processes
from gblm.machine.device import BatchSize
from gblm.walk.blocks import micro_batches, size, to_device

POSITIONS = 4096  # of a batch of windows, at most
LOGITS = 2**25  # about so many of them


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
    total = size(batch)

    def run(step: int) -> list[Tensor]:
        found, done = [], 0
        for part in micro_batches(batch, step, adapter(model)):
            some = to_device(part.batch, model.device)
            found.append(losses(model, model(**inputs_of(model, some)).logits, some))
            progress(done := done + size(some), total)
        return found

    if total >= processes.world():
        batch = processes.share(batch)
        total = size(batch)
    most = min(POSITIONS, LOGITS // vocabulary(model.config))
    step = max(1, min(total, most // batch["input_ids"].shape[1]))
    with torch.no_grad():
        mean = torch.cat(BatchSize(step, auto=True).run(run)).cpu()
    mean = torch.cat(processes.gathered(mean))
    return mean.double().mean().exp().item()
