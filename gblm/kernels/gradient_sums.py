"""Σ|dYᵀX| and Σ(dYᵀX)² over samples, no sample's gradient ever in memory."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gblm import kernels
from gblm.kernels import precision


def reference(x: Tensor, dy: Tensor, absolute: Tensor | None, squares: Tensor | None) -> None:
    """Add to both sums one sample's gradient after the other: see `gradient_sums`."""
    for sample_x, sample_dy in zip(x.float(), dy.float(), strict=True):
        gradient = sample_dy.T @ sample_x
        if absolute is not None:
            absolute += gradient.abs()
        if squares is not None:
            squares.addcmul_(gradient, gradient)


def gradient_sums(x: Tensor, dy: Tensor, absolute: Tensor | None, squares: Tensor | None) -> None:
    """Add Σ_s |dY_sᵀX_s| to `absolute` and Σ_s (dY_sᵀX_s)² to `squares`, both [out, in] in fp32.

    x: [samples, positions, in]; dy: [samples, positions, out], of one dtype; products are summed in
    fp32. A sum that is None is not wanted.
    """
    x, dy = x.contiguous(), dy.contiguous()
    samples, positions, inputs = x.shape
    outputs = dy.shape[-1]
    some = absolute if absolute is not None else squares
    assert some is not None

    def grid(options: dict[str, Any]) -> tuple[int]:
        down, across = (triton.cdiv(outputs, options["BLOCK_O"]), options["BLOCK_I"])
        return (down * triton.cdiv(inputs, across),)

    _kernel[grid](
        x,
        dy,
        some if absolute is None else absolute,
        some if squares is None else squares,
        samples,
        positions,
        outputs,
        inputs,
        ABSOLUTE=absolute is not None,
        SQUARES=squares is not None,
        PRECISION=precision(x.dtype),
        WIDEN=not x.is_cuda,  # the interpreter has no products in bfloat16
        LARGE=outputs * inputs >= 2**22,
    )


# Three tiles in fp32 are in registers at a time: one sample's gradient, and both sums.
TILES = [
    triton.Config({"BLOCK_O": o, "BLOCK_I": i, "BLOCK_P": p}, num_warps=warps, num_stages=stages)
    for o, i, p, warps, stages in [
        (64, 64, 32, 4, 3),
        (64, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 32, 8, 4),
    ]
]


@kernels.tuned(TILES, ["ABSOLUTE", "SQUARES", "LARGE"], ["absolute", "squares"])
@triton.jit
def _kernel(
    x,
    dy,
    absolute,
    squares,
    samples,
    positions,
    outputs,
    inputs,
    ABSOLUTE: tl.constexpr,
    SQUARES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # Eight rows of tiles at a time, so that what programs read together is in the L2 cache.
    number, down, across = tl.program_id(0), tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    row, column = tl.swizzle2d(number // across, number % across, down, across, 8)
    o = row * BLOCK_O + tl.arange(0, BLOCK_O)
    i = column * BLOCK_I + tl.arange(0, BLOCK_I)
    o_read, i_read = o % outputs, i % inputs  # beyond the edge something is read, not written
    sum_absolute = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    sum_squares = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for s in range(samples):
        gradient = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        first = tl.cast(s, tl.int64) * positions
        for start in range(0, positions, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            here = p < positions
            at = (first + p)[:, None]
            d = tl.load(dy + at * outputs + o_read[None, :], mask=here[:, None], other=0.0)
            v = tl.load(x + at * inputs + i_read[None, :], mask=here[:, None], other=0.0)
            if WIDEN:
                d, v = d.to(tl.float32), v.to(tl.float32)
            gradient = tl.dot(tl.trans(d), v, gradient, input_precision=PRECISION)
        if ABSOLUTE:
            sum_absolute += tl.abs(gradient)
        if SQUARES:
            sum_squares += gradient * gradient
    at = o[:, None].to(tl.int64) * inputs + i[None, :]
    inside = (o[:, None] < outputs) & (i[None, :] < inputs)
    if ABSOLUTE:
        before = tl.load(absolute + at, mask=inside, other=0.0)
        tl.store(absolute + at, before + sum_absolute, mask=inside)
    if SQUARES:
        before = tl.load(squares + at, mask=inside, other=0.0)
        tl.store(squares + at, before + sum_squares, mask=inside)
