"""Measure what methods leave of a model: methods × patterns × calibration draws, one model a call.

    python eval/quality.py llm --model $GBLM_ASSETS/llama/novels-6M --length 256 --windows 160 \\
        --calibration $GBLM_ASSETS/text/novels-calib.txt \\
        --evaluate $GBLM_ASSETS/text/novels-eval.txt \\
        --methods magnitude,wanda,gblm:alpha=50:norm=l2 --patterns 0.5/row,0.5/layer,2:4 \\
        --draws 3 --write docs/benchmarks.md --section novels-6M

A method has its options after colons, a pattern without a group is compared in the method's own.
Every finished run stands in a JSON file at once, and a second call does only what is missing there;
the tables are those of the runs a call asks for, measured now or before.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import tables
from torch import nn

import gblm
from gblm import GblmError, Method, Pattern, Statistics, methods
from gblm.base import Batch
from gblm.command.settings import listed
from gblm.command.side import guarded
from gblm.machine.device import find_device
from gblm.maths import patterns, stats
from gblm.methods import METHODS, make
from gblm.walk.blocks import Linear
from gblm.walk.gradients import Gradients, sweep
from gblm.walk.inputs import with_gradients
from gblm.walk.prune import Pruning, needed, unfit
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk

VERSION = 2  # raise it when a run means something else than its key says
DEFAULTS = {"llm": {"alpha": 100, "samples": 128}, "vit": {"alpha": "auto", "samples": 1024}}
METRICS = {  # the first is that of the figure
    "llm": {"perplexity": "perplexity, lower is better"},
    "vit": {"top1": "top-1 in %, higher is better", "cross_entropy": "cross-entropy in nats"},
}
DENSE = "dense"
SETTING = ("side", "model", "checkpoint", "calibration", "evaluate", "samples", "length", "windows")

Key = tuple[Any, ...]

# 1. What is asked for.


@dataclass(frozen=True)
class Run:
    """One method with one pattern on one calibration draw; row and column of the table."""

    row: str
    column: str
    method: Method
    pattern: Pattern
    seed: int


def parser() -> argparse.ArgumentParser:
    """Return the parser of the script."""
    new = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = new.add_argument
    add("side", choices=sorted(METRICS), help="language or vision")
    add("--model", required=True, help="as the command line of the side takes it")
    add("--checkpoint", help="the weights of a model of timm")
    add("--calibration", required=True, help="a source of the side")
    add("--evaluate", required=True, help="a source of the side")
    add("--samples", type=int, help="calibration samples [128 windows, 1024 images]")
    add("--length", type=int, help="tokens in a window [2048, or what the model can take]")
    add("--windows", type=int, help="evaluate on the first windows alone")
    add("--methods", default=",".join(METHODS), help="NAME[:OPTION=VALUE…], with commas")
    add("--patterns", default="0.5/row,2:4", help="0.5/row, 0.5/layer, 2:4, …, with commas")
    add("--draws", type=int, default=1, help="calibration draws, of seeds from 0 [%(default)s]")
    add("--device", default="auto", help="cpu, cuda, auto [%(default)s]")
    add("--store", type=Path, default=Path("docs/quality.json"), help="[%(default)s]")
    add("--again", action="store_true", help="forget the stored runs that are asked for")
    add("--write", type=Path, help="Markdown file for the tables; the figure goes beside it")
    add("--section", help="of that file [the name of the model]")
    return new


def measured(program: str, samples: int) -> argparse.ArgumentParser:
    """Return the parser of a script that measures a model of either side while it is pruned."""
    new = argparse.ArgumentParser(description=program.splitlines()[0])
    add = new.add_argument
    add("side", choices=sorted(METRICS), help="language or vision")
    add("--model", required=True, help="as the command line of the side takes it")
    add("--checkpoint", help="the weights of a model of timm")
    add("--calibration", required=True, help="a source of the side")
    add("--samples", type=int, default=samples, help="calibration samples [%(default)s]")
    add("--length", type=int, help="tokens in a window")
    add("--write", type=Path, help="Markdown file for the tables")
    return new


def opened(args: argparse.Namespace) -> Bench:
    """Load the model of such a script on the CPU; it evaluates nothing."""
    args.device, args.evaluate, args.windows = "cpu", args.calibration, 1
    return OPEN[args.side](args)


def wanted(args: argparse.Namespace) -> list[Run]:
    """Return the runs that the flags ask for; raises `GblmError` for a value that is none."""
    args.samples = args.samples or DEFAULTS[args.side]["samples"]
    if args.draws < 1:
        raise GblmError(f"--draws is {args.draws}; give 1 or more")
    ready = args.side == "llm" and Path(args.calibration).suffix in (".npz", ".safetensors")
    if ready and args.draws > 1:
        raise GblmError(f"{args.calibration}: ready windows are the same in every draw; --draws 1")
    rows = dict(named(text, args.side) for text in listed(args.methods))
    runs = [
        Run(row, column, method, patterns.parse(column, method.group), seed)
        for seed in range(args.draws)
        for column in listed(args.patterns)
        for row, method in rows.items()
    ]
    if not runs:
        raise GblmError("no method or no pattern given; try --methods gblm --patterns 0.5/row")
    return runs


def named(text: str, side: str) -> tuple[str, Method]:
    """Return a method and its full text: "gblm:norm=l2" is "gblm:alpha=100:norm=l2" for llm.

    Raises `GblmError` where no method has that name or those options.
    """
    name, options = methods.parse(text, alpha=DEFAULTS[side]["alpha"])
    whole = {k: int(v) for k, v in options.items() if isinstance(v, float) and v.is_integer()}
    said = (f"{k}={v}" for k, v in sorted({**options, **whole}.items()))
    return ":".join([name, *said]), make(name, **options)


# 2. What is stored.


def key(args: argparse.Namespace, run: Run | None = None) -> dict[str, Any]:
    """Return what tells the runs of a store apart; without a run, the key of the dense model."""
    setting = {name: getattr(args, name) for name in SETTING}
    setting = {k: tables.portable(v) if isinstance(v, str) else v for k, v in setting.items()}
    if run is None:
        return {"version": VERSION, **setting, "method": DENSE, "pattern": "", "seed": 0}
    names = {"method": run.row, "pattern": run.pattern.name, "seed": run.seed}
    return {"version": VERSION, **setting, **names}


def stored(path: Path) -> dict[Key, dict[str, Any]]:
    """Return the entries of a store by the values of their keys."""
    entries = json.loads(path.read_text()) if path.exists() else []
    return {key_of(entry): entry for entry in entries}


def key_of(entry: dict[str, Any]) -> Key:
    """Return the values of the key of an entry, or of a key by itself."""
    names = ("version", *SETTING, "method", "pattern", "seed")
    return tuple(entry[name] for name in names)


def add(path: Path, *entries: dict[str, Any], forget: tuple[Key, ...] = ()) -> None:
    """Add entries to a store, in the place of those of the same keys, and forget others."""
    found = stored(path)
    for old in forget:
        found.pop(old, None)
    found |= {key_of(entry): entry for entry in entries}
    lines = [json.dumps(entry) for entry in found.values()]
    tables.replace(path, "[\n" + ",\n".join(lines) + "\n]\n")


# 3. The runs.


@dataclass
class Bench:
    """A dense model, how its calibration batches are drawn, and how good it is."""

    model: nn.Module
    draw: Callable[[int], Batch]  # by the seed
    evaluate: Callable[[], dict[str, float]]  # of the model as it is


@dataclass
class Draw:
    """One calibration draw, with what all its runs share; `seconds` are those of the gradients."""

    walk: Walk
    gradients: Gradients
    seconds: float


def language(args: argparse.Namespace) -> Bench:
    """Load a causal language model and its evaluation windows."""
    from transformers.utils import logging

    from gblm.llm import data, models
    from gblm.llm.evaluate import perplexity

    logging.disable_progress_bar()
    model, tokenizer = models.load(args.model, device=args.device)
    length = models.window_length(model.config, args.length)
    windows = data.evaluation(args.evaluate, tokenizer, length, args.windows)
    data.check_ids(windows, models.vocabulary(model.config), args.evaluate)
    sizes = {"samples": args.samples, "length": length}

    def draw(seed: int) -> Batch:
        return models.windows(args.calibration, model.config, tokenizer, seed=seed, **sizes)

    return Bench(model, draw, lambda: {"perplexity": perplexity(model, windows)})


def vision(args: argparse.Namespace) -> Bench:
    """Load an image classifier and its evaluation images."""
    from gblm.vit import data, models
    from gblm.vit.evaluate import evaluate

    model = models.load(args.model, args.checkpoint).to(find_device(args.device))
    images = data.open_images(args.calibration, model, "calibration")
    loader = data.evaluation(data.open_images(args.evaluate, model, "evaluation"))

    def draw(seed: int) -> Batch:
        batch = data.calibration(images, args.samples, seed)
        data.fitting(model, batch, args.calibration)
        if "labels" not in batch:
            raise GblmError(f"{args.calibration} has no labels; give a labelled source")
        return batch

    return Bench(model, draw, lambda: evaluate(model, loader))


OPEN = {"llm": language, "vit": vision}


def prepare(bench: Bench, seed: int, needs: frozenset[str]) -> Draw:
    """Draw the calibration batch of a seed and sum the gradients over it, where any are needed."""
    walk = Walk.of(bench.model, bench.draw(seed))
    if not needs & set(stats.GRADIENT):
        return Draw(walk, {}, 0.0)
    start = time.perf_counter()
    gradients, _ = sweep(walk, needs)
    return Draw(walk, gradients, time.perf_counter() - start)


def look(draw: Draw, needs: frozenset[str], see: Callable[[Linear, Statistics], None]) -> None:
    """Let `see` have every linear of the dense model with its statistics; nothing is pruned."""

    def visit(visit: Visit) -> None:
        for groups in visit.inputs(needs):
            for inputs in groups:
                for linear in inputs.group:
                    gradient = visit.gradients.get(linear.name)
                    see(linear, with_gradients(inputs.statistics, gradient, linear.weight.device))

    forward(draw.walk, visit, gradients=draw.gradients)


def prepare_all(bench: Bench, seed: int, runs: list[Run]) -> Draw:
    """Prepare the draw of some runs.

    Raises `GblmError` for a linear that cannot have a pattern.
    """
    sums = (needed(run.method, run.pattern) for run in runs if run.method.share == 1)
    draw = prepare(bench, seed, frozenset().union(*sums))
    for run in runs:
        unfit(draw.walk.blocks, run.method, run.pattern)
    return draw


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give a model its parameters and their values back at the end of a `with`."""
    named = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    dense = {parameter: parameter.detach().clone() for *_, parameter in named}
    try:
        yield
    finally:
        for module, name, parameter in named:  # a rotation gives a tied head weights of its own
            setattr(module, name, parameter)
        for parameter, value in dense.items():
            parameter.data.copy_(value)


