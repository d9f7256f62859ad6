"""Score, n:m mask and masked weight in one pass over memory: |W|·(a_j + α·G), then W·mask."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gblm.kernels import nm_keep

BLOCK = 512  # groups of m for one program


def reference(
    weight: Tensor, inputs: Tensor | None, gradient: Tensor | None, alpha: float, n: int, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `score_mask` does, by one operation after the other."""
    score = torch.zeros_like(weight) if gradient is None else alpha * gradient
    score = weight.abs() * (score if inputs is None else score + inputs)
    keep = nm_keep.reference(score, n, m)
    return weight * keep, keep, torch.isfinite(score).all()


def score_mask(
    weight: Tensor, inputs: Tensor | None, gradient: Tensor | None, alpha: float, n: int, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the n highest |W|·(a_j + α·G) of every m neighbours; ties keep the later.

    weight: W [out, in] in fp32; inputs: a [in], 0 where None; gradient: G [out, in], 0 where None.
    m is a power of 2 that divides `in`. Returns W·keep and keep `[out, in]`, and whether all scores
    are finite (a tensor, so that nobody waits for the device).
    """
    weight = weight.contiguous()
    gradient = None if gradient is None else gradient.contiguous()
    new = torch.empty_like(weight)
    keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    bad = torch.zeros((), dtype=torch.int32, device=weight.device)
    groups = weight.numel() // m
    _kernel[(triton.cdiv(groups, BLOCK),)](
        weight,
        weight if inputs is None else inputs.contiguous(),
        weight if gradient is None else gradient,
        new,
        keep,
        bad,
        groups,
        weight.shape[1] // m,
        alpha,
        INPUTS=inputs is not None,
        GRADIENT=gradient is not None,
        KEPT=n,
        OF=m,
        BLOCK_G=BLOCK,
        num_warps=4,
    )
    return new, keep, bad == 0


@triton.jit
def _kernel(
    weight,
    inputs,
    gradient,
    new,
    keep,
    bad,
    groups,
    per_row,
    alpha,
    INPUTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    KEPT: tl.constexpr,
    OF: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # Neighbours lie along the second dimension, so that a program reads one stretch of memory.
    g = tl.cast(tl.program_id(0), tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    j = tl.arange(0, OF)
    at = g[:, None] * OF + j[None, :]
    inside = (g[:, None] < groups) & (j[None, :] < OF)
    w = tl.load(weight + at, mask=inside, other=0.0)
    score = tl.zeros((BLOCK_G, OF), dtype=tl.float32)
    if GRADIENT:
        score += alpha * tl.load(gradient + at, mask=inside, other=0.0)
    if INPUTS:
        column = (g % per_row)[:, None] * OF + j[None, :]
        score += tl.load(inputs + column, mask=inside, other=0.0)
    score *= tl.abs(w)
    wrong = (score != score) | (tl.abs(score) == float("inf"))
    tl.atomic_max(bad, tl.max(tl.max(wrong.to(tl.int32), axis=1), axis=0))
    above = tl.zeros((BLOCK_G, OF), dtype=tl.int32)
    for k in tl.static_range(OF):  # from registers: column k of every group
        other = tl.sum(tl.where(j[None, :] == k, score, 0.0), axis=1)[:, None]
        above += ((other > score) | ((other == score) & (k > j[None, :]))).to(tl.int32)
    kept = above < KEPT
    tl.store(keep + at, kept, mask=inside)
    tl.store(new + at, tl.where(kept, w, 0.0), mask=inside)
