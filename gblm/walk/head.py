"""The head and the loss, some samples at a time, and what a forward pass keeps for backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from gblm.base import Batch, GblmError
from gblm.machine.device import halved
from gblm.machine.offload import offload_of
from gblm.walk.blocks import size, take

if TYPE_CHECKING:
    from gblm.walk.walk import Run, Walk

HEAD = 2**27  # bytes that the head keeps for backward, at most but for a single sample
FP16_SCALES = [2.0**14, 2.0**8, 2.0**2, 1.0]


def differentiate(
    walk: Walk, run: Run, scale: float, known: int, step: int
) -> tuple[list[Tensor], int]:
    """Return the gradients of the losses of a run's samples, by the leaves of what the head takes.

    scale: what the losses are multiplied by. known: how many samples the head takes at a time, 0
    where the first sample has to tell; returned, too.
    """
    leaves, spec = tree_flatten(run.hidden)
    leaves = [leaf.detach() for leaf in leaves]
    gradients = [torch.zeros_like(leaf) for leaf in leaves]  # a head need not use them all
    at = 0
    while at < size(run.batch):
        # The first sample says how many at a time: the logits of many are the largest tensor.
        piece = slice(at, at + (min(known, step) if known else 1))
        parts = [leaf[piece].requires_grad_() for leaf in leaves]
        with saved(walk.model) as storages:
            losses = walk.adapter.loss(
                walk.model, tree_unflatten(parts, spec), take(run.batch, piece)
            )
        (finite(losses, run.numbers[piece]) * scale).sum().backward()
        for x, gradient in zip(parts, gradients, strict=True):
            if x.grad is not None:
                gradient[piece] = x.grad
        at = piece.stop
        known = known or max(1, min(step, HEAD // max(1, sum(storages.values()))))
    return gradients, known


def hidden(walk: Walk, batch: Batch) -> Any:
    """Return what the head takes of some samples, in the dtype of the model."""
    dtype = next(walk.model.parameters()).dtype
    with halved(walk.model, walk.compute_dtype):
        given = walk.adapter.trunk(walk.model, batch)
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, given)


def loss_scales(model: nn.Module) -> list[float]:
    """Return what the losses of a model are multiplied by, and what next where sums are too large.

    The gradients of a mean over many positions sink below the numbers of float16.
    """
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return FP16_SCALES if half else [1.0]


@contextmanager
def saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Give the bytes of every storage that a forward pass saves for backward, but for weights."""
    weights = None if offload_of(model) else _places(model)  # those that come and go are asked anew
    storages: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in (weights or _places(model)):  # which fake tensors have, too
            storages[storage._cdata] = storage.nbytes()
        return value.detach()  # an output itself would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield storages


def _places(model: nn.Module) -> set[int]:
    return {own.untyped_storage()._cdata for own in model.parameters()}


def finite(losses: Tensor, numbers: list[int]) -> Tensor:
    """Return the losses of the samples of those numbers; raises `GblmError` for NaN and Inf."""
    for number, loss in zip(numbers, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise GblmError(
                f"the loss of calibration sample {number} is {loss}; check the weights and the "
                "calibration samples, or use a wider dtype"
            )
    return losses
