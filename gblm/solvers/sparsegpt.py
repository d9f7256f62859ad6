"""SparseGPT: choose a mask column by column and let the columns to the right make up for it."""

import torch
from torch import Tensor

from gblm.base import GblmError, Pattern, Statistics
from gblm.scores import finite


def solve(
    weight: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    damping: float = 0.01,
    columns: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune by the score w² / [U]ⱼⱼ² and spread each column's error over the columns after it.

    U is the upper Cholesky factor of (H + damping·mean(diag H)·I)⁻¹ with H = 2·XᵀX / samples. The
    mask of an unstructured pattern is chosen for `columns` columns at a time, that of n:m for m.

    weight: [out, in]. Returns (weight, keep), both [out, in].
    Raises `GblmError` where H cannot be factored. Source: arXiv 2301.00774, algorithm 1.
    """
    weight = weight.clone()
    factor, dead = inverse_factor(statistics, damping)
    weight[:, dead] = 0
    keep = torch.zeros_like(weight, dtype=torch.bool)
    inputs = weight.shape[1]
    for start in range(0, inputs, columns):
        stop = min(start + columns, inputs)
        block, u = weight[:, start:stop], factor[start:stop, start:stop]
        window = pattern.window or stop - start
        errors = torch.zeros_like(block)
        for j in range(stop - start):
            if j % window == 0:
                chosen = slice(j, j + window)
                score = block[:, chosen].square() / u.diagonal()[chosen].square()
                keep[:, start:stop][:, chosen] = pattern.keep(finite(score, "score"))
            dropped = block[:, j] * ~keep[:, start + j]
            errors[:, j] = dropped / u[j, j]
            block[:, j] -= dropped
            block[:, j + 1 :].addr_(errors[:, j], u[j, j + 1 :], alpha=-1)
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return weight * keep, keep


def inverse_factor(statistics: Statistics, damping: float) -> tuple[Tensor, Tensor]:
    """Return U `[in, in]` of the damped H, and which inputs `[in]` never were anything but 0."""
    hessian = 2 * statistics["input_gram"] / statistics.samples
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    lower, info = torch.linalg.cholesky_ex(hessian)
    if not info:
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if info:
        raise GblmError(
            "input_gram is too badly conditioned to factor; use more calibration samples"
        )
    return upper, dead
