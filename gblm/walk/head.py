"""The head and the loss in micro-batches, and what a forward pass keeps for backward."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from gblm.base import Adapter, Batch, GblmError
from gblm.machine.device import MicroBatch
from gblm.machine.offload import offload_of
from gblm.walk.survey import size, take

HEAD = 2**27  # bytes that the head keeps for backward, at most but for a single sample


def head_backward(
    model: nn.Module, hidden: Any, batch: Batch, adapter: Adapter, micro: MicroBatch
) -> list[Tensor]:
    """Return the gradients of the samples' losses by the leaves of what the head takes.

    The head runs in micro-batches.
    """
    leaves, spec = tree_flatten(hidden)
    leaves = [leaf.detach() for leaf in leaves]
    gradients = [torch.zeros_like(leaf) for leaf in leaves]  # a head need not use them all

    def differentiate(start: int, step: int) -> int:
        part = slice(start, start + step)
        parts = [leaf[part].requires_grad_() for leaf in leaves]
        with saved(model) as storages:
            losses = adapter.loss(model, tree_unflatten(parts, spec), take(batch, part))
        finite(losses, start).sum().backward()
        for x, gradient in zip(parts, gradients, strict=True):
            if x.grad is not None:
                gradient[part] = x.grad
        return sum(storages.values())

    def sweep(step: int) -> None:
        # The first sample says how many at a time: the logits of many are the largest tensor.
        step = max(1, min(step, HEAD // max(1, differentiate(0, 1))))
        for start in range(1, size(batch), step):
            differentiate(start, step)

    # Of its own: a head that is short of memory says nothing about the blocks.
    MicroBatch(micro.samples, micro.auto).run(sweep)
    return gradients


@contextmanager
def saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Give the bytes of every storage that a forward pass saves for backward, but for weights."""

    def places() -> set[int]:
        return {own.untyped_storage()._cdata for own in model.parameters()}

    weights = None if offload_of(model) else places()  # those that come and go are asked anew
    storages: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in (weights or places()):  # which fake tensors have, too
            storages[storage._cdata] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield storages


def finite(losses: Tensor, start: int) -> Tensor:
    """Return the losses of the samples from `start` on; raises `GblmError` for NaN and Inf."""
    for i, loss in enumerate(losses.tolist()):
        if not math.isfinite(loss):
            raise GblmError(
                f"the loss of calibration sample {start + i} is {loss}; check the weights and the "
                "calibration samples, or use a wider dtype"
            )
    return losses
