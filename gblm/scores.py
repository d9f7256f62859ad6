"""Scores: the importance of every weight, `[out, in]`; low is pruned first.

Each takes the weight `[out, in]` in fp32 and the statistics of its linear. Every division by a
count and every alpha stands here, and nowhere else.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gblm.base import GblmError, Method, Pattern, Statistics

Score = Callable[[Tensor, Statistics], Tensor]

NORMS = {"l1": "grad_abs", "l2": "grad_sq"}


def masked(name: str, needs: Iterable[str], score: Score, group: str = "row") -> Method:
    """Lift a score into a method: keep what the pattern keeps of the score, leave it unchanged."""

    def solve(weight: Tensor, statistics: Statistics, pattern: Pattern) -> tuple[Tensor, Tensor]:
        keep = pattern.keep(finite(score(weight, statistics), "score"))
        return weight * keep, keep

    return Method(name, frozenset(needs), solve, group)


def magnitude(weight: Tensor, statistics: Statistics) -> Tensor:
    """Score |W|."""
    return weight.abs()


def gradient(weight: Tensor, statistics: Statistics, norm: str = "l1") -> Tensor:
    """Score |W|·‖G‖ (arXiv 2311.04902, section 3)."""
    return weight.abs() * gradient_norm(statistics, norm)


def wanda(weight: Tensor, statistics: Statistics) -> Tensor:
    """Score |W|·‖X‖₂ (Wanda, arXiv 2306.11695, eq. 1)."""
    return weight.abs() * input_norm(statistics)


def gblm(
    weight: Tensor, statistics: Statistics, alpha: float | str = 100, norm: str = "l1"
) -> Tensor:
    """Score |W|·(‖X‖₂ + α·‖G‖ₚ) (GBLM, arXiv 2311.04902, eq. 4).

    alpha = "auto" gives both terms the same median: α = median ‖X‖₂ / median ‖G‖ₚ of this linear,
    so that the score depends neither on the scale of the loss nor on the number of samples.
    """
    inputs, gradients = input_norm(statistics), gradient_norm(statistics, norm)
    if alpha == "auto":
        # Medians of 0 say that most inputs, or gradients, are: their means are not, or all are 0.
        middle = gradients.median() if gradients.median() > 0 else gradients.mean()
        top = inputs.median() if inputs.median() > 0 else inputs.mean()
        alpha = (top / middle).item() if middle > 0 else 0.0
    return (float(alpha) * gradients).add_(inputs).mul_(weight.abs())


def ria(weight: Tensor, statistics: Statistics, power: float = 0.5) -> Tensor:
    """Score (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|)·‖X_j‖₂^power (RIA, ICLR 2024).

    The paper is "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
    Models"; its code has Wanda's ‖X‖₂. A row or column of zeros scores 0.
    """
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    rows = size.sum(dim=1, keepdim=True).clamp_min(tiny)
    columns = size.sum(dim=0, keepdim=True).clamp_min(tiny)
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

    g are the regional gradients of every sample: of the norm of its block's output.
    """
    gradients = (statistics["grad_sq"] / statistics.samples).sqrt()
    return weight.abs() * (alpha * gradients + input_norm(statistics))


def input_norm(statistics: Statistics) -> Tensor:
    """Return ‖X‖₂ `[in]` = √(Σ over samples and positions of x² / samples), as published."""
    return (statistics["input_sq"] / statistics.samples).sqrt()


def gradient_norm(statistics: Statistics, norm: str) -> Tensor:
    """Return ‖G‖ₚ `[out, in]`: l1 = Σ |g|, l2 = √(Σ g²) over samples; not divided, as published."""
    return statistics["grad_abs"] if norm == "l1" else statistics["grad_sq"].sqrt()


def finite(value: Tensor, what: str) -> Tensor:
    """Return the value; raises `GblmError` where it holds a NaN or an Inf."""
    if not torch.isfinite(value).all():
        raise GblmError(
            f"the {what} holds a NaN or an Inf; check the weights and the calibration samples, "
            "or use a wider dtype"
        )
    return value
