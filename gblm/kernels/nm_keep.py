"""The mask of n:m in one pass over the scores, without a sort."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # groups of m for one program


def reference(score: Tensor, n: int, m: int) -> Tensor:
    """Return the mask by a stable sort of every group: see `nm_keep`."""
    groups = score.reshape(-1, m)
    order = torch.sort(groups, dim=1, stable=True).indices[:, m - n :]
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter_(1, order, True).view_as(score)


def nm_keep(score: Tensor, n: int, m: int) -> Tensor:
    """Return the mask of the n highest of every m neighbours `[out, in]`; ties keep the later.

    A score is kept where fewer than n others of its group are above it.
    """
    score = score.contiguous()
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    groups = score.numel() // m
    width = triton.next_power_of_2(m)
    _kernel[(triton.cdiv(groups, BLOCK),)](
        score, keep, groups, KEPT=n, OF=m, WIDTH=width, BLOCK_G=BLOCK, num_warps=4
    )
    return keep


@triton.jit
def _kernel(
    score,
    keep,
    groups,
    KEPT: tl.constexpr,
    OF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    g = tl.cast(tl.program_id(0), tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    j = tl.arange(0, WIDTH)
    at = g[:, None] * OF + j[None, :]
    inside = (g[:, None] < groups) & (j[None, :] < OF)
    own = tl.load(score + at, mask=inside, other=0.0)
    above = tl.zeros((BLOCK_G, WIDTH), dtype=tl.int32)
    for k in tl.static_range(OF):
        other = tl.sum(tl.where(j[None, :] == k, own, 0.0), axis=1)[:, None]  # from registers
        above += ((other > own) | ((other == own) & (k > j[None, :]))).to(tl.int32)
    tl.store(keep + at, above < KEPT, mask=inside)
