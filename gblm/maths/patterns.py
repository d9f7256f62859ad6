"""Patterns: which keep-masks are allowed. A pattern is a factory here and a line in `parse`."""

import math
import re
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gblm import kernels
from gblm.base import GblmError, Pattern, one_of

KERNEL_WINDOW = 32  # the widest m that is compared all with all
GROUPS = ("row", "layer")
FIRST = ("blocks", "attention", "mlps", "experts")  # which go before others, in this order
UNITS = (*FIRST, "neurons", "heads")
UNEVEN = "/uneven"
UNIT = re.compile(rf"([a-z]+):(\d*\.?\d+)({UNEVEN})?")
RANKED = 8  # the longest rows of which numpy compares all with all
KERNEL_ROWS = 64  # the fewest that keep a GPU busy, each with a program of its own
ROWS = 2**21  # scores that are selected from at a time, but for a single row of more
STRIDE = 61  # one of so many scores is sampled, to find two values that the k-th lies between


def unstructured(sparsity: float, group: str = "row") -> Pattern:
    """Drop the lowest floor(sparsity · size) scores of each comparison group, anywhere in it.

    The group is an output row (`group="row"`) or the whole weight (`group="layer"`). Of equal
    scores the first goes first, as in the published code (arXiv 2311.04902). One weight stays.

    Raises `GblmError` where the sparsity is outside (0, 1) or the group is unknown.
    """
    if not 0 < sparsity < 1:
        raise GblmError(f"sparsity {sparsity:g} is outside (0, 1); 0.5 drops half of the weights")
    one_of(group, GROUPS, "comparison group")

    def keep(score: Tensor) -> Tensor:
        groups = score if group == "row" else score.reshape(1, -1)
        # 0.29 · 100 is 28.999… in binary: the count meant is 29.
        kept = groups.shape[1] - int(groups.shape[1] * sparsity + 1e-6)
        return _keep_highest(groups, max(kept, 1)).view_as(score)

    name = f"{sparsity}" if group == "row" else f"{sparsity}/{group}"
    return Pattern(name, keep, check=lambda shape: None)


def nm(n: int, m: int) -> Pattern:
    """Keep the n highest scores of every m neighbouring inputs: n:m.

    Raises `GblmError` unless 0 < n < m, and from `check` where the inputs are no multiple of m.
    """
    if not 0 < n < m:
        raise GblmError(f"pattern {n}:{m} needs 0 < n < m; 2:4 keeps two weights of every four")

    def keep(score: Tensor) -> Tensor:
        if kernels.usable(score) and m <= KERNEL_WINDOW:
            from gblm.kernels.nm_keep import nm_keep

            return nm_keep(score, n, m)
        return _keep_highest(score.reshape(-1, m), n).view_as(score)

    def check(shape: Sequence[int]) -> None:
        if shape[1] % m:
            raise GblmError(
                f"in={shape[1]} is not divisible by {m}; choose an m that divides it, or a sparsity"
            )

    return Pattern(f"{n}:{m}", keep, check, window=m, kept=n)


def structured(
    units: dict[str, float], then: Pattern | None = None, uneven: bool = False
) -> Pattern:
    """Remove whole units, a share of each kind of `UNITS`; those of `FIRST` go before others.

    then: the pattern of what is left. uneven: layers may keep different numbers of neurons and
    heads. Raises `GblmError` where a kind is unknown or a share is outside (0, 1).
    """
    for kind, share in units.items():
        one_of(kind, UNITS, "kind of units")
        if not 0 < share < 1:
            raise GblmError(f"{kind}:{share:g} is outside (0, 1); {kind}:0.25 removes a quarter")
    first = next((kind for kind in FIRST if kind in units), "")
    if first and len(units) > 1:
        then = structured({kind: units[kind] for kind in units if kind != first}, then, uneven)
        units = {first: units[first]}
    uneven = uneven and not first
    name = "+".join(f"{kind}:{share:g}{UNEVEN * uneven}" for kind, share in units.items())
    name += f"+{then.name}" if then else ""
    whole = partial(torch.ones_like, dtype=torch.bool)
    kinds = tuple(units.items())
    return Pattern(name, whole, lambda shape: None, units=kinds, uneven=uneven, then=then)


