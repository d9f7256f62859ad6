"""Σ|dYᵀX| and Σ(dYᵀX)² over samples, no sample's gradient ever in memory."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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

    def grid(options: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(outputs, options["BLOCK_O"]), triton.cdiv(inputs, options["BLOCK_I"])

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
        BLOCK_O=64,
        BLOCK_I=64 if x.dtype == torch.float32 else 128,
        BLOCK_P=32,
        num_warps=4,
    )


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
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    sum_absolute = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    sum_squares = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for s in range(samples):
        gradient = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        first = tl.cast(s, tl.int64) * positions
        for start in range(0, positions, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            here = p < positions
            row = first + p
            d = tl.load(
                dy + row[None, :] * outputs + o[:, None],
                mask=here[None, :] & (o[:, None] < outputs),
                other=0.0,
            )
            v = tl.load(
                x + row[:, None] * inputs + i[None, :],
                mask=here[:, None] & (i[None, :] < inputs),
                other=0.0,
            )
            if WIDEN:
                d, v = d.to(tl.float32), v.to(tl.float32)
            gradient = tl.dot(d, v, gradient, input_precision=PRECISION)
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
