"""How good an image classifier is: top-1, top-5 and cross-entropy."""

from collections.abc import Callable, Collection

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gblm.base import Batch, GblmError
from gblm.machine import processes
from gblm.walk.blocks import frozen

Progress = Callable[[int, int], None]  # batches done, of how many


def evaluate(
    model: nn.Module,
    loader: Collection[Batch],
    progress: Progress = lambda done, total: None,
) -> dict[str, float]:
    """Return `top1` and `top5` (percent of the images) and `cross_entropy` (mean, in nats).

    The batches have `images [n, c, h, w]` and `labels [n]`; they are moved to the model's device
    and dtype. A model with several heads is judged by what it gives in evaluation, their average.
    With fewer than 5 classes top-5 is 100. Several processes add up what they find.

    Raises `GblmError` where there is no image or no label.
    """
    parameter = next(model.parameters())
    images = first = five = 0
    nats = 0.0
    with frozen(model), torch.no_grad():
        for done, batch in enumerate(loader, 1):
            if "labels" not in batch:
                raise GblmError("the evaluation images have no labels; give a labelled source")
            logits = model(batch["images"].to(parameter)).float()
            labels = batch["labels"].to(logits.device)
            highest = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            images += len(labels)
            first += int(highest[:, 0].sum())
            five += int(highest.any(dim=1).sum())
            nats += cross_entropy(logits, labels, reduction="sum").item()
            progress(done, len(loader))
    totals = processes.gathered((images, first, five, nats))
    images, first, five, nats = (sum(found) for found in zip(*totals, strict=True))
    if not images:
        raise GblmError("there is no image to evaluate on; give a source that holds some")
    return {
        "top1": 100 * first / images,
        "top5": 100 * five / images,
        "cross_entropy": nats / images,
    }
