"""Say where the time of pruning goes: the operations of torch by their share, for each method.

    python eval/costs.py llm --model $GBLM_ASSETS/llama/novels-6M --length 256 --samples 32 \\
        --calibration $GBLM_ASSETS/text/novels-calib.txt --write docs/benchmarks.md
    python eval/costs.py vit --model vit_tiny_patch16_224 --samples 100 \\
        --checkpoint $GBLM_ASSETS/vit_tiny_patch16_224.safetensors \\
        --calibration $GBLM_ASSETS/imagenet-mini/train --write docs/benchmarks.md

Every operation of torch is timed as it ends, on the CPU. The rest of the wall time is Python's, the
timing included, and that of numpy, which selects masks. A floor is the least time that this machine
would take: the FLOPs of products and of attention over the rate of one product of square matrices,
in fp32 and in bf16; of all others the bytes they read and write over the rate of a cached copy.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quality
import tables
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gblm
from gblm.command.settings import listed
from gblm.methods import make

PRODUCTS = "matrix products"
FUSED = "_scaled_dot_product"  # attention in one operation, forward or backward
KINDS = {  # by the names of torch's operations
    PRODUCTS: ("mm", "addmm", "bmm", "baddbmm"),
    "attention": (FUSED, "_softmax"),
    "selection of masks": ("kthvalue", "sort", "topk", "masked_select"),
    "factors and solves": ("cholesky", "linalg_", "triangular"),
    "optimiser": ("_fused_adam",),
    "copies": ("copy_", "cat", "clone", "contiguous", "_to_copy"),
}
SIDE = 1536  # of the square matrices

BYTES = "bytes"
Unit = torch.dtype | str  # of work: FLOPs in a dtype, or BYTES


class Timed(TorchDispatchMode):
    """Adds up the seconds of operations by their kind, and their FLOPs or bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.work: dict[tuple[str, Unit], int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        start = time.perf_counter()
        output = func(*args, **(kwargs or {}))
        own = kind(func.__name__)
        self.seconds[own] += time.perf_counter() - start
        unit, amount = work(own, func, args, output)
        self.work[own, unit] += amount
        return output


def work(own: str, func: Any, args: tuple, output: Any) -> tuple[Unit, int]:
    """Return the work of an operation of a kind, and its unit."""
    tensors = [each for each in tree_leaves((args, output)) if isinstance(each, torch.Tensor)]
    if func.is_view or any(each.device.type == "meta" for each in tensors):
        return BYTES, 0
    if own == PRODUCTS:
        left = args[-2]  # of the two factors, which come last
        return output.dtype, 2 * output.numel() * left.shape[-1]
    if func.__name__.startswith(FUSED):
        backward = "backward" in func.__name__  # five products, where forward takes two
        query, key = args[backward : backward + 2]
        return query.dtype, (10 if backward else 4) * query.numel() * key.shape[-2]
    return BYTES, sum(each.numel() * each.element_size() for each in tensors)


def kind(name: str) -> str:
    """Return the kind of an operation."""
    for found, starts in KINDS.items():
        if name.startswith(starts):
            return found
    return "elementwise and others"


def rates() -> dict[Unit, float]:
    """Return the FLOPs of products of square matrices, and the bytes of a copy, in a second."""
    found: dict[Unit, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(SIDE, SIDE).to(dtype)
        found[dtype] = 2 * SIDE**3 / least(lambda a=a: a @ a)
    a, b = torch.zeros(2, SIDE**2 // 4)
    return found | {BYTES: 2 * a.nbytes / least(lambda: a.copy_(b))}


def least(call: Callable[[], object], runs: int = 20) -> float:
    """Return the seconds of the quickest of several calls."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def costs(
    bench: quality.Bench, method: str, pattern: str, machine: dict[Unit, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return what the kinds of operations take of the time of a run in %, and their floors."""
    batch = bench.draw(0)
    with quality.unchanged(bench.model):
        start = time.perf_counter()
        with Timed() as timed:
            gblm.prune(bench.model, batch, make(method), pattern)
        wall = time.perf_counter() - start
    shares = {name: 100 * seconds / wall for name, seconds in timed.seconds.items()}
    floors: dict[str, float] = defaultdict(float)
    for (name, unit), amount in timed.work.items():
        floors[name] += 100 * amount / machine[unit] / wall
    shares["Python and numpy"] = 100 - sum(shares.values())
    return dict(sorted(shares.items(), key=lambda item: -item[1])), floors


def main() -> None:
    """Read the flags, measure, print the table and write it where asked."""
    parser = quality.measured(__doc__ or "", samples=32)
    add = parser.add_argument
    add("--methods", default="wanda,gblm,sparsegpt,best", help="[%(default)s]")
    add("--pattern", default="0.5", help="[%(default)s]")
    args = parser.parse_args()
    bench = quality.opened(args)
    machine = rates()
    columns = listed(args.methods)
    found = {column: costs(bench, column, args.pattern, machine) for column in columns}
    rows = list(dict.fromkeys(row for shares, _ in found.values() for row in shares))
    cells = {
        (row, title): [each.get(row, 0.0)]
        for row in rows
        for column in columns
        for title, each in zip((column, f"{column}: floor"), found[column], strict=True)
    }
    model = Path(args.model).name
    fp32, bf16, memory = (each / 1e9 for each in machine.values())
    text = f"{model}, {args.samples} samples, to {args.pattern}, {tables.threads()}; share of the "
    text += f"time in %. Rate of products: {fp32:.0f} GFLOP/s in fp32, {bf16:.0f} in bf16; "
    text += f"of copies: {memory:.0f} GB/s.\n\n{tables.table('cost', cells)}"
    tables.publish(text, args.write, f"costs-{model}", f"### Costs: {model}")


if __name__ == "__main__":
    main()