def parse(text: str, group: str = "row", uneven: bool = False) -> Pattern:
    """Return the pattern that `text` names: "2:4", "0.5/layer", "neurons:0.25/uneven+2:4".

    `group` is the comparison group of an unstructured pattern that names none itself; `uneven`
    lets layers keep different numbers of units.

    Raises `GblmError` where the text is neither a sparsity, nor n:m, nor units.
    """
    parts = text.strip().split("+")
    units = {m[1]: float(m[2]) for part in parts if (m := UNIT.fullmatch(part))}
    rest = [part for part in parts if not UNIT.fullmatch(part)]
    if units:
        if len(units) + len(rest) < len(parts) or len(rest) > 1:
            raise GblmError(
                f"pattern {text!r}: name each kind of units once, and one pattern after"
            )
        then = parse(rest[0], group) if rest else None
        return structured(units, then, uneven or UNEVEN in text)
    if match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text.strip()):
        return nm(int(match[1]), int(match[2]))
    sparsity, _, own_group = text.strip().partition("/")
    try:
        value = float(sparsity)
    except ValueError:
        raise GblmError(
            f"pattern {text!r} is neither a sparsity such as 0.5 nor n:m such as 2:4, nor units "
            "such as neurons:0.25"
        ) from None
    return unstructured(value, own_group or group)


def _keep_highest(groups: Tensor, kept: int) -> Tensor:
    """Return the mask `[groups, size]` of the `kept` highest of each row; ties keep the later."""
    dropped = groups.shape[1] - kept
    if not dropped:
        return torch.ones_like(groups, dtype=torch.bool)
    if kernels.usable(groups) and groups.dtype == torch.float32 and len(groups) >= KERNEL_ROWS:
        from gblm.kernels.row_keep import row_keep

        return row_keep(groups, kept)
    # Some rows at a time, for a selection takes several times the memory of what it selects from.
    step = max(1, ROWS // groups.shape[1])
    if step < len(groups) and not groups.is_cuda:
        return torch.cat([_keep_highest(part, kept) for part in groups.split(step)])
    if _quick(groups) and groups.shape[1] <= RANKED:
        return _ranked(groups, kept)
    # A selection is several times quicker than a sort.
    threshold = _smallest(groups, dropped)
    mask = groups > threshold
    missing = kept - mask.sum(dim=1, keepdim=True)
    if missing.any():
        equal = groups == threshold
        mask |= equal & (equal.sum(dim=1, keepdim=True) - equal.cumsum(dim=1) < missing)
    return mask


def _ranked(groups: Tensor, kept: int) -> Tensor:
    """Return what `_keep_highest` does, by comparing all of each row with all."""
    columns = np.ascontiguousarray(groups.numpy().T)
    higher = np.zeros(columns.shape, np.uint8)  # how many scores of its row rank above each
    for i in range(len(columns) - 1):
        later = columns[i + 1 :] >= columns[i]
        higher[i] += later.sum(axis=0, dtype=np.uint8)
        higher[i + 1 :] += ~later
    return torch.from_numpy(np.ascontiguousarray((higher < kept).T))


def ascending(groups: Tensor) -> Tensor:
    """Return each row sorted, `[groups, size]`."""
    if not _quick(groups):
        return groups.sort(dim=1).values
    return torch.from_numpy(np.sort(groups.numpy(), axis=1))


def _quick(groups: Tensor) -> bool:
    """Say whether numpy selects and sorts: up to ten times as quick as torch on a CPU."""
    return groups.device.type == "cpu" and groups.dtype in (torch.float32, torch.float64)


def _smallest(groups: Tensor, k: int) -> Tensor:
    """Return the k-th smallest of each row, `[groups, 1]`."""
    if not _quick(groups):
        return groups.kthvalue(k, dim=1, keepdim=True).values
    values = groups.numpy()
    if len(values) == 1:
        return torch.from_numpy(_smallest_of_many(values[0], k).reshape(1, 1))
    smallest = np.partition(values, k - 1, axis=1)[:, k - 1 : k]
    return torch.from_numpy(np.ascontiguousarray(smallest))


def _smallest_of_many(values: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th smallest of many values, from those between two of a sample.

    Source: Floyd and Rivest, "Expected time bounds for selection", 1975.
    """
    sample = values[::STRIDE]
    at, margin = k * len(sample) // len(values), 2 * math.isqrt(len(sample)) + 1
    low, high = max(at - margin, 0), min(at + margin, len(sample) - 1)
    sample = np.partition(sample, (low, high))
    below = int(np.count_nonzero(values < sample[low]))
    between = values[(values >= sample[low]) & (values <= sample[high])]
    if below < k <= below + len(between):
        values, k = between, k - below
    return np.partition(values, k - 1)[k - 1]
