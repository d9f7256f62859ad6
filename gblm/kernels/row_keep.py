"""The mask of the highest scores of every row, by a search for the threshold instead of a sort."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # scores of a row at a time
BITS = 8  # of the threshold, found with one pass over the row


def reference(score: Tensor, kept: int) -> Tensor:
    """Return the mask by a stable sort of every row: see `row_keep`."""
    order = torch.sort(score, dim=1, stable=True).indices[:, score.shape[1] - kept :]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def row_keep(score: Tensor, kept: int) -> Tensor:
    """Return the mask `[rows, size]` of the `kept` highest of each row; ties keep the later.

    score: fp32, without NaN. A program takes a row. Floats in the order of their bits are integers;
    the threshold is found from its highest bit to its lowest, 4 passes of 8 bits that count the
    scores by those bits; one more pass writes the mask. Between the passes a row of some 10 000
    scores stays in the cache.
    """
    score = score.contiguous()
    rows, size = score.shape
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    block = min(BLOCK, triton.next_power_of_2(size))
    _kernel[(rows,)](
        score, keep, size, kept, BLOCK_S=block, STEP=BITS, num_warps=8 if block > 1024 else 4
    )
    return keep


@triton.jit
def _ordered(x):
    """Return integers of 32 bits, without sign, in the order of the floats; −0 counts as 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _kernel(
    score,
    keep,
    size,
    kept,
    BLOCK_S: tl.constexpr,
    STEP: tl.constexpr,
):
    first = tl.cast(tl.program_id(0), tl.int64) * size
    offsets = tl.arange(0, BLOCK_S)
    digits = tl.arange(0, 1 << STEP)
    prefix = tl.zeros((), dtype=tl.uint32)  # the high bits of the threshold
    wanted = tl.cast(kept, tl.int32)  # which of those with this prefix it is, from the highest
    equals = tl.zeros((), dtype=tl.int32)  # how many those are
    for shift in tl.static_range(32 - STEP, -1, -STEP):
        counts = tl.zeros((1 << STEP,), dtype=tl.int32)
        for start in range(0, size, BLOCK_S):
            inside = start + offsets < size
            bits = _ordered(tl.load(score + first + start + offsets, mask=inside, other=0.0))
            if shift + STEP < 32:
                inside = inside & ((bits >> (shift + STEP)) == (prefix >> (shift + STEP)))
            digit = ((bits >> shift) & ((1 << STEP) - 1)).to(tl.int32)
            counts += tl.histogram(digit, 1 << STEP, mask=inside)
        total = tl.sum(counts, axis=0)
        above = total - tl.cumsum(counts, axis=0)  # those of a higher digit
        here = (above < wanted) & (above + counts >= wanted)
        digit = tl.sum(tl.where(here, digits, 0), axis=0)
        wanted -= tl.sum(tl.where(here, above, 0), axis=0)
        equals = tl.sum(tl.where(here, counts, 0), axis=0)
        prefix |= digit.to(tl.uint32) << shift
    skipped = equals - wanted  # of the scores equal to the threshold the last are kept
    seen = tl.zeros((), dtype=tl.int32)
    for start in range(0, size, BLOCK_S):
        inside = start + offsets < size
        bits = _ordered(tl.load(score + first + start + offsets, mask=inside, other=0.0))
        equal = (inside & (bits == prefix)).to(tl.int32)
        late = seen + tl.cumsum(equal, axis=0) > skipped
        chosen = (bits > prefix) | ((equal != 0) & late)
        tl.store(keep + first + start + offsets, chosen, mask=inside)
        seen += tl.sum(equal, axis=0)
