"""Rotations of the residual stream that gather the importance of weights in few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RATE = 0.02  # of Adam, falling as a cosine
DAMPING = 0.01  # of H, times its mean diagonal


@dataclass
class Part:
    """A matrix that a rotation turns, with H = XᵀX of its inputs.

    A reader W `[out, d]` becomes WR, and its H becomes RᵀHR; a writer W `[d, in]` becomes RᵀW.
    """

    weight: Tensor
    gram: Tensor
    writes: bool = False

    def prepared(self) -> tuple[Tensor, Tensor]:
        """Return the matrix with d columns, and [H⁻¹] of a reader, its diagonal of a writer."""
        gram = self.gram / self.gram.diagonal().mean().clamp_min(1e-30)
        inverse = torch.linalg.inv(gram + DAMPING * torch.eye(len(gram)).to(gram))
        return (self.weight.T, inverse.diagonal()) if self.writes else (self.weight, inverse)


def learn(parts: Sequence[Part], steps: int, centred: bool = False) -> Tensor:
    """Return the rotation R `[d, d]` that makes the importance of weights most unequal.

    Minimises by Adam the entropy of w² / [H⁻¹]ⱼⱼ over the weights that meet in an output of a
    reader, or that an input of a writer has; d of these are drawn at every step. centred: R keeps
    the vector of ones, as norms that take the mean off need.

    Source: DenoiseRotator (arXiv 2505.23049), which leaves its rotations in the model.
    """
    known = [(*part.prepared(), part.writes) for part in parts]
    like, width = known[0][0], known[0][0].shape[1]
    free = torch.eye(width, dtype=like.dtype, device=like.device).requires_grad_()
    optimiser = torch.optim.Adam([free], RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    draw = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            rotation = rotation_of(free, centred)
            leaf = rotation.detach().requires_grad_()
            for rows, inverse, writes in known:
                picks = torch.randperm(len(rows), generator=draw)[:width].to(rows.device)
                turned = (rows[picks] @ leaf).square()
                if writes:
                    turned = turned / inverse[picks, None]
                else:
                    turned = turned / (leaf * (inverse @ leaf)).sum(dim=0)
                (entropy(turned) * len(rows) / len(picks)).backward()
            rotation.backward(leaf.grad)
            optimiser.step()
            schedule.step()
    return rotation_of(free.detach(), centred)


def entropy(importance: Tensor) -> Tensor:
    """Return the sum over rows of −Σ p log p, p being the shares of the row's values."""
    shares = importance / importance.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.special.entr(shares.clamp_min(1e-30)).sum()


def rotation_of(free: Tensor, centred: bool = False) -> Tensor:
    """Return the orthogonal matrix `[d, d]` that a free one leads to by its QR decomposition.

    centred: one that keeps the vector of ones.
    """
    if not centred:
        return torch.linalg.qr(free)[0]
    basis = torch.eye(len(free), dtype=free.dtype, device=free.device)
    basis[:, 0] = 1
    basis = torch.linalg.qr(basis)[0]  # its first vector is that of ones, or of minus ones
    turned = torch.linalg.qr(free[1:, 1:])[0]
    turned = torch.block_diag(torch.ones_like(turned[:1, :1]), turned)
    return basis @ turned @ basis.T
