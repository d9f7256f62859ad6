"""Pictures of masks, taken from the zeros of the pruned weights."""

import base64

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gblm.machine.offload import here
from gblm.report import Mask, Report
from gblm.walk.survey import Block

CELLS = 64  # of a picture, along each side at most


def masks(report: Report, blocks: list[Block]) -> dict[str, Mask]:
    """Return pictures of the linear with the largest error, and of its kind along the model.

    Those are the linears of that kind in the first, the middle and the last block. Of n:m, where
    every cell would look alike, the picture is of the first weights, one by one.
    """
    found: dict[str, Mask] = {}
    wanted = chosen(report)
    for block in blocks:
        for linear in block.linears:
            if linear.name in wanted:
                with here(block.module):
                    found[linear.name] = picture(linear.weight, corner=":" in report.pattern)
    return {name: found[name] for name in wanted if name in found}


def chosen(report: Report) -> list[str]:
    """Return the linear with the largest error, and first, middle and last of its kind."""
    if not report.linears:
        return []
    worst = max(report.linears, key=lambda linear: linear.relative_error).name
    kind = report.place(worst)[1]
    same = [linear.name for linear in report.linears if report.place(linear.name)[1] == kind]
    return list(dict.fromkeys([worst, same[0], same[len(same) // 2], same[-1]]))


def picture(weight: Tensor, corner: bool = False) -> Mask:
    """Return the kept share of the cells of a weight `[out, in]`, or of its first weights."""
    keep = weight != 0
    if corner:
        cells = keep[:CELLS, :CELLS].float()
    else:
        rows, columns = (min(CELLS, size) for size in weight.shape)
        cells = adaptive_avg_pool2d(keep.float()[None], (rows, columns))[0]
    kept = (255 * cells).round().to("cpu", torch.uint8).numpy().tobytes()
    return Mask(cells.shape[0], cells.shape[1], base64.b64encode(kept).decode(), corner)
