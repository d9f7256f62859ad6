"""Pictures of masks, taken from the zeros of the pruned weights."""

import base64
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gblm.report import Mask, Report

CELLS = 64  # of a picture, along each side at most
CORNER = 16  # weights of a picture of first weights


def pictures(report: Report, weight: Callable[[str], Tensor]) -> dict[str, Mask]:
    """Return pictures of the linear with the largest error, and of its kind along the model.

    Of n:m, where every cell would look alike, the picture is of the first weights, one by one.

    weight: gives the pruned weight `[out, in]` of a linear by its name.
    """
    corner = ":" in report.pattern
    return {name: picture(weight(name), corner) for name in pictured(report)}


def pictured(report: Report) -> list[str]:
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
        cells = keep[:CORNER, :CORNER].float()
    else:
        rows, columns = (min(CELLS, size) for size in weight.shape)
        cells = adaptive_avg_pool2d(keep.float()[None], (rows, columns))[0]
    kept = (255 * cells).round().to("cpu", torch.uint8).numpy().tobytes()
    return Mask(cells.shape[0], cells.shape[1], base64.b64encode(kept).decode(), corner)
