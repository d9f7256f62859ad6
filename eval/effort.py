"""Time methods against the first of them, in seconds of the processor, gradients included.

    OMP_NUM_THREADS=1 python eval/effort.py llm --model $GBLM_ASSETS/llama/novels-6M --length 256 \\
        --calibration $GBLM_ASSETS/text/novels-calib.txt --write docs/benchmarks.md
    OMP_NUM_THREADS=1 python eval/effort.py vit --model vit_tiny_patch16_224 --samples 256 \\
        --checkpoint $GBLM_ASSETS/vit_tiny_patch16_224.safetensors \\
        --calibration $GBLM_ASSETS/imagenet-mini/train --write docs/benchmarks.md

A run is the whole of `gblm.prune`, of which nothing is kept. The methods take turns, after one
round to warm up, so that a machine that slows down slows them all; a ratio is the median of those
of the single rounds. With one thread, what else the machine does adds little to these seconds.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import quality
import tables

import gblm
from gblm.base import Batch
from gblm.command.settings import listed
from gblm.methods import make, parse


def seconds(bench: quality.Bench, batch: Batch, method: str, pattern: str) -> float:
    """Return the processor's seconds that a run takes; the model is left as it was."""
    name, options = parse(method)
    with quality.unchanged(bench.model):
        start = time.process_time()
        gblm.prune(bench.model, batch, make(name, **options), pattern)
        return time.process_time() - start


def main() -> None:
    """Read the flags, let the methods take turns, print the table and write it where asked."""
    parser = quality.measured(__doc__ or "", samples=128)
    add = parser.add_argument
    add("--methods", default="sparsegpt,wanda,gblm,best", help="[%(default)s]")
    add("--pattern", default="0.5", help="[%(default)s]")
    add("--runs", type=int, default=3, help="rounds after one to warm up [%(default)s]")
    args = parser.parse_args()
    bench = quality.opened(args)
    batch, methods = bench.draw(0), listed(args.methods)
    runs: dict[str, list[float]] = defaultdict(list)
    for turn in range(args.runs + 1):
        for method in methods:
            runs[method].append(seconds(bench, batch, method, args.pattern))
            print(f"round {turn}  {method:24} {runs[method][-1]:6.2f} s", file=sys.stderr)
    cells, first = {}, runs[methods[0]][1:]
    for method in methods:
        taken = runs[method][1:]
        cells[method, "seconds"] = [median(taken)]
        ratios = [own / other for own, other in zip(taken, first, strict=True)]
        cells[method, f"against {methods[0]}"] = [median(ratios)]
    model = Path(args.model).name
    text = f"{model}, {args.samples} samples, to {args.pattern}, {tables.threads()}; "
    text += f"medians of {args.runs} rounds.\n\n{tables.table('method', cells)}"
    tables.publish(text, args.write, f"effort-{model}", f"### Seconds: {model}")


if __name__ == "__main__":
    main()
