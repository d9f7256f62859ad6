"""Structure: which units of a block go, neurons or heads, and what the others make up for.

A unit is some inputs of one linear, the reader, and the rows of others, the writers, that make
them. Least squares chooses step by step: with Z the weights that solve the problem of
`gblm.maths.admm` on the units K that are left, removing the inputs S of one of them costs

    tr Z_S·([H_KK⁻¹]_SS)⁻¹·Z_Sᵀ,

‖z_j‖² / [H_KK⁻¹]_jj for a single input j (optimal brain surgeon, Hassibi & Stork 1993). That is the
exact growth of the squared error, the weights that stay being refitted each time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gblm.base import GblmError, Statistics
from gblm.maths import stats
from gblm.maths.admm import DAMPING, Problem

MULTIPLE = 64  # of which widths are, where they are large
PANEL = 64  # single inputs that are removed before H⁻¹ and Z are written again


def kept(units: int, share: float, multiple: int = MULTIPLE) -> int:
    """Return how many units stay: the multiple nearest to (1 − share)·units, one at least.

    The multiple is halved until it is at most a sixteenth of the units.

    >>> kept(11008, 0.25), kept(768, 0.3), kept(172, 0.25), kept(9, 0.2)
    (8256, 544, 128, 7)
    """
    while multiple > max(1, units // 16):
        multiple //= 2
    return min(units, max(multiple, round((1 - share) * units / multiple) * multiple))


def unit_scores(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return Σ of the scores of each unit, `[units]`.

    parts: scores of linears, with the part of each in the units first `[n, …]`, and the places in
    it of every unit, `[units, size]`.
    """
    return sum(score.flatten(1).sum(dim=1)[places].sum(dim=1) for score, places in parts)  # type: ignore[return-value]


def solve(
    weight: Tensor,
    statistics: Statistics,
    channels: Tensor,
    count: int,
    keep: Tensor | None = None,
    *,
    damping: float = DAMPING,
    mix: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose step by step which `count` units stay, and refit their weights by least squares.

    weight: [out, in], of the reader; channels: [units, size], its inputs in each unit; keep: a mask
    `[units]` that is given, of which only the weights are sought; mix: the share of the dense
    stream in the target, see `admm`. Returns (weight [out, in], keep [units]).

    Raises `GblmError` where H cannot be factored in float64 either.
    """
    for dtype in (weight.dtype, torch.float64):
        problem = Problem.of(weight, statistics, damping, mix, dtype)
        lower, info = torch.linalg.cholesky_ex(problem.hessian)
        if info:
            continue
        mask = choose(problem, lower, channels, count) if keep is None else keep
        new = refit(problem, channels[mask].flatten()) / problem.scale
        if stats.is_finite(new):
            return new.to(weight.dtype), mask
    raise GblmError("input_gram is too badly conditioned to factor; use more calibration samples")


def choose(problem: Problem, lower: Tensor, channels: Tensor, count: int) -> Tensor:
    """Return the mask `[units]` of those that stay; lower: the Cholesky factor of H."""
    inverse = torch.cholesky_inverse(lower)
    solution = problem.target @ inverse
    drop = len(channels) - count
    if channels.shape[1] == 1:
        gone = _single_inputs(inverse, solution, channels.flatten(), drop)
    else:
        gone = _units(inverse, solution, channels, drop)
    mask = torch.ones(len(channels), dtype=torch.bool, device=channels.device)
    mask[gone] = False
    return mask


def refit(problem: Problem, inputs: Tensor) -> Tensor:
    """Return the least-squares Z `[out, in]` that uses some inputs alone, 0 at the others."""
    lower = torch.linalg.cholesky(problem.hessian[inputs][:, inputs])
    new = torch.zeros_like(problem.start)
    new[:, inputs] = torch.cholesky_solve(problem.target[:, inputs].T, lower).T
    return new


def _single_inputs(inverse: Tensor, solution: Tensor, channels: Tensor, drop: int) -> Tensor:
    """Return the order in which units of one input go, as many as drop.

    Of H⁻¹ and Z only what the next choice needs is kept up to date; both are written anew, of the
    inputs that are left, after each panel of removals.
    """
    alive, gone = torch.arange(len(channels), device=channels.device), list[Tensor]()
    inverse, solution = inverse[channels][:, channels], solution[:, channels]
    while len(gone) < drop:
        steps = min(PANEL, drop - len(gone))
        rows, outputs = (
            inverse.new_empty(steps, len(alive)),
            solution.new_empty(steps, len(solution)),
        )
        diagonal, size = inverse.diagonal().clone(), solution.square().sum(dim=0)
        left = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        for k in range(steps):
            j = torch.where(left, size.clamp_min(0) / diagonal, torch.inf).argmin()
            root, before = diagonal[j].sqrt(), rows[:k, j]
            p = (inverse[j] - before @ rows[:k]) / root
            q = (solution[:, j] - before @ outputs[:k]) / root
            shared = q @ solution - (outputs[:k] @ q) @ rows[:k]
            size += p * (p * (q @ q) - 2 * shared)
            diagonal -= p.square()
            rows[k], outputs[k], left[j] = p, q, False
            gone.append(alive[j])
        inverse = (inverse - rows.T @ rows)[left][:, left]
        solution = (solution - outputs.T @ rows)[:, left]
        alive = alive[left]
    return torch.stack(gone) if gone else alive[:0]


def _units(inverse: Tensor, solution: Tensor, channels: Tensor, drop: int) -> Tensor:
    """Return the order in which units of several inputs go, as many as drop."""
    left, gone = list(range(len(channels))), list[int]()
    for _ in range(drop):
        own = channels[left]
        blocks = torch.linalg.inv(inverse[own[:, :, None], own[:, None, :]])
        parts = solution[:, own].movedim(1, 0)  # [units, out, size]
        best = int((parts @ blocks * parts).sum(dim=(1, 2)).argmin())
        inputs, block = own[best], blocks[best]
        rows = block @ inverse[inputs]
        solution = solution - solution[:, inputs] @ rows
        inverse = inverse - inverse[:, inputs] @ rows
        gone.append(left.pop(best))
    return torch.tensor(gone, dtype=torch.long, device=channels.device)
