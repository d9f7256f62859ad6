"""Statistics: one additive function for each, and the table they are known by.

Every function adds into its sum in place, so that statistics of two sets of samples add up to
those of both: `stats(a ++ b) = stats(a) + stats(b)`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gblm import kernels
from gblm.base import Statistics

ROWS = 512  # inputs that a CPU squares at a time: so many fit into its caches
WIDE = 512  # inputs, from which on products in bfloat16 are worth their rounding
STRIP = 128  # columns of a symmetric product at a time, at least: less pays too little


def input_sq(total: Tensor, x: Tensor, dense: Tensor) -> None:
    """Add Σ x² of the inputs `x [positions, in]` to `total [in]` (arXiv 2306.11695)."""
    if x.is_cuda:
        x = wide(x)
        total += torch.einsum("pi,pi->i", x, x)
        return
    for rows in x.split(ROWS):
        total += wide(rows).square().sum(dim=0)


def input_gram(total: Tensor, x: Tensor, dense: Tensor) -> None:
    """Add XᵀX of the inputs `x [positions, in]` to `total [in, in]` (arXiv 2301.00774).

    It is symmetric: only the strips on and above the diagonal are computed, then mirrored; on a GPU
    a kernel does so by tiles.
    """
    if x.dtype in kernels.HALVES and kernels.usable(total, x):
        from gblm.kernels.input_gram import input_gram as kernel

        return kernel(total, x)
    if dense is x or not _in_half(x):
        x = wide(x)
    width = max(STRIP, len(total) // 8)
    for start in range(0, len(total), width):
        stop = start + width
        _add_product(total[start:stop, start:], x[:, start:stop], x[:, start:])
        total[stop:, start:stop] = total[start:stop, stop:].T
    return None


def cross_gram(total: Tensor, x: Tensor, dense: Tensor) -> None:
    """Add X_dᵀX to `total [in, in]`, X_d being what the dense model has in the place of X."""
    _add_product(total, dense, x if _in_half(x) else wide(x))


def _in_half(x: Tensor) -> bool:
    """Say whether products of the inputs `x [positions, in]` of both streams may be in bfloat16.

    They may where `x` is, is wide, and has a Gram matrix of full rank by itself.
    """
    return x.dtype == torch.bfloat16 and WIDE <= x.shape[1] <= len(x)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ·right to `total`: in fp32, or in bfloat16 on a CPU, in a quarter to half the time.

    That sums in fp32 and rounds its end, so each micro-batch adds an error of up to 0.2 % of every
    entry (see `_in_half`). What is fitted to both streams, with a hundredth of every diagonal entry
    added, bears it; a Gram matrix alone is not rounded: sparsegpt could no longer factor it.
    """
    if left.dtype == right.dtype == torch.bfloat16 and total.device.type == "cpu":
        total += left.T @ right
    else:
        total.addmm_(wide(left).T, wide(right))


def grad_abs(total: Tensor, size: Tensor, dy: Tensor) -> None:
    """Add one sample's |g|, `size [out, in]`, to `total [out, in]` (arXiv 2311.04902)."""
    total += size


def grad_sq(total: Tensor, size: Tensor, dy: Tensor) -> None:
    """Add one sample's g², of |g| `size [out, in]`, to `total [out, in]` (arXiv 2311.04902)."""
    total.addcmul_(wide(size), wide(size))


def grad_position(total: Tensor, size: Tensor, dy: Tensor) -> None:
    """Add Σ_out dY² of one sample's output gradient `dy [positions, out]` to `total [positions]`.

    A sample with fewer positions adds to the first of them.
    """
    if len(dy) <= len(total):
        total[: len(dy)] += wide(dy).square().sum(dim=1)


@dataclass(frozen=True)
class Statistic:
    """How a statistic is summed, and the shape of its sum by outputs, inputs and positions.

    power: the sum grows with this power of a factor on the loss.
    """

    add: Callable[[Tensor, Tensor, Tensor], None]
    shape: Callable[[int, int, int], tuple[int, ...]]
    power: int = 0


# Of the inputs of a linear; linears that see the same input share one sum.
INPUT: Mapping[str, Statistic] = {
    "input_sq": Statistic(input_sq, lambda outputs, inputs, positions: (inputs,)),
    "input_gram": Statistic(input_gram, lambda outputs, inputs, positions: (inputs, inputs)),
    "cross_gram": Statistic(cross_gram, lambda outputs, inputs, positions: (inputs, inputs)),
}

