"""How good an image classifier is: top-1, top-5 and cross-entropy."""

from collections.abc import Callable, Collection

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gblm.base import Batch, GblmError
from gblm.machine import processes
from gblm.vit.adapters import logits
from gblm.walk.blocks import frozen


def evaluate(
    model: nn.Module,
    loader: Collection[Batch],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Return `top1` and `top5` (percent of the images) and `cross_entropy` (mean, in nats).

    The batches have `images [n, c, h, w]` and `labels [n]`; they are moved to the model's device
    and dtype. A model with several heads is judged by what it gives in evaluation, their average.
    With fewer than 5 classes top-5 is 100. Several processes add up what they find.

    Raises `GblmError` where there is no image or no label.
    """
    parameter = next(model.parameters())
    totals = torch.zeros(4, dtype=torch.float64)
    with frozen(model), torch.no_grad():
        for done, batch in enumerate(loader, 1):
            if "labels" not in batch:
                raise GblmError("the evaluation images have no labels; give a labelled source")
            scores = logits(model, batch["images"].to(parameter)).float()
            labels = batch["labels"].to(scores.device)
            hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
            top1, top5 = hits[:, 0].sum().item(), hits.any(dim=1).sum().item()
            nats = cross_entropy(scores, labels, reduction="sum").item()
            totals += torch.tensor([len(labels), top1, top5, nats], dtype=torch.float64)
            progress(done, len(loader))
    images, top1, top5, nats = torch.stack(processes.gathered(totals)).sum(dim=0).tolist()
    if not images:
        raise GblmError("there is no image to evaluate on; give a source that holds some")
    names = ("top1", "top5", "cross_entropy")
    return dict(zip(names, (100 * top1 / images, 100 * top5 / images, nats / images), strict=True))
