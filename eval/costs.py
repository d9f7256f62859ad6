"""Say where the time of pruning goes: the operations of torch by their share, for each method.

    python eval/costs.py llm --model $GBLM_ASSETS/llama/novels-6M --length 256 --samples 32 \\
        --calibration $GBLM_ASSETS/text/novels-calib.txt --write docs/benchmarks.md
    python eval/costs.py vit --model vit_tiny_patch16_224 --samples 100 \\
        --checkpoint $GBLM_ASSETS/vit_tiny_patch16_224.safetensors \\
        --calibration $GBLM_ASSETS/imagenet-mini/train --write docs/benchmarks.md

Every operation is timed as it ends, on the CPU; the rest of the wall time, between the operations,
is Python's, the timing included. The floor of the matrix products is their FLOPs over the rate of
this machine: that of one product of square matrices, in fp32 and in bf16.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import quality
import tables
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gblm
from gblm.command.settings import listed
from gblm.methods import make

PRODUCTS = "matrix products"
KINDS = {  # by the names of torch's operations
    PRODUCTS: ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "_flash_attention", "_softmax"),
    "selection of masks": ("kthvalue", "sort", "topk", "masked_select"),
    "factors and solves": ("cholesky", "linalg_", "triangular"),
    "optimiser": ("_fused_adam",),
    "copies": ("copy_", "cat", "clone", "contiguous", "_to_copy"),
}
SIDE = 1536  # of the square matrices

Rates = dict[torch.dtype, float]


class Timed(TorchDispatchMode):
    """Adds up the seconds of operations by their kind, and the FLOPs of products by their dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[torch.dtype, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        start = time.perf_counter()
        output = func(*args, **(kwargs or {}))
        own = kind(func.__name__)
        self.seconds[own] += time.perf_counter() - start
        if own == PRODUCTS and output.device.type == "cpu":  # and not of shapes alone
            left = args[-2]  # of the two factors, which come last
            self.flops[output.dtype] += 2 * output.numel() * left.shape[-1]
        return output


def kind(name: str) -> str:
    """Return the kind of an operation."""
    for found, starts in KINDS.items():
        if name.startswith(starts):
            return found
    return "elementwise and others"


def rate(dtype: torch.dtype) -> float:
    """Return the FLOPs in a second of a product of square matrices."""
    a = torch.randn(SIDE, SIDE).to(dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(seconds)


def costs(
    bench: quality.Bench, method: str, pattern: str, rates: Rates
) -> tuple[dict[str, float], float]:
    """Return the shares of a run in %: of the kinds of operations, and of the products' floor."""
    batch = bench.draw(0)
    with quality.unchanged(bench.model):
        start = time.perf_counter()
        with Timed() as timed:
            gblm.prune(bench.model, batch, make(method), pattern)
        wall = time.perf_counter() - start
    found = {name: 100 * seconds / wall for name, seconds in timed.seconds.items()}
    found["Python between"] = 100 - sum(found.values())
    floor = sum(count / rates[dtype] for dtype, count in timed.flops.items())
    return dict(sorted(found.items(), key=lambda item: -item[1])), 100 * floor / wall


def main() -> None:
    """Read the flags, measure, print the table and write it where asked."""
    parser = quality.measured(__doc__ or "", samples=32)
    add = parser.add_argument
    add("--methods", default="wanda,gblm,sparsegpt,best", help="[%(default)s]")
    add("--pattern", default="0.5", help="[%(default)s]")
    args = parser.parse_args()
    bench = quality.opened(args)
    rates = {dtype: rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    cells, floors = {}, {}
    for method in listed(args.methods):
        shares, floor = costs(bench, method, args.pattern, rates)
        cells |= {(name, method): [share] for name, share in shares.items()}
        floors["floor of the products", method] = [floor]
    columns = listed(args.methods)
    rows = list(dict.fromkeys(row for row, _ in cells))
    whole = {(row, column): cells.get((row, column), [0.0]) for row in rows for column in columns}
    fp32, bf16 = (each / 1e9 for each in rates.values())
    model = Path(args.model).name
    text = f"{model}, {args.samples} samples, to {args.pattern}, {tables.threads()}; share of the "
    text += f"time in %. Rate of products: {fp32:.0f} GFLOP/s in fp32, {bf16:.0f} in bf16.\n\n"
    text += tables.table("cost", whole | floors)
    tables.publish(text, args.write, f"costs-{model}", f"### Costs: {model}")


if __name__ == "__main__":
    main()