# Of the gradient of one sample's loss by the weight, or by the outputs, of a linear.
GRADIENT: Mapping[str, Statistic] = {
    "grad_abs": Statistic(grad_abs, lambda outputs, inputs, positions: (outputs, inputs), 1),
    "grad_sq": Statistic(grad_sq, lambda outputs, inputs, positions: (outputs, inputs), 2),
    "grad_position": Statistic(grad_position, lambda outputs, inputs, positions: (positions,), 2),
}


def wide(value: Tensor) -> Tensor:
    """Return a tensor in fp32, the precision of every sum; in float64 where that is its own."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def is_finite(value: Tensor) -> bool:
    """Say whether a tensor holds neither a NaN nor an Inf, by its least and greatest value."""
    if not value.numel():
        return True
    ends = torch.stack(torch.aminmax(torch.view_as_real(value) if value.is_complex() else value))
    return bool(torch.isfinite(ends).all())


def sparsity(weight: Tensor) -> float:
    """Return the share of a tensor that is 0; 0 of an empty one."""
    return (weight.numel() - weight.count_nonzero().item()) / max(1, weight.numel())


def zeros(names: Iterable[str], weight: Tensor, positions: int = 0) -> Statistics:
    """Return the statistics of no samples for a `weight [out, in]`: every sum is 0.

    positions: the input vectors of one sample.
    """
    table = {**INPUT, **GRADIENT}
    dtype = torch.promote_types(weight.dtype, torch.float32)
    outputs, inputs = weight.shape
    shapes = {name: table[name].shape(outputs, inputs, positions) for name in sorted(names)}
    return Statistics(
        {n: torch.zeros(shape, dtype=dtype, device=weight.device) for n, shape in shapes.items()}
    )


def add_inputs(
    statistics: Statistics,
    x: Tensor,
    samples: int,
    dense: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Add the inputs `x [positions, in]` of `samples` samples to every sum of inputs.

    dense: what the dense model has in their place, `[positions, in]`; the same where None.
    weights: how much each position of a sample counts, of mean 1; all alike where None. A sample
    with fewer positions takes the first of them.
    """
    streams = [x] if dense is None else [x, dense]
    positions = len(x) // max(1, samples)
    if weights is not None and positions * samples == len(x) and positions <= len(weights):
        if dense is None or not _in_half(x):
            streams = [wide(value) for value in streams]
        root = weights[:positions].to(x.device).sqrt().repeat(samples)[:, None]
        streams = [value * root.to(value.dtype) for value in streams]
    for name, total in statistics.sums.items():
        if name in INPUT:
            INPUT[name].add(total, streams[0], streams[-1])
    statistics.samples += samples
    statistics.positions += len(x)


def add_gradients(statistics: Statistics, x: Tensor, dy: Tensor) -> None:
    """Add the gradient dYᵀX of every sample to every sum of gradients.

    x: [samples, positions, in], the inputs; dy: [samples, positions, out], the gradient of each
    sample's own loss by the outputs. One sample's gradient is in memory at a time; it is computed
    in bfloat16 where dY is, as autograd does, and summed in fp32.
    """
    statistics.samples += len(x)
    statistics.differentiated += len(x)
    statistics.positions += x.shape[0] * x.shape[1]
    names = set(statistics.sums)
    halves = x.dtype == dy.dtype and x.dtype in kernels.HALVES
    if halves and kernels.usable(x, dy) and names <= {"grad_abs", "grad_sq"}:
        from gblm.kernels.gradient_sums import gradient_sums

        return gradient_sums(x, dy, *(statistics.sums.get(n) for n in ("grad_abs", "grad_sq")))
    if dy.dtype != torch.bfloat16:
        dy = wide(dy)
    x = x.to(dy.dtype)
    size = None  # of one sample after the other, in the same memory
    for sample_x, sample_dy in zip(x, dy, strict=True):
        size = torch.mm(sample_dy.T, sample_x, out=size).abs_()
        for name, total in statistics.sums.items():
            GRADIENT[name].add(total, size, sample_dy)
    return None


def unscale(statistics: Statistics, scale: float) -> None:
    """Divide every sum of gradients by what a factor `scale` on the loss has made of it."""
    for name, total in statistics.sums.items():
        total /= scale ** GRADIENT[name].power


def position_weights(gradients: Iterable[Statistics], focus: float) -> Tensor | None:
    """Return how much each position counts, `[positions]`: 1 − focus + focus·g / mean g.

    g = Σ over the samples and the linears of `grad_position`. None where they tell nothing. In a
    model that is judged by its first position alone, that one holds most of g in later blocks.
    """
    total = sum(statistics["grad_position"] for statistics in gradients)
    if not isinstance(total, Tensor) or not total.sum() > 0:
        return None
    return 1 - focus + focus * total / total.mean()
