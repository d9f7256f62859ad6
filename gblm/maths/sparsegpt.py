"""SparseGPT: choose a mask column by column and let the columns to the right make up for it."""

import torch
from torch import Tensor

from gblm.base import GblmError, Pattern, Statistics
from gblm.maths.scores import finite


def solve(
    weight: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    keep: Tensor | None = None,
    *,
    damping: float = 0.01,
    columns: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune by the score w² / [U]ⱼⱼ² and spread each column's error over the columns after it.

    U is the upper Cholesky factor of (H + damping·mean(diag H)·I)⁻¹ with H = 2·XᵀX / samples. The
    mask of an unstructured pattern is chosen for `columns` columns at a time, that of n:m for m;
    with `keep`, a mask `[out, in]`, none is chosen and the columns make up for that one.

    weight: [out, in]. Returns (weight, keep), both [out, in].
    Raises `GblmError` where H cannot be factored. Source: arXiv 2301.00774, algorithm 1.
    """
    factor, dead = inverse_factor(statistics, damping)
    rows = weight.T.masked_fill(dead[:, None], 0).contiguous()  # one per column: [in, out]
    choose = keep is None
    keep = torch.zeros_like(rows, dtype=torch.bool) if keep is None else keep.T.contiguous()
    if pattern.window:  # a column block holds whole windows
        columns = max(1, columns // pattern.window) * pattern.window
    for start in range(0, len(rows), columns):
        stop = min(start + columns, len(rows))
        block, u = rows[start:stop], factor[start:stop, start:stop]
        diagonal = u.diagonal()[:, None]
        window = pattern.window or len(block)
        errors = torch.empty_like(block)
        for first in range(0, len(block), window):
            part = slice(first, min(first + window, len(block)))
            kept = keep[start:stop][part]
            if choose:
                score = (block[part] / diagonal[part]).square()
                kept.copy_(pattern.keep(finite(score, "score").T).T)
            scale = ~kept / diagonal[part]
            for j in range(part.start, part.stop):
                torch.mul(block[j], scale[j - first], out=errors[j])
                block[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        rows[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return rows.mul_(keep).T.contiguous(), keep.T.contiguous()


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
