"""Some of the calibration samples, and the loss of a model on them, to choose what goes by."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from gblm.base import GblmError
from gblm.machine import processes
from gblm.walk.blocks import frozen, size, take, to_device
from gblm.walk.gradients import share_of
from gblm.walk.head import hidden
from gblm.walk.walk import Walk

log = logging.getLogger(__name__)

SHARE, FEWEST = 0.125, 16  # of the samples: a part, and how many at least


def some(walk: Walk, number: int | None = None) -> Walk:
    """Return the walk of about so many samples, drawn evenly; None for an eighth, 16 at least.

    They are the same whatever the number of processes.
    """
    counts = processes.gathered(walk.samples)
    number = number or share_of(sum(counts), SHARE, FEWEST)
    stride = max(1, sum(counts) // number)
    start = -sum(counts[: processes.rank()]) % stride
    batch = walk.adapter.coupled(walk.model, walk.batch)
    return replace(walk, batch={name: value[start::stride] for name, value in batch.items()})


@torch.no_grad()
def mean_loss(walk: Walk) -> float:
    """Return the mean loss of the samples of all processes, Inf where it is not finite."""
    with frozen(walk.model):
        own = walk.micro.run(
            lambda step: _losses(replace(walk, micro=replace(walk.micro, samples=step)))
        )
    losses = [loss for part in processes.gathered(own) for loss in part]
    mean = sum(losses) / len(losses)
    return mean if math.isfinite(mean) else math.inf


def _losses(walk: Walk) -> list[float]:
    losses = list[float]()
    for part in walk.micro_batches() if walk.samples else ():
        batch = to_device(part.batch, walk.device)
        leaves, spec = tree_flatten(hidden(walk, batch))
        for i in range(size(batch)):  # the logits of many are the largest tensor
            sample = slice(i, i + 1)
            one = tree_unflatten([leaf[sample] for leaf in leaves], spec)
            losses += walk.adapter.loss(walk.model, one, take(batch, sample)).tolist()
    return losses


def least_loss(
    walk: Walk,
    gone: list[str],
    number: int,
    free: Callable[[], list[str]],
    passing: Callable[[list[str]], AbstractContextManager[None]],
) -> None:
    """Add to what goes, one after the other, that without which the loss of some is lowest.

    free: gives what can still go; passing: has the model do without some for a time. Raises
    `GblmError` where no loss is finite.
    """
    few, done, total = some(walk), 0, evaluations(len(free()), number)
    while len(gone) < number:
        losses = {}
        for name in free():
            with passing([*gone, name]):
                losses[name] = mean_loss(few)
            done += 1
            walk.progress("choice", done, total)
        best = min(losses, key=lambda name: losses[name])
        if losses[best] == math.inf:
            raise GblmError(f"without {best} the loss is not finite; choose other units")
        log.info("without %s: loss %.4f", best, losses[best])
        gone.append(best)


def evaluations(count: int, number: int) -> int:
    """Return how often the loss is taken until a number of them have gone."""
    return sum(count - gone for gone in range(number))
