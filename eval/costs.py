"""Say where the time of pruning goes: the operations of torch by their share, for each method.

    python eval/costs.py llm --model $GBLM_ASSETS/llama/novels-6M --length 256 --samples 32 \\
        --calibration $GBLM_ASSETS/text/novels-calib.txt --write docs/benchmarks.md
    python eval/costs.py vit --model vit_tiny_patch16_224 --samples 100 \\
        --checkpoint $GBLM_ASSETS/vit_tiny_patch16_224.safetensors \\
        --calibration $GBLM_ASSETS/imagenet-mini/train --write docs/benchmarks.md

The time is that of an operation without those it calls, on the CPU, as torch's profiler has it; the
rest of the wall time, between the operations, is Python's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import quality
import tables
from torch.profiler import ProfilerActivity, profile

import gblm
from gblm.command.settings import listed
from gblm.methods import make

KINDS = {  # by the names of torch's operations
    "matrix products": ("mm", "addmm", "bmm", "matmul", "linear", "baddbmm"),
    "attention": ("_scaled_dot_product", "_flash_attention", "_softmax"),
    "selection of masks": ("kthvalue", "sort", "topk", "masked_select"),
    "factors and solves": ("cholesky", "linalg_", "triangular"),
    "optimiser": ("_fused_adam",),
    "copies": ("copy_", "cat", "clone", "contiguous", "_to_copy"),
}


def kind(name: str) -> str:
    """Return the kind of an operation."""
    own = name.removeprefix("aten::")
    for found, starts in KINDS.items():
        if own.startswith(starts):
            return found
    return "elementwise and others"


def shares(bench: quality.Bench, method: str, pattern: str) -> dict[str, float]:
    """Return the shares of a run's wall time by kind of operation, in percent."""
    batch = bench.draw(0)
    with quality.unchanged(bench.model):
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            gblm.prune(bench.model, batch, make(method), pattern)
        wall = time.perf_counter() - start
    spent: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        spent[kind(event.key)] += event.self_cpu_time_total / 1e6
    found = {name: 100 * seconds / wall for name, seconds in spent.items()}
    found["Python between"] = max(0.0, 100 - sum(found.values()))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main() -> None:
    """Read the flags, measure, print the table and write it where asked."""
    parser = quality.measured(__doc__ or "", samples=32)
    add = parser.add_argument
    add("--methods", default="wanda,gblm,sparsegpt,best", help="[%(default)s]")
    add("--pattern", default="0.5", help="[%(default)s]")
    args = parser.parse_args()
    bench = quality.opened(args)
    cells = {}
    for method in listed(args.methods):
        for name, share in shares(bench, method, args.pattern).items():
            cells[name, method] = [share]
    columns = listed(args.methods)
    rows = list(dict.fromkeys(row for row, _ in cells))
    whole = {(row, column): cells.get((row, column), [0.0]) for row in rows for column in columns}
    model = Path(args.model).name
    text = f"{model}, {args.samples} samples, to {args.pattern}, {tables.threads()}; "
    text += f"share of the time in %.\n\n{tables.table('cost', whole)}"
    tables.publish(text, args.write, f"costs-{model}", f"### Costs: {model}")


if __name__ == "__main__":
    main()