@contextmanager
def pruning(bench: Bench, draw: Draw, method: Method, pattern: Pattern) -> Iterator[dict[str, Any]]:
    """Prune the dense model for the time of a `with`: the only place that prunes.

    Gives the `name` of the method, the `sparsity` reached and the `seconds` it took.
    """
    with unchanged(bench.model):
        if method.share == 1:
            report = Pruning(draw.walk, method, pattern, draw.gradients).run()
        else:  # the gradients of fewer samples are its own
            report = gblm.prune(bench.model, draw.walk.batch, method, pattern)
        taken = draw.seconds if needed(method, pattern) else 0.0
        taken = report.seconds.get("gradients", taken)
        seconds = {"gradients": round(taken, 1), "prune": round(report.seconds["prune"], 1)}
        yield {"name": report.method, "sparsity": report.sparsity, "seconds": seconds}


def pruned(bench: Bench, draw: Draw, method: Method, pattern: Pattern) -> dict[str, Any]:
    """Prune and measure the dense model, and leave it dense."""
    with pruning(bench, draw, method, pattern) as found:
        return {**found, "metrics": bench.evaluate()}


def measure(args: argparse.Namespace, runs: list[Run]) -> dict[Key, dict[str, Any]]:
    """Carry out the runs that the store does not have, and return all it then has.

    Raises `GblmError` for a linear that cannot have a pattern, before any run of its draw.
    """
    asked = [key_of(key(args, run)) for run in (None, *runs)]
    if args.again:
        add(args.store, forget=tuple(asked))
    found = stored(args.store)
    left = [run for run in runs if key_of(key(args, run)) not in found]
    if not left and asked[0] in found:
        return found
    bench = OPEN[args.side](args)
    if asked[0] not in found:
        add(args.store, {**key(args), "metrics": bench.evaluate()})
    for seed in range(args.draws):
        here = [run for run in left if run.seed == seed]
        if not here:
            continue
        draw = prepare_all(bench, seed, here)
        for run in here:
            entry = {**key(args, run), **pruned(bench, draw, run.method, run.pattern)}
            add(args.store, entry)
            values = "  ".join(f"{k} {tables.number(v)}" for k, v in entry["metrics"].items())
            print(f"seed {seed}  {run.column:10} {entry['name']:28} {values}", flush=True)
    return stored(args.store)


