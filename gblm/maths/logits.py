"""Losses of logits, with few of them in fp32 at a time: the logits of many are the largest tensor.

Both are autograd functions: torch's own keep several copies of all logits in fp32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gblm.maths.stats import wide

NONE = -100  # the target of a position without one
CHUNK = 2**18  # logits in fp32 at a time, which the caches of a CPU still hold


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return −log softmax(logits)[target] of every position, 0 where the target is −100.

    logits: `[…, classes]`; targets: `[…]`, as is the result, in fp32.
    """
    found: Tensor = _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten())
    return found.view(targets.shape)


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """Return KL(softmax(dense) ‖ softmax(logits)) of every position; gradients are by `logits`.

    Both are `[…, classes]`; the result is `[…]`, in fp32.
    """
    found: Tensor = _Divergence.apply(logits.flatten(0, -2), dense.flatten(0, -2))
    return found.view(logits.shape[:-1])


class _CrossEntropy(torch.autograd.Function):
    """Of logits `[n, classes]` by targets `[n]`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        norms, room = _norms(logits), _room(logits)
        for own, norm in _chunks(logits, norms):
            _write_norm(norm, room[: len(own)].copy_(own))
        known = targets != NONE
        chosen = logits.gather(-1, targets.where(known, 0)[:, None])[:, 0]
        ctx.save_for_backward(logits, targets, norms)
        return (norms - chosen).where(known, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        logits, targets, norms = ctx.saved_tensors
        known = targets != NONE
        gradient = gradients[0].where(known, 0)
        out, room = torch.empty_like(logits), _room(logits)
        for own, norm, factor, into in _chunks(logits, norms, gradient, out):
            shares = room[: len(own)].copy_(own).sub_(norm[:, None]).exp_()
            into.copy_(shares.mul_(factor[:, None]))
        rows, at = torch.arange(len(out), device=out.device), targets.where(known, 0)
        chosen = logits.gather(-1, at[:, None])[:, 0].sub(norms).exp().sub(1).mul(gradient)
        out[rows, at] = chosen.to(out.dtype)
        return out, None


class _Divergence(torch.autograd.Function):
    """Of logits `[n, classes]` from dense ones."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dense: Tensor) -> Tensor:
        norms, theirs, found = _norms(logits), _norms(dense), _norms(logits)
        room, other = _room(logits), _room(dense)
        for own, norm, before, its, into in _chunks(logits, norms, dense, theirs, found):
            p, q = room[: len(own)], other[: len(own)]
            _write_norm(norm, p.copy_(own))
            _write_norm(its, q.copy_(before))
            p.copy_(own).sub_(norm[:, None])
            q.copy_(before).sub_(its[:, None])
            into.copy_(p.sub_(q).neg_().mul_(q.exp_()).sum(dim=-1))
        ctx.save_for_backward(logits, dense, norms, theirs)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        logits, dense, norms, theirs = ctx.saved_tensors
        out, room, other = torch.empty_like(logits), _room(logits), _room(dense)
        parts = _chunks(logits, norms, dense, theirs, gradients[0], out)
        for own, norm, before, its, factor, into in parts:
            p = room[: len(own)].copy_(own).sub_(norm[:, None]).exp_()
            q = other[: len(own)].copy_(before).sub_(its[:, None]).exp_()
            into.copy_(p.sub_(q).mul_(factor[:, None]))
        return out, None


def _write_norm(norm: Tensor, logits: Tensor) -> None:
    """Write log Σ exp of the logits `[n, classes]`, which it overwrites, into `norm [n]`."""
    most = logits.amax(dim=-1, keepdim=True)
    norm.copy_(logits.sub_(most).exp_().sum(dim=-1).log_().add_(most[:, 0]))


def _norms(logits: Tensor) -> Tensor:
    """Return memory for a number of each position, in fp32."""
    return torch.empty(len(logits), dtype=wide(logits[:0]).dtype, device=logits.device)


def _room(logits: Tensor) -> Tensor:
    """Return memory for a chunk of logits, in fp32."""
    return logits.new_empty(_step(logits), logits.shape[-1], dtype=wide(logits[:0]).dtype)


def _step(logits: Tensor) -> int:
    """Return the positions of a chunk."""
    most = CHUNK if logits.device.type == "cpu" else 64 * CHUNK
    return max(1, min(len(logits), most // max(1, logits.shape[-1])))


def _chunks(*of_positions: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield some positions after the other, of each of `[n, …]`."""
    step = _step(of_positions[0])
    yield from zip(*(own.split(step) for own in of_positions), strict=True)
