"""Statistics: one additive function for each, and the table they are known by.

Every function adds into its sum in place, so that statistics of two sets of samples add up to
those of both: `stats(a ++ b) = stats(a) + stats(b)`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gblm.base import Statistics


def input_sq(total: Tensor, x: Tensor) -> None:
    """Add Σ x² of the inputs `x [positions, in]` to `total [in]` (arXiv 2306.11695)."""
    total += torch.einsum("pi,pi->i", x, x) if x.is_cuda else x.square().sum(dim=0)


def input_gram(total: Tensor, x: Tensor) -> None:
    """Add XᵀX of the inputs `x [positions, in]` to `total [in, in]` (arXiv 2301.00774)."""
    total.addmm_(x.T, x)


def grad_abs(total: Tensor, gradient: Tensor) -> None:
    """Add |g| of one sample's `gradient [out, in]` to `total [out, in]` (arXiv 2311.04902)."""
    total += gradient.abs()


def grad_sq(total: Tensor, gradient: Tensor) -> None:
    """Add g² of one sample's `gradient [out, in]` to `total [out, in]` (arXiv 2311.04902)."""
    total.addcmul_(gradient, gradient)


@dataclass(frozen=True)
class Statistic:
    """How a statistic is summed, and the shape of its sum for a weight `[out, in]`."""

    add: Callable[[Tensor, Tensor], None]
    shape: Callable[[int, int], tuple[int, ...]]


# Of the inputs of a linear; linears that see the same input share one sum.
INPUT: Mapping[str, Statistic] = {
    "input_sq": Statistic(input_sq, lambda outputs, inputs: (inputs,)),
    "input_gram": Statistic(input_gram, lambda outputs, inputs: (inputs, inputs)),
}

# Of the gradient of one sample's loss by the weight of a linear.
GRADIENT: Mapping[str, Statistic] = {
    "grad_abs": Statistic(grad_abs, lambda outputs, inputs: (outputs, inputs)),
    "grad_sq": Statistic(grad_sq, lambda outputs, inputs: (outputs, inputs)),
}


def wide(value: Tensor) -> Tensor:
    """Return a tensor in fp32, the precision of every sum; in float64 where that is its own."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def zeros(names: Iterable[str], weight: Tensor) -> Statistics:
    """Return the statistics of no samples for a `weight [out, in]`: every sum is 0."""
    table = {**INPUT, **GRADIENT}
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return Statistics(
        {
            name: torch.zeros(table[name].shape(*weight.shape), dtype=dtype, device=weight.device)
            for name in sorted(names)
        }
    )


def add_inputs(statistics: Statistics, x: Tensor, samples: int) -> None:
    """Add the inputs `x [positions, in]` of `samples` samples to every sum of inputs."""
    x = wide(x)
    for name, total in statistics.sums.items():
        if name in INPUT:
            INPUT[name].add(total, x)
    statistics.samples += samples
    statistics.positions += len(x)


def add_gradients(statistics: Statistics, x: Tensor, dy: Tensor) -> None:
    """Add the gradient dYᵀX of every sample to every sum of gradients.

    x: [samples, positions, in], the inputs; dy: [samples, positions, out], the gradient of each
    sample's own loss by the outputs. One sample's gradient is in memory at a time.
    """
    x, dy = wide(x), wide(dy)
    gradient = x.new_empty(dy.shape[-1], x.shape[-1])
    for sample_x, sample_dy in zip(x, dy, strict=True):
        torch.mm(sample_dy.T, sample_x, out=gradient)
        for name, total in statistics.sums.items():
            GRADIENT[name].add(total, gradient)
    statistics.samples += len(x)
    statistics.positions += x.shape[0] * x.shape[1]