# 4. The tables.


def cells(
    args: argparse.Namespace, runs: list[Run], found: dict[Key, dict[str, Any]], metric: str
) -> dict[tuple[str, str], list[float]]:
    """Return the values of a metric over the draws, by row and column."""
    values = defaultdict(list)
    for run in runs:
        entry = found[key_of(key(args, run))]
        values[run.row, run.column].append(entry["metrics"][metric])
    return values


def dense(args: argparse.Namespace, found: dict[Key, dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of the dense model."""
    return found[key_of(key(args))]["metrics"]


def described(args: argparse.Namespace) -> str:
    """Return what the runs were calibrated and evaluated on, in words."""
    name, source, test = (Path(v).name for v in (args.model, args.calibration, args.evaluate))
    length = f" of {args.length} tokens" if args.length else ""
    unit = f"windows{length}" if args.side == "llm" else "images"
    first = f", its first {args.windows} windows{length}" if args.windows else ""
    return f"{name}: {args.samples} calibration {unit} of {source}; evaluated on {test}{first}"


def draw_patterns(args: argparse.Namespace, metric: str, values: dict, level: float) -> Any:
    """Return what draws a metric against the patterns, by the methods that have a colour.

    A line joins rising sparsities alone; n:m, and what is compared otherwise, stand for themselves.
    """
    columns = list(dict.fromkeys(column for _, column in values))
    plain = [column for column in columns if column.replace(".", "").isdigit()]
    joined = plain if plain == sorted(plain, key=float) else []

    def draw(axes: Any) -> None:
        for row in dict.fromkeys(row for row, _ in values):
            name, *options = row.split(":")
            if name not in tables.COLORS or (options and row != named(name, args.side)[0]):
                continue
            look = {"color": tables.COLORS[name], "marker": tables.MARKERS[name], "ms": 6}
            line = {column: mean(found) for (own, column), found in values.items() if own == row}
            ends = [columns.index(c) for c in joined], [line[c] for c in joined]
            axes.plot(*ends, lw=2.5 if name == "best" else 1.2, **look)
            alone = [column for column in line if column not in joined]
            places = [columns.index(c) for c in alone], [line[c] for c in alone]
            axes.plot(*places, ls="none", fillstyle="full" if not joined else "none", **look)
            axes.plot([], [], label=name, **look)
        tables.level(axes, DENSE, level)
        axes.set_xticks(range(len(columns)), columns, rotation=45 if len(columns) > 5 else 0)
        axes.set_ylabel(METRICS[args.side][metric])
        if args.side == "llm":
            tables.logarithmic(axes)

    return draw


def markdown(args: argparse.Namespace, runs: list[Run], found: dict[Key, dict[str, Any]]) -> str:
    """Return a table for every metric, the figure where a file is written, and the command."""
    over = f"; mean ± standard deviation of {args.draws} draws" if args.draws > 1 else ""
    text, level = f"{described(args)}{over}.\n\n", dense(args, found)
    for metric, title in METRICS[args.side].items():
        values = cells(args, runs, found, metric)
        text += f"{title[0].upper()}{title[1:]} (dense: {tables.number(level[metric])}):\n\n"
        text += f"{tables.table('method', values)}\n"
    first = next(iter(METRICS[args.side]))
    if args.write:
        path = args.write.with_name(f"quality-{args.section}.svg")
        values = cells(args, runs, found, first)
        text += tables.figure(path, draw_patterns(args, first, values, level[first]))
    return f"{text}    {tables.portable(shlex.join(['python', *sys.argv]))}\n"


def main() -> None:
    """Read the flags, carry out what is missing, show and write the tables."""
    args = parser().parse_args()
    args.section = args.section or Path(args.model).name
    runs = wanted(args)
    text = markdown(args, runs, measure(args, runs))
    print(text)
    if args.write:
        tables.write(args.write, f"quality:{args.section}", f"## Quality: {args.section}", text)


if __name__ == "__main__":
    sys.exit(guarded(main))
