"""Least squares under a pattern: ADMM chooses mask and weights together, `repair` mends any mask.

Both minimise, over new weights Ŵ in the pattern,

    ‖T − Ŵ·X‖² + damping·‖(Ŵ − W)·D‖²,   D² = diag(XXᵀ),   T = W·(mix·X_d + (1 − mix)·X),

X being the inputs the linear sees, X_d those of the dense model in their place (X itself where
`cross_gram` was not collected). Columns are scaled by D, so that H = D⁻¹XXᵀD⁻¹ + damping has one
diagonal whatever the inputs are, and the same penalties serve every linear. Sources of the method:
ALPS (arXiv 2406.07831), ADMM-Grad (arXiv 2401.02938); the dense target is gblm's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gblm.base import GblmError, Pattern, Statistics
from gblm.maths import stats

DAMPING = 0.01
# The penalty of ADMM, where the diagonal of H is 1 + damping: it rises as the mask settles.
PENALTIES = tuple(0.2 * 1.44**k for k in range(5))
STEPS = 4  # with each of them
REFITS = 3  # steps of conjugate gradients from what they end with
EXACT = 500  # at most so many where the mask is given


@dataclass
class Problem:
    """The problem of a linear with its columns scaled: minimise tr Z(HZᵀ − 2Bᵀ) over Z = ŴD.

    start: W·D [out, in]; hessian: H [in, in]; target: B [out, in]; scale: the diagonal of D [in];
    dead: which inputs are all 0 [in].
    """

    start: Tensor
    hessian: Tensor
    target: Tensor
    scale: Tensor
    dead: Tensor

    @classmethod
    def of(
        cls, weight: Tensor, statistics: Statistics, damping: float, mix: float, dtype: torch.dtype
    ) -> Problem:
        """Return the problem of a weight `[out, in]`.

        Inputs that are all 0 tell nothing of their weights: these count least and are not changed.
        """
        gram = statistics["input_gram"].to(dtype) / max(1, statistics.positions)
        weight = weight.to(dtype)
        target = weight @ gram
        if mix and "cross_gram" in statistics.sums:
            cross = statistics["cross_gram"].to(dtype) / max(1, statistics.positions)
            target += mix * (weight @ cross - target)
        scale = gram.diagonal().clamp_min(0).sqrt()
        least = scale.max() * torch.finfo(dtype).eps
        dead = scale <= least
        scale = scale.masked_fill(dead, least.item() or 1.0)
        start = weight * scale
        hessian = (gram / scale / scale[:, None]).masked_fill_(dead | dead[:, None], 0)
        hessian.diagonal().masked_fill_(dead, 1).add_(damping)
        if dtype == torch.float64:  # rounding in fp32 sums can make a Gram matrix indefinite
            lowest = torch.linalg.eigvalsh(hessian)[0]
            hessian.diagonal().add_((damping - lowest).clamp_min(0))
        target = torch.where(dead, start, target / scale) + damping * start
        return cls(start, hessian, target, scale, dead)


def solve(
    weight: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    keep: Tensor | None = None,
    *,
    damping: float = DAMPING,
    mix: float = 1.0,
    products: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Choose mask and weights together by ADMM, then refit the weights of that mask.

    In turn Z ← argmin of the problem + ρ‖Z − P + U‖², P ← what the pattern keeps of Z + U by size,
    U ← U + Z − P. mix: the share of X_d in the target. keep: a mask `[out, in]` that is given; then
    P only ever keeps that, and where it leads is the refit. products: the dtype of those that look
    for a mask, where it is narrower than the weight's.

    weight: [out, in]. Returns (weight, keep), both [out, in].
    Raises `GblmError` where H cannot be factored in float64 either.
    """
    for dtype in (weight.dtype, torch.float64):
        problem = Problem.of(weight, statistics, damping, mix, dtype)
        narrow = dtype == torch.float32 and products != dtype
        if keep is None:
            found = _search(problem, pattern, products if narrow else dtype)
            if found is None:
                continue
            start, mask, steps = *found, REFITS
            start = torch.where(problem.dead, problem.start * mask, start)
        else:
            start, mask, steps = problem.start * keep, keep, EXACT
        new = refit(problem, start, mask, steps) / problem.scale
        if stats.is_finite(new):
            return new.to(weight.dtype), mask
    raise GblmError("input_gram is too badly conditioned to factor; use more calibration samples")


def repair(
    weight: Tensor, statistics: Statistics, pattern: Pattern, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """Refit the weights of a given mask by least squares on its inputs: `solve` with a mask."""
    return solve(weight, statistics, pattern, keep)


def _search(
    problem: Problem, pattern: Pattern, products: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Return the weights Z and the mask that ADMM ends with, None where H cannot be factored.

    products: the dtype of those in its steps. After the refit, masks found in bfloat16 are as good
    as those found in fp32, to 0.01 % of their error.
    """
    keep = pattern.keep(problem.start.abs())
    kept, dual = problem.start * keep, torch.zeros_like(problem.start)
    before = PENALTIES[0]
    for penalty in PENALTIES:
        shifted = problem.hessian.clone()
        shifted.diagonal().add_(penalty)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if info or not stats.is_finite(lower):
            return None
        inverse = torch.cholesky_inverse(lower)
        towards = problem.target @ inverse
        inverse = inverse.to(products)
        dual *= before / penalty  # which is scaled by the penalty
        before = penalty
        for _ in range(STEPS):
            free = towards + dual
            free.add_((kept - dual).to(products) @ inverse, alpha=penalty)
            keep = pattern.keep(free.abs())
            kept = free * keep
            dual = free.sub_(kept)  # what the pattern refuses of Z + U
    return kept, keep


def refit(problem: Problem, start: Tensor, keep: Tensor, steps: int) -> Tensor:
    """Return the least-squares Z `[out, in]` of a mask, by conjugate gradients on every row.

    start: Z to begin with, 0 outside of the mask. Ends after so many steps, or where every row's
    residual is down to eps^¾ of the first, which leaves less than 1e-6 of the error too much.
    """
    new = start.clone()
    residual = (problem.target - new @ problem.hessian) * keep
    direction = residual.clone()
    norm = residual.square().sum(dim=1, keepdim=True)
    limits = torch.finfo(norm.dtype)
    least = norm * limits.eps**1.5
    for _ in range(steps):
        curved = (direction @ problem.hessian) * keep
        curvature = (direction * curved).sum(dim=1, keepdim=True)
        step = norm / curvature
        # Rows that have arrived rest; rounding may even make a curvature negative.
        step.masked_fill_((norm <= least) | (curvature <= limits.tiny), 0)
        new += step * direction
        residual -= step * curved
        before, norm = norm, residual.square().sum(dim=1, keepdim=True)
        if (norm <= least).all():
            break
        direction = residual + norm / before.clamp_min(limits.tiny) * direction
    return new
