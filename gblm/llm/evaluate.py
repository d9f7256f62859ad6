"""Perplexity of a causal language model, as published."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gblm.llm.adapters import window_loss
from gblm.llm.models import vocabulary
from gblm.machine import processes
from gblm.machine.device import BatchSize

POSITIONS = 4096  # of a batch of windows, at most
LOGITS = 2**25  # about so many of them


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Return exp of the mean, over windows, of the mean loss over a window's t − 1 targets.

    windows: token ids `[n, t]`. Source: the published code of GBLM (arXiv 2311.04902).
    """

    def run(step: int) -> list[Tensor]:
        losses, done = [], 0
        for ids in windows.to(model.device).split(step):
            losses.append(window_loss(model(input_ids=ids, use_cache=False).logits, ids))
            progress(done := done + len(ids), len(windows))
        return losses

    if len(windows) >= processes.world():
        windows = processes.share({"windows": windows})["windows"]
    most = min(POSITIONS, LOGITS // vocabulary(model.config))
    step = max(1, min(len(windows), most // windows.shape[1]))
    with torch.no_grad():
        losses = torch.cat(BatchSize(step, auto=True).run(run)).cpu()
    losses = torch.cat(processes.gathered(losses))
    return losses.double().mean().exp().item()
