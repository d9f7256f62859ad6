"""How far a model is from what it was: KL(dense ‖ now) of its logits on some samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gblm.base import GblmError
from gblm.machine import processes
from gblm.machine.offload import offload_of
from gblm.maths import logits
from gblm.walk.blocks import MicroBatch, frozen, micro_batches, size, to_device
from gblm.walk.head import hidden
from gblm.walk.walk import Walk

Part = tuple[MicroBatch, Any]  # some samples, and what the dense model's head takes of them


def check(walk: Walk, what: str, instead: str) -> None:
    """Raise `GblmError` where there are no logits, or the model is not whole in memory."""
    if walk.adapter.logits is None:
        raise GblmError(f"{what} needs an adapter with logits; give it some, or {instead}")
    if offload_of(walk.model):
        raise GblmError(f"{what} needs the whole model in memory; use {instead} to offload it")


def dense(walk: Walk, most: int) -> list[Part]:
    """Return the samples of a walk with what the head of the model, as it is, takes of them.

    most: samples that go together.
    """
    parts = []
    with frozen(walk.model), torch.no_grad():
        for some in micro_batches(walk.batch, most, walk.adapter) if walk.samples else ():
            given = hidden(walk, to_device(some.batch, walk.device))
            parts.append((some, tree_map(walk.placement.rest, given)))
    return parts


def divergence(walk: Walk, part: Part) -> Tensor:
    """Return the sum over samples of the mean over positions of KL(dense ‖ now)."""
    some, known = part
    batch, head = to_device(some.batch, walk.device), walk.adapter.logits
    assert head is not None
    own = head(walk.model, hidden(walk, batch), batch)
    with torch.no_grad():
        dense = head(walk.model, tree_map(walk.placement.wake, known), batch)
    each = logits.divergence(own, dense)
    return each.flatten(1).mean(dim=1).sum() if each.ndim > 1 else each.sum()


@torch.no_grad()
def mean_divergence(walk: Walk, parts: Sequence[Part]) -> float:
    """Return the mean over the samples of all processes."""
    total = sum(divergence(walk, part).item() for part in parts)
    sums = processes.gathered((total, sum(size(some.batch) for some, _ in parts)))
    return sum(own for own, _ in sums) / max(1, sum(count for _, count in sums))
