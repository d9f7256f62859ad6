"""Sweep alpha of gblm on real models, language and vision, and write docs/alpha.md.

    GBLM_ASSETS=… SMOLLM2=… python eval/alpha.py --write docs/alpha.md
    GBLM_ASSETS=… python eval/alpha.py vit_tiny --alphas 0,100,auto --patterns 2:4

The runs are those of `eval/quality.py` and stand in the same store: a second call does only what is
missing there. `gradient` is what is left of gblm where alpha grows beyond bounds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import quality
import tables

from gblm import GblmError, Statistics
from gblm.base import one_of
from gblm.command.settings import listed
from gblm.command.side import guarded
from gblm.maths import scores
from gblm.walk.blocks import Linear

NOVELS = "$GBLM_ASSETS/text/novels"
STORIES = "$GBLM_ASSETS/../golden/stories260K"
PICTURES = "$GBLM_ASSETS/imagenet-mini"
CASES = {  # what `eval/quality.py` takes
    "novels-6M": "llm --model $GBLM_ASSETS/llama/novels-6M --samples 128 --length 256 "
    f"--windows 160 --calibration {NOVELS}-calib.txt --evaluate {NOVELS}-eval.txt",
    "SmolLM2-135M": "llm --model $SMOLLM2/smollm2 --samples 32 --length 512 --windows 100 "
    "--calibration $SMOLLM2/wikitext-first.txt --evaluate $SMOLLM2/wikitext-rest.txt",
    "stories260K": "llm --model $GBLM_ASSETS/llama/stories260K --samples 128 --length 256 "
    f"--calibration {STORIES}/calibration.npz --evaluate {STORIES}/evaluation.npz",
    "vit_tiny": "vit --model vit_tiny_patch16_224 --samples 256 "
    "--checkpoint $GBLM_ASSETS/vit_tiny_patch16_224.safetensors "
    f"--calibration {PICTURES}/train --evaluate {PICTURES}/val",
}
ALPHAS = "0,1,10,30,100,300,1000,10000,auto"
EQUAL = "equal medians"  # the entry of a store that holds the alpha of every linear


def case(name: str, cases: dict[str, str] = CASES) -> list[str]:
    """Return the arguments of a case; raises `GblmError` where its files cannot be named."""
    one_of(name, cases, "case")
    if not os.environ.get("GBLM_ASSETS"):
        raise GblmError("GBLM_ASSETS is not set; let it name the folder of models and data")
    return os.path.expandvars(cases[name]).split()


def sweep(
    args: argparse.Namespace, alphas: str, sparsities: str, figure: Path, draws: int = 1
) -> str:
    """Carry out the runs of flags of `eval/quality.py`; return their tables and the figure.

    A last line says which alphas give the linears equal medians.
    """
    methods = [*(f"gblm:alpha={alpha}" for alpha in listed(alphas)), "gradient"]
    asked = {"methods": ",".join(methods), "patterns": sparsities, "draws": draws}
    args = argparse.Namespace(**{**vars(args), **asked})
    runs = quality.wanted(args)
    found = quality.measure(args, runs)
    over = f"; mean ± standard deviation of {draws} draws" if draws > 1 else ""
    level, text = quality.dense(args, found), f"{quality.described(args)}{over}.\n\n"
    for metric, title in quality.METRICS[args.side].items():
        values = quality.cells(args, runs, found, metric)
        values = {(short(row), column): cell for (row, column), cell in values.items()}
        if metric == next(iter(quality.METRICS[args.side])):
            picture = tables.figure(figure, draw_alphas(values, title, level[metric]))
        text += f"{title[0].upper()}{title[1:]} (dense: {tables.number(level[metric])}):\n\n"
        text += f"{tables.table('alpha', values)}\n"
    alone = sorted(equal_medians(args))
    return f"""{text}{picture}Equal medians in each of the {len(alone)} linear layers, all dense,
ask for alphas from {alone[0]:.3g} to {alone[-1]:.3g}, with a median of {median(alone):.3g}.
"""


def short(row: str) -> str:
    """Return what a row of the table is called: its alpha, or that no activation is left."""
    return "gradient alone" if row.startswith("gradient") else row.split(":")[1].split("=")[1]


def equal_medians(args: argparse.Namespace) -> list[float]:
    """Return median ‖X‖₂ / median ‖G‖₁ of every linear of the dense model, stored or measured."""
    entry = {**quality.key(args), "method": EQUAL}
    names = quality.key_of(entry)
    stored = quality.stored(args.store)
    if names not in stored or args.again:
        entry["alphas"] = measured_medians(args)
        quality.add(args.store, entry)
        return entry["alphas"]
    return stored[names]["alphas"]


def measured_medians(args: argparse.Namespace) -> list[float]:
    """Measure them."""
    ratios: list[float] = []

    def see(linear: Linear, statistics: Statistics) -> None:
        top = scores.input_norm(statistics).median()
        ratios.append((top / scores.gradient_norm(statistics, "l1").median()).item())

    needs = frozenset({"input_sq", "grad_abs"})
    quality.look(quality.prepare(quality.OPEN[args.side](args), 0, needs), needs, see)
    return ratios


def draw_alphas(values: dict[tuple[str, str], list[float]], title: str, level: float) -> Any:
    """Return what draws a metric against alpha, a line for every pattern, "auto" as a level.

    The mean is drawn, with the standard deviation of several draws.
    """

    def draw(axes: Any) -> None:
        for number, pattern in enumerate(dict.fromkeys(column for _, column in values)):
            line = {row: cell for (row, own), cell in values.items() if own == pattern}
            auto = line.pop("auto", None)
            color = f"C{number}"
            middle = [mean(cell) for cell in line.values()]
            off = [stdev(cell) if len(cell) > 1 else 0.0 for cell in line.values()]
            look = {"marker": "o", "capsize": 3, "color": color, "label": pattern}
            axes.errorbar(list(line), middle, off, **look)
            if auto is not None:
                axes.axhline(mean(auto), color=color, linestyle="--", label=f"{pattern}, auto")
        tables.level(axes, quality.DENSE, level)
        axes.set_xlabel("alpha")
        axes.tick_params(axis="x", rotation=45)
        axes.set_ylabel(title)
        if title.startswith("perplexity"):
            tables.logarithmic(axes)

    return draw


def main() -> None:
    """Sweep the cases one after the other; each stands in the file before the next begins."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)} [all]")
    add("--alphas", default=ALPHAS, help="with commas [%(default)s]")
    add("--patterns", default="0.5,2:4", help="with commas [%(default)s]")
    add("--write", type=Path, default=Path("docs/alpha.md"), help="[%(default)s]")
    add("--again", action="store_true", help="forget the stored runs that are asked for")
    args = parser.parse_args()
    cases = {name: quality.parser().parse_args(case(name)) for name in args.cases}
    if unnamed := [name for name, found in cases.items() if found.model.startswith("$")]:
        raise GblmError(f"SMOLLM2 is not set; let it name the folder of {unnamed[0]} and its texts")
    command = tables.portable(shlex.join(["python", *sys.argv]))
    for name, found in cases.items():
        found.again = args.again
        figure = args.write.with_name(f"alpha-{Path(found.model).name}.svg")
        text = sweep(found, args.alphas, args.patterns, figure)
        text += f"\n    {command}\n"
        print(text)
        tables.write(args.write, f"alpha:{name}", f"## {name}", text)


if __name__ == "__main__":
    sys.exit(guarded(main))
