"""Scores: the importance of every weight, `[out, in]`; low is pruned first.

Each takes the weight `[out, in]` in fp32 and the statistics of its linear. Every division by a
count and every alpha stands here, and nowhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gblm import kernels
from gblm.base import GblmError, Pattern, Solver, Statistics
from gblm.maths import stats

FUSED_WINDOW = 32  # the widest m that one kernel scores and selects
NORMS = {"l1": "grad_abs", "l2": "grad_sq"}


@dataclass(frozen=True)
class Terms:
    """What |W| is multiplied by to give a score: a_j + α·G.

    inputs: a `[in]`; gradient: G `[out, in]`; either may be None.
    """

    inputs: Tensor | None = None
    gradient: Tensor | None = None
    alpha: float = 1.0

    def times(self, weight: Tensor) -> Tensor:
        """Return the score |W|·(a_j + α·G) `[out, in]`."""
        if self.gradient is None:
            return weight.abs() if self.inputs is None else weight.abs().mul_(self.inputs)
        if self.inputs is None:
            return weight.abs().mul_(self.gradient).mul_(self.alpha)
        return (self.alpha * self.gradient).add_(self.inputs).mul_(weight.abs())


Score = Callable[[Tensor, Statistics], Tensor]
Factor = Callable[[Statistics], Terms]


def lift(score: Score, factor: Factor | None = None) -> Solver:
    """Return the solver that keeps what the pattern keeps of a score, and leaves it unchanged.

    factor: where the score is |W|·(a_j + α·G), these terms; then one kernel does it all for n:m.
    """
    return partial(_mask, score=score, factor=factor)


def _mask(
    weight: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    score: Score,
    factor: Factor | None,
) -> tuple[Tensor, Tensor]:
    if factor and (n_of_m := _fused(weight, pattern)):
        from gblm.kernels.score_mask import score_mask

        terms = factor(statistics)
        new, keep, sound = score_mask(weight, terms.inputs, terms.gradient, terms.alpha, *n_of_m)
        if not sound:
            finite(score(weight, statistics), "score")
        return new, keep
    keep = pattern.keep(finite(score(weight, statistics), "score"))
    return weight * keep, keep


def _fused(weight: Tensor, pattern: Pattern) -> tuple[int, int] | None:
    """Return n and m where the kernel can take a weight and its pattern."""
    n, m = pattern.kept, pattern.window
    if n is None or m is None or m > FUSED_WINDOW or m & (m - 1):  # m must be a power of 2
        return None
    return (n, m) if weight.dtype == torch.float32 and kernels.usable(weight) else None


def magnitude(weight: Tensor, statistics: Statistics) -> Tensor:
    """Score |W|."""
    return weight.abs()


def gradient(weight: Tensor, statistics: Statistics, norm: str = "l1") -> Tensor:
    """Score |W|·‖G‖ (arXiv 2311.04902, section 3)."""
    return gradient_terms(statistics, norm).times(weight)


def gradient_terms(statistics: Statistics, norm: str = "l1") -> Terms:
    """Return the terms of `gradient`."""
    return Terms(gradient=gradient_norm(statistics, norm))


def wanda(weight: Tensor, statistics: Statistics) -> Tensor:
    """Score |W|·‖X‖₂ (Wanda, arXiv 2306.11695, eq. 1)."""
    return wanda_terms(statistics).times(weight)


def wanda_terms(statistics: Statistics) -> Terms:
    """Return the terms of `wanda`."""
    return Terms(input_norm(statistics))


def gblm(
    weight: Tensor, statistics: Statistics, alpha: float | str = 100, norm: str = "l1"
) -> Tensor:
    """Score |W|·(‖X‖₂ + α·‖G‖ₚ) (GBLM, arXiv 2311.04902, eq. 4).

    alpha = "auto" gives both terms the same median: α = median ‖X‖₂ / median ‖G‖ₚ of this linear,
    so that the score depends neither on the scale of the loss nor on the number of samples.
    """
    return gblm_terms(statistics, alpha, norm).times(weight)


def gblm_terms(statistics: Statistics, alpha: float | str = 100, norm: str = "l1") -> Terms:
    """Return the terms of `gblm`."""
    inputs, gradients = input_norm(statistics), gradient_norm(statistics, norm)
    if alpha == "auto":
        # Medians of 0 say that most inputs, or gradients, are: their means are not, or all are 0.
        middle = gradients.median() if gradients.median() > 0 else gradients.mean()
        top = inputs.median() if inputs.median() > 0 else inputs.mean()
        alpha = (top / middle).item() if middle > 0 else 0.0
    return Terms(inputs, gradients, float(alpha))


def ria(weight: Tensor, statistics: Statistics, power: float = 0.5) -> Tensor:
    """Score (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|)·‖X_j‖₂^power (RIA, ICLR 2024).

    The paper is "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
    Models"; its code has Wanda's ‖X‖₂. A row or column of zeros scores 0.
    """
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    rows = size.sum(dim=1, keepdim=True).clamp_min(tiny)
    columns = size.sum(dim=0).clamp_min(tiny)
    return (size / columns + size / rows) * input_norm(statistics) ** power


def pruner_zero(weight: Tensor, statistics: Statistics, norm: str = "l2") -> Tensor:
    """Score |W|²·σ(‖G‖), σ(x) = (x − min x) / (max x − min x) (Pruner-Zero, arXiv 2406.02924).

    Minimum and maximum are of the whole weight; where they are equal, σ is 1.
    """
    gradients = gradient_norm(statistics, norm)
    low, high = gradients.min(), gradients.max()
    scaled = (gradients - low) / (high - low) if high > low else torch.ones_like(gradients)
    return weight.square() * scaled


def wanda_plus(weight: Tensor, statistics: Statistics, alpha: float = 100) -> Tensor:
    """Score |W|·(α·G + ‖X‖₂), G = √(Σ g² / samples) (Wanda++, arXiv 2503.04992, eq. 4).

    g are the regional gradients of every sample: of the norm of its block's output. A linear that
    no such gradient reaches has G = 0.
    """
    gradients = (statistics["grad_sq"] / max(1, statistics.differentiated)).sqrt()
    return weight.abs() * (alpha * gradients + input_norm(statistics))


def input_norm(statistics: Statistics) -> Tensor:
    """Return ‖X‖₂ `[in]` = √(Σ over samples and positions of x² / samples), as published."""
    return (statistics["input_sq"] / statistics.samples).sqrt()


def gradient_norm(statistics: Statistics, norm: str) -> Tensor:
    """Return ‖G‖ₚ `[out, in]`: l1 = Σ |g|, l2 = √(Σ g²) over samples; not divided, as published.

    Where some of the samples were differentiated, their sum stands for that of all.
    """
    total = statistics[NORMS[norm]]
    if 0 < statistics.differentiated < statistics.samples:
        total = total * (statistics.samples / statistics.differentiated)
    return total if norm == "l1" else total.sqrt()


def finite(value: Tensor, what: str) -> Tensor:
    """Return the value; raises `GblmError` where it holds a NaN or an Inf."""
    if not stats.is_finite(value):
        raise GblmError(
            f"the {what} holds a NaN or an Inf; check the weights and the calibration samples, "
            "or use a wider dtype"
        )
    return value
