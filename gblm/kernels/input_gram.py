"""XᵀX by a symmetric product: half of the tiles are computed, the others mirrored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gblm.kernels import precision

BLOCK = 64


def reference(total: Tensor, x: Tensor) -> None:
    """Add XᵀX by a full product in fp32: see `input_gram`."""
    total.addmm_(x.float().T, x.float())


def input_gram(total: Tensor, x: Tensor) -> None:
    """Add XᵀX of `x [positions, in]` to `total [in, in]` in fp32.

    Products of 16 bits are exact in fp32, so that the error is that of the fp32 sum over positions:
    about √positions · 6e-8 of the diagonal.
    """
    x = x.contiguous()
    positions, inputs = x.shape
    tiles = triton.cdiv(inputs, BLOCK)
    _kernel[(tiles * (tiles + 1) // 2,)](
        total,
        x,
        positions,
        inputs,
        PRECISION=precision(x.dtype),
        WIDEN=not x.is_cuda,  # the interpreter has no products in bfloat16
        BLOCK_I=BLOCK,
        BLOCK_P=32 if x.dtype == torch.float32 else 64,
        num_warps=4,
    )


@triton.jit
def _kernel(
    total,
    x,
    positions,
    inputs,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # The tile of this program in the lower triangle, counted row by row: row² / 2 ≈ number.
    number = tl.program_id(0)
    row = tl.cast((tl.sqrt(8.0 * number + 1.0) - 1.0) / 2.0, tl.int32)
    row += tl.where((row + 1) * (row + 2) // 2 <= number, 1, 0)  # rounding of the root
    row -= tl.where(row * (row + 1) // 2 > number, 1, 0)
    column = number - row * (row + 1) // 2
    i = row * BLOCK_I + tl.arange(0, BLOCK_I)
    j = column * BLOCK_I + tl.arange(0, BLOCK_I)
    tile = tl.zeros((BLOCK_I, BLOCK_I), dtype=tl.float32)
    for start in range(0, positions, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        a = tl.load(
            x + p[None, :] * inputs + i[:, None],
            mask=(p[None, :] < positions) & (i[:, None] < inputs),
            other=0.0,
        )
        b = tl.load(
            x + p[:, None] * inputs + j[None, :],
            mask=(p[:, None] < positions) & (j[None, :] < inputs),
            other=0.0,
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        tile = tl.dot(a, b, tile, input_precision=PRECISION)
    inside = (i[:, None] < inputs) & (j[None, :] < inputs)
    at = total + i[:, None].to(tl.int64) * inputs + j[None, :]
    mirror = total + j[None, :].to(tl.int64) * inputs + i[:, None]
    tile += tl.load(at, mask=inside, other=0.0)
    tl.store(at, tile, mask=inside)
    if row != column:
        tl.store(mirror, tile, mask=inside)
