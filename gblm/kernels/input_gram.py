"""XᵀX by a symmetric product: half of the tiles are computed, the others mirrored."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gblm import kernels
from gblm.kernels import precision


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

    def grid(options: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(inputs, options["BLOCK_I"])
        return (tiles * (tiles + 1) // 2,)

    _kernel[grid](
        total,
        x,
        positions,
        inputs,
        PRECISION=precision(x.dtype),
        WIDEN=not x.is_cuda,  # the interpreter has no products in bfloat16
        LARGE=inputs >= 2**11,
    )


TILES = [
    triton.Config({"BLOCK_I": i, "BLOCK_P": p}, num_warps=warps, num_stages=stages)
    for i, p, warps, stages in [(64, 32, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3), (128, 32, 4, 4)]
]


@kernels.tuned(TILES, ["LARGE"], ["total"])
@triton.jit
def _kernel(
    total,
    x,
    positions,
    inputs,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    LARGE: tl.constexpr,
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
    i_read, j_read = i % inputs, j % inputs  # beyond the edge something is read, not written
    tile = tl.zeros((BLOCK_I, BLOCK_I), dtype=tl.float32)
    for start in range(0, positions, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        a = tl.load(x + p * inputs + i_read[None, :], mask=p < positions, other=0.0)
        b = tl.load(x + p * inputs + j_read[None, :], mask=p < positions, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        tile = tl.dot(tl.trans(a), b, tile, input_precision=PRECISION)
    inside = (i[:, None] < inputs) & (j[None, :] < inputs)
    at = total + i[:, None].to(tl.int64) * inputs + j[None, :]
    mirror = total + j[:, None].to(tl.int64) * inputs + i[None, :]
    tile += tl.load(at, mask=inside, other=0.0)
    tl.store(at, tile, mask=inside)
    if row != column:
        tl.store(mirror, tl.trans(tile), mask=tl.trans(inside))
