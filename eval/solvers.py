"""Compare least-squares solvers by the error they leave in every linear of a dense model.

    python eval/solvers.py llm --model $GBLM_ASSETS/llama/novels-6M --length 256 \\
        --calibration $GBLM_ASSETS/text/novels-calib.txt --write docs/benchmarks.md
    python eval/solvers.py vit --model vit_tiny_patch16_224 --samples 256 \\
        --checkpoint $GBLM_ASSETS/vit_tiny_patch16_224.safetensors \\
        --calibration $GBLM_ASSETS/imagenet-mini/train --write docs/benchmarks.md

All solvers get the same Gram matrices, those of the dense model, and nothing they write goes into
the model. The error is ‖(W − Ŵ)X‖² / ‖WX‖² over all calibration inputs X, in percent, the mean over
the linears; beside it the seconds of all solves.

ALPS (arXiv 2406.07831) and ADMM-Grad (arXiv 2401.02938) are written here by their papers and with
the settings of their published code: ALPS raises its penalty by how many weights of the mask change
and ends with 10 steps of conjugate gradients, ADMM-Grad prunes more and more over 15 of 20 steps.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import quality
import tables
import torch
from torch import Tensor

from gblm.base import Pattern, Solver, Statistics
from gblm.command.settings import listed
from gblm.maths import admm, patterns, sparsegpt, stats
from gblm.maths.scores import wanda
from gblm.walk.blocks import Linear


def scaled(weight: Tensor, statistics: Statistics, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return W·D `[out, in]`, the damped D⁻¹XXᵀD⁻¹ `[in, in]`, and the diagonal of D."""
    gram = statistics["input_gram"]
    scale = gram.diagonal().sqrt().clamp_min(1e-8)
    hessian = gram / scale / scale[:, None]
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    return weight * scale, hessian, scale


def alps(weight: Tensor, statistics: Statistics, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Solve by ALPS: ADMM whose penalty rises with the change of the mask, then a short refit."""
    start, hessian, scale = scaled(weight, statistics, 0.01)
    target = start @ hessian
    values, vectors = torch.linalg.eigh(hessian.double())
    values, vectors = values.to(start), vectors.to(start)
    penalty, moving = 0.1, False
    keep = pattern.keep(start.abs())
    kept, dual, last = start * keep, torch.zeros_like(start), keep
    for step in range(1, 301):
        right = target - dual + penalty * kept
        free = (right @ vectors / (values + penalty)) @ vectors.T
        keep = pattern.keep((free + dual / penalty).abs())
        kept = (free + dual / penalty) * keep
        dual = dual + penalty * (free - kept)
        if step % 3:
            continue
        changed = (keep ^ last).sum().item()
        share = changed / keep.sum().item()
        last = keep
        if changed and (moving or share > 0.005):
            moving = True
            penalty *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
        elif not moving:  # hardly anything moves yet: a smaller penalty, from the start
            penalty /= 5
            kept, dual = start * pattern.keep(start.abs()), torch.zeros_like(start)
        else:
            break
        if step >= 30 and share < 0.0003:
            break
    problem = admm.Problem(start, hessian, target, scale, scale == 0)
    keep = pattern.keep(free.abs())
    return admm.refit(problem, start * keep, keep, 10) / scale, keep


def admm_grad(weight: Tensor, statistics: Statistics, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Solve by ADMM-Grad: a penalty of 1, and a sparsity that grows as a cubic over 15 steps."""
    start, hessian, scale = scaled(weight, statistics, 0.1)
    target = start @ hessian
    hessian.diagonal().add_(1)
    inverse = torch.linalg.inv(hessian)
    sparsity = 1 - pattern.keep(start.abs()).float().mean().item()
    free, dual = start, torch.zeros_like(start)
    for step in range(1, 21):
        if step <= 15:
            score = (free + dual).abs()
            last = pattern.keep(score)  # n:m too grows: only what goes in the end may go before
            share = sparsity * (1 - (1 - step / 15) ** 3)
            allowed = score.masked_fill(last, torch.inf)
            keep = patterns.unstructured(share, "layer").keep(allowed) | last
        kept = (free + dual) * keep
        dual = dual + free - kept
        free = (target + kept - dual) @ inverse
    return (free + dual) * keep / scale, keep


def repaired(weight: Tensor, statistics: Statistics, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Solve by the exact refit of Wanda's mask."""
    squares = {"input_sq": statistics["input_gram"].diagonal()}
    score = wanda(weight, Statistics(squares, statistics.samples, statistics.positions))
    return admm.repair(weight, statistics, pattern, pattern.keep(score))


SOLVERS: dict[str, Solver] = {
    "wanda+repair": repaired,
    "sparsegpt": sparsegpt.solve,
    "ADMM-Grad": admm_grad,
    "ALPS": alps,
    "admm": admm.solve,
}


def error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """Return ‖(W − Ŵ)X‖² / ‖WX‖²."""
    off = weight - new
    return (((off @ gram) * off).sum() / ((weight @ gram) * weight).sum()).item()


def measure(args: argparse.Namespace) -> dict[tuple[str, str], tuple[list[float], float]]:
    """Return the errors in percent and the seconds by solver and pattern."""
    draw, needs = quality.prepare(quality.opened(args), 0, frozenset()), frozenset({"input_gram"})
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    seconds: dict[tuple[str, str], float] = defaultdict(float)

    def see(linear: Linear, statistics: Statistics) -> None:
        for name in listed(args.patterns):
            pattern = patterns.parse(name, "layer")
            for solver, solve in SOLVERS.items():
                weight, start = stats.wide(linear.weight), time.perf_counter()
                new, _ = solve(weight, statistics, pattern)
                seconds[solver, name] += time.perf_counter() - start
                off = error(weight, new, statistics["input_gram"])
                errors[solver, name].append(100 * off)
        print(f"{linear.name} done", flush=True)

    quality.look(draw, needs, see)
    return {key: (found, seconds[key]) for key, found in errors.items()}


def main() -> None:
    """Read the flags, measure, print the tables and write them where asked."""
    parser = quality.measured(__doc__ or "", samples=128)
    add = parser.add_argument
    add("--patterns", default="0.5,0.6,0.7,2:4,4:8", help="[%(default)s]")
    args = parser.parse_args()
    found = measure(args)
    model = Path(args.model).name
    text = f"{model}, {args.samples} samples of {Path(args.calibration).name}, "
    text += f"{tables.threads()}. Error left in a linear layer, %:\n\n"
    means = {key: [sum(off) / len(off)] for key, (off, _) in found.items()}
    text += tables.table("solver", means) + "\nSeconds of all solves:\n\n"
    text += tables.table("solver", {key: [spent] for key, (_, spent) in found.items()})
    tables.publish(text, args.write, f"solvers-{model}", f"### Solvers on {model}")


if __name__ == "__main__":
    main()
