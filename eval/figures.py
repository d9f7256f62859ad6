"""Draw the paper's figures for one model, language or vision, with their numbers.

    python eval/figures.py llm --model $GBLM_ASSETS/llama/novels-6M --length 256 --windows 32 \\
        --samples 32 --calibration $GBLM_ASSETS/text/novels-calib.txt \\
        --evaluate $GBLM_ASSETS/text/novels-eval.txt --write docs/figures.md
    python eval/figures.py vit --model vit_tiny_patch16_224 --samples 64 --figures masks \\
        --checkpoint $GBLM_ASSETS/vit_tiny_patch16_224.safetensors \\
        --calibration $GBLM_ASSETS/imagenet-mini/train \\
        --evaluate $GBLM_ASSETS/imagenet-mini/val --write docs/figures.md

sparsity: the metric of the side against sparsity, a line for every method.
alpha: against alpha of gblm (`eval/alpha.py`), over several draws of the calibration samples.
samples: against the number of calibration samples, over several draws of them.
masks: which weights of a linear stay, by magnitude, wanda, gradient and gblm.

The runs are those of `eval/quality.py`, in a store of the same form: a second call does only what
is missing there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import alpha
import quality
import tables
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gblm import GblmError, Method, Statistics
from gblm.base import one_of
from gblm.command.settings import listed
from gblm.command.side import guarded
from gblm.maths import patterns, stats
from gblm.walk.blocks import Linear
from gblm.walk.prune import unfit

Structure = tuple[float, float]  # of the columns of a mask, and of its rows

MASKED = "magnitude,wanda,gradient,gblm"
MASKS = "masks"  # the entry of a store that holds their numbers
PIXELS = 256  # of a side of a mask in its picture: a larger mask is averaged over cells


def parser() -> argparse.ArgumentParser:
    """Return the parser of the script: that of `eval/quality.py`, and what the figures need."""
    new = quality.parser()
    new.description = (__doc__ or "").splitlines()[0]
    new.set_defaults(methods="magnitude,wanda,sparsegpt,gblm", patterns="0.5", draws=3)
    new.set_defaults(store=Path("docs/figures.json"))
    add = new.add_argument
    add("--figures", default=",".join(FIGURES), help="with commas [%(default)s]")
    add("--sparsities", default="0.1,0.2,0.3,0.4,0.5,0.6,0.7", help="[%(default)s]")
    add("--alphas", default=alpha.ALPHAS, help="[%(default)s]")
    add("--counts", default="1,2,4,8,16,32", help="of calibration samples [%(default)s]")
    add("--linear", help="whose masks are drawn [the first of the middle block]")
    add("--mask-pattern", default="0.5/layer", help="of the masks [%(default)s]")
    return new


def changed(args: argparse.Namespace, **flags: Any) -> argparse.Namespace:
    """Return the flags with others in their place."""
    return argparse.Namespace(**{**vars(args), **flags})


def measured(args: argparse.Namespace) -> tuple[dict[tuple[str, str], list[float]], float]:
    """Return the first metric of the side over the draws, by method and pattern, and the dense."""
    metric = next(iter(quality.METRICS[args.side]))
    runs = quality.wanted(args)
    found = quality.measure(args, runs)
    return quality.cells(args, runs, found, metric), quality.dense(args, found)[metric]


def title(args: argparse.Namespace) -> str:
    """Return the first metric of the side in words."""
    return next(iter(quality.METRICS[args.side].values()))


def heading(args: argparse.Namespace) -> str:
    """Return the same with a capital letter."""
    return title(args)[0].upper() + title(args)[1:]


def draw_lines(
    args: argparse.Namespace, values: dict[tuple[str, str], list[float]], level: float, label: str
) -> Callable[[Any], None]:
    """Return what draws the draws of each row against its columns, which are numbers.

    The mean is a line; where there are several draws their standard deviation is a band.
    """

    def draw(axes: Any) -> None:
        for row in dict.fromkeys(row for row, _ in values):
            line = {float(x): found for (own, x), found in values.items() if own == row}
            middle = [mean(found) for found in line.values()]
            name = row.split(":")[0]
            look = {"color": tables.COLORS.get(name), "marker": tables.MARKERS.get(name, "o")}
            (drawn,) = axes.plot(list(line), middle, ms=5, label=row, **look)
            if len(next(iter(line.values()))) > 1:
                off = [stdev(found) for found in line.values()]
                low, high = ([m + s * o for m, o in zip(middle, off, strict=True)] for s in (-1, 1))
                axes.fill_between(list(line), low, high, color=drawn.get_color(), alpha=0.15)
        tables.level(axes, quality.DENSE, level)
        axes.set_xlabel(label)
        axes.set_ylabel(title(args))
        if args.side == "llm":
            tables.logarithmic(axes)

    return draw


# 1. Against sparsity, alpha, and the samples.


def sparsity(args: argparse.Namespace, figure: Path) -> str:
    """Return the table and the figure of the metric against sparsity."""
    sparsities = ",".join(sorted(listed(args.sparsities), key=float))
    args = changed(args, patterns=sparsities, draws=1)
    values, level = measured(args)
    text = f"{quality.described(args)}; every method in the comparison group it was published "
    text += f"with.\n\n{heading(args)} (dense: {tables.number(level)}):\n\n"
    text += f"{tables.table('method', values)}\n"
    return text + tables.figure(figure, draw_lines(args, values, level, "sparsity"))


def against_alpha(args: argparse.Namespace, figure: Path) -> str:
    """Return the tables and the figure of the metrics against alpha."""
    return alpha.sweep(args, args.alphas, args.patterns, figure, args.draws)


def samples(args: argparse.Namespace, figure: Path) -> str:
    """Return the table and the figure of the metric against the number of samples."""
    methods = [m for m in listed(args.methods) if quality.named(m, args.side)[1].needs]
    pattern, *more = listed(args.patterns)
    if more or not methods:
        raise GblmError("--figures samples takes one pattern, and methods that look at samples")
    values: dict[tuple[str, str], list[float]] = {}
    for count in sorted(int(x) for x in listed(args.counts)):
        own = changed(args, samples=count, methods=",".join(methods), patterns=pattern)
        found, level = measured(own)
        values |= {(row, f"{count}"): cell for (row, _), cell in found.items()}

    def draw(axes: Any) -> None:
        draw_lines(args, values, level, "calibration samples")(axes)
        counts = sorted({int(x) for _, x in values})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])

    source, test = (Path(name).name for name in (args.calibration, args.evaluate))
    text = f"{Path(args.model).name} at {pattern} by the number of calibration samples of {source},"
    text += f" mean ± standard deviation of {args.draws} draws; on {test}.\n\n{heading(args)} "
    text += f"(dense: {tables.number(level)}):\n\n{tables.table('method', values)}\n"
    return text + tables.figure(figure, draw)


# 2. Masks.


def structure(keep: Tensor) -> Structure:
    """Return how uneven a mask `[out, in]` is over its columns, and over its rows.

    That is the variance of the number of kept weights in a column, over what a random mask of equal
    sparsity has: for k of N = out·in weights kept, anywhere, the count of a line of s weights is
    hypergeometric, with mean s·p and variance s·p·(1 − p)·(N − s)/(N − 1), p = k/N. So 1 is a
    random mask, 0 one that keeps equally many in every line, and (N − 1)/(N − s)·s, nearly s, one
    whose lines are whole or empty. Nothing to compare with (all or none kept, one line) is NaN.
    """
    total, kept = keep.numel(), keep.sum().item()

    def ratio(counts: Tensor, size: int) -> float:
        share = kept / total
        expected = size * share * (1 - share) * (total - size) / max(total - 1, 1)
        found = (counts.double() - size * share).square().mean().item()
        return found / expected if expected else float("nan")

    rows, columns = keep.shape
    return ratio(keep.sum(dim=0), rows), ratio(keep.sum(dim=1), columns)


def collect(
    args: argparse.Namespace,
) -> tuple[dict[str, dict[str, Structure]], str, dict[str, Tensor]]:
    """Return the structure of the masks by method and linear, a linear's name, and its masks.

    All methods see the same statistics, those of the dense model; nothing is pruned.
    """
    methods = dict(quality.named(text, args.side) for text in listed(MASKED))
    needs = frozenset().union(*(method.needs for method in methods.values()))
    pattern = patterns.parse(args.mask_pattern)
    draw = quality.prepare(quality.OPEN[args.side](args), 0, needs)
    blocks = draw.walk.blocks
    unfit(blocks, Method(MASKS, ()), pattern)
    every = [linear.name for block in blocks for linear in block.linears]
    middle = blocks[len(blocks) // 2].linears[0].name
    name = one_of(args.linear, every, "linear") if args.linear else middle
    found: dict[str, dict[str, Structure]] = {row: {} for row in methods}
    chosen: dict[str, Tensor] = {}

    def see(linear: Linear, statistics: Statistics) -> None:
        for row, method in methods.items():
            keep = method.solve(stats.wide(linear.weight), statistics, pattern)[1]
            found[row][linear.name] = structure(keep)
            if linear.name == name:
                chosen[row] = keep.cpu()

    quality.look(draw, needs, see)
    return found, name, chosen


def masks(args: argparse.Namespace, figure: Path) -> str:
    """Return the table and the picture of the masks, of a store and a file where they are there."""
    args.samples = args.samples or quality.DEFAULTS[args.side]["samples"]
    entry = {**quality.key(args), "method": MASKS, "pattern": args.mask_pattern}
    key = quality.key_of(entry)
    known = {} if args.again else quality.stored(args.store).get(key, {})
    if not known or args.linear not in (None, known["linear"]) or not figure.exists():
        found, linear, chosen = collect(args)
        known = {**entry, "linear": linear, "structure": found}
        tables.picture(figure, draw_masks(chosen), size=(12, 3.8))
        quality.add(args.store, known)
    found, linear = known["structure"], known["linear"]
    cells = {}
    for row, ratios in found.items():
        for side, name in enumerate(("columns", "rows")):
            cells[row, f"{name}, {linear}"] = [ratios[linear][side]]
            cells[row, f"{name}, median of all"] = [median(both[side] for both in ratios.values())]
    text = f"{quality.described(args).split(';')[0]}. Masks of {linear} at {args.mask_pattern}, of "
    text += (
        "the dense model: what is coloured stays. Above and beside each the share that stays of a "
    )
    text += "column and of a row, the gray band two standard deviations of a random mask.\n\n"
    text += f"![{figure.stem}]({figure.name})\n\n" if figure.exists() else ""
    text += "Variance of the number of weights that stay in a column and in a row, over that of a "
    text += f"random mask of equal sparsity; median of {len(ratios)} linear layers:\n\n"
    return f"{text}{tables.table('method', cells)}\n"


def draw_masks(chosen: dict[str, Tensor]) -> Callable[[Any], None]:
    """Return what draws masks `[out, in]` side by side with the shares of their lines."""

    def draw(canvas: Any) -> None:
        canvas.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
        parts = canvas.subfigures(1, len(chosen))
        for part, (row, keep) in zip(parts, chosen.items(), strict=True):
            draw_mask(part, row, keep.float())

    return draw


def draw_mask(part: Any, row: str, keep: Tensor) -> None:
    """Draw a mask `[out, in]` into its part of the picture, with the shares of its lines."""
    from matplotlib.colors import LinearSegmentedColormap

    color = tables.COLORS[row.split(":")[0]]
    axes = part.subplot_mosaic(
        [["top", "."], ["mask", "side"]], width_ratios=(6, 1), height_ratios=(1, 6)
    )
    rows, columns = keep.shape
    cells = [size // -(-size // PIXELS) for size in keep.shape]  # of as many weights each
    image = adaptive_avg_pool2d(keep[None], cells)[0]
    axes["mask"].imshow(
        image,
        cmap=LinearSegmentedColormap.from_list(row, ("white", color)),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="none",
        extent=(0, columns, rows, 0),
    )
    axes["mask"].set(xlabel="inputs", ylabel="outputs", xticks=[0, columns], yticks=[0, rows])
    share, total = keep.mean().item(), keep.numel()

    def band(size: int) -> tuple[float, float]:
        off = 2 * (share * (1 - share) / size * (total - size) / max(total - 1, 1)) ** 0.5
        return share - off, share + off

    axes["top"].axhspan(*band(rows), color="gray", alpha=0.4, lw=0)
    axes["top"].plot(torch.arange(columns) + 0.5, keep.mean(dim=0), color=color, lw=0.7)
    axes["top"].set(xlim=(0, columns), ylim=(0, 1), xticks=[], yticks=[0, 1])
    axes["side"].axvspan(*band(columns), color="gray", alpha=0.4, lw=0)
    axes["side"].plot(keep.mean(dim=1), torch.arange(rows) + 0.5, color=color, lw=0.7)
    axes["side"].set(xlim=(0, 1), ylim=(rows, 0), xticks=[0, 1], yticks=[])
    part.suptitle(row, color=color)


FIGURES: dict[str, Callable[[argparse.Namespace, Path], str]] = {
    "sparsity": sparsity,
    "alpha": against_alpha,
    "samples": samples,
    "masks": masks,
}


def main() -> None:
    """Make one figure after the other; each stands in the file before the next begins."""
    args = parser().parse_args()
    args.section = args.section or Path(args.model).name
    wanted = [one_of(name, FIGURES, "figure") for name in listed(args.figures)]
    command = tables.portable(shlex.join(["python", *sys.argv]))
    folder = args.write.parent if args.write else Path()
    for name in wanted:
        figure = folder / f"figures-{name}-{args.section}.svg"
        text = FIGURES[name](changed(args), figure)
        text = f"{text.rstrip()}\n\n    {command}\n"
        print(text)
        if args.write:
            section = f"{args.section}:{name}"
            tables.write(args.write, f"figures:{section}", f"## {args.section}: {name}", text)


if __name__ == "__main__":
    sys.exit(guarded(main))
