"""The zeros of a pruned model: where they are, and how they stay while it is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gblm.maths import stats
from gblm.walk.blocks import hooked

SHARE = 0.05  # of a matrix that is 0, above which it counts as pruned


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the keep-mask of every pruned matrix of a model, True where it is not 0, by its name.

    A matrix is a parameter of two dimensions or more; more than 5 % of a pruned one are 0.
    """
    matrices = {n: own.detach() for n, own in model.named_parameters() if own.squeeze().ndim > 1}
    found = {name: own != 0 for name, own in matrices.items()}
    return {name: keep for name, keep in found.items() if stats.sparsity(keep) > SHARE}


@contextmanager
def frozen_zeros(
    model: nn.Module, optimizer: Any = None, keep: dict[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Keep the zeros of a pruned model at 0 for a time, and give its masks.

    After every step of the optimizer, and at the end, what was 0 at the start is 0. Without an
    optimizer gradients are 0 there instead, which suffices for SGD, Adam and AdamW. keep: the masks
    where the model has changed since.
    """
    keep = masks(model) if keep is None else keep
    owners = {name: own for name, own in model.named_parameters() if name in keep}

    def again(*_: Any) -> None:
        with torch.no_grad():
            for name, own in owners.items():
                own.mul_(keep[name].to(own.device))

    if optimizer is not None:
        hooks = [optimizer.register_step_post_hook(again)]
    else:
        hooks = [
            own.register_hook(lambda gradient, mask=keep[name]: gradient * mask.to(gradient.device))
            for name, own in owners.items()
            if own.requires_grad
        ]
    with hooked(hooks):
        yield keep
        again()
