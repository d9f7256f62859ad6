"""Make the tables of the paper for any models: methods × patterns, by perplexity and zero-shot.

    python eval/paper_tables.py meta-llama/Llama-2-7b-hf huggyllama/llama-7b --write docs/paper.md
    python eval/paper_tables.py $GBLM_ASSETS/llama/novels-6M --length 256 \\
        --calibration $GBLM_ASSETS/text/novels-calib.txt \\
        --evaluate $GBLM_ASSETS/text/novels-eval.txt --windows 64 \\
        --task-data $GBLM_ASSETS/zeroshot --limit 50 --write docs/paper.md

A table is for windows of one length; `--length 2048,4096` makes the tables of both, one after the
other. What is published (`eval/published.json`) stands beside ours where the model is one of
theirs and window, pattern, method and test are the same: the whole of WikiText-2, or all items of
the six tasks. `--tasks none` leaves zero-shot out.

Every evaluation of a pruned model stands in a JSON file at once, in the form of
`eval/quality.py`, with the name of a task for its test; a second call does only what is missing.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import published
import quality
import tables

from gblm import GblmError
from gblm.command.settings import listed
from gblm.command.side import guarded
from gblm.llm import zero_shot
from gblm.llm.models import load_tokenizer

# 1. What is asked for.


@dataclass(frozen=True)
class Test:
    """What a pruned model is tried on: a text, or a task of the zero-shot harness.

    `name` and `limit` stand in the store as `evaluate` and `windows`.
    """

    name: str
    limit: int | None
    task: str | None = None

    def key(self, args: argparse.Namespace, run: quality.Run | None) -> dict[str, Any]:
        """Return what tells this test of a run, or of the dense model, apart in a store."""
        return {**quality.key(args, run), "evaluate": self.name, "windows": self.limit}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the script."""
    new = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = new.add_argument
    add("models", nargs="*", help="hub names or local folders; none: only what is published")
    add("--calibration", default="c4", help="any source of language [%(default)s]")
    add("--evaluate", default="wikitext2", help="any source of language [%(default)s]")
    add("--length", default="2048", help="tokens in a window, with commas [%(default)s]")
    add("--samples", type=int, default=128, help="calibration windows [%(default)s]")
    add("--windows", type=int, help="evaluate perplexity on the first windows alone")
    add("--methods", default="magnitude,sparsegpt,wanda,gblm,best", help="[%(default)s]")
    add("--patterns", default="0.5,2:4", help="[%(default)s]")
    add("--draws", type=int, default=1, help="calibration draws, of seeds from 0 [%(default)s]")
    add("--tasks", default="paper", help="of lm-eval, with commas; paper (its six), none")
    add("--task-data", type=Path, help="folder of the tasks' jsonl files; without it the hub's")
    add("--limit", type=int, help="the first items of a task alone")
    add("--device", default="auto", help="cpu, cuda, auto [%(default)s]")
    add("--store", type=Path, default=Path("docs/paper.json"), help="[%(default)s]")
    add("--again", action="store_true", help="forget the stored runs that are asked for")
    add("--write", type=Path, help="Markdown file for the tables")
    add("--section", help="of that file [the names of the models]")
    return new


def lengths(text: str) -> list[int]:
    """Return the window lengths that `--length` names; raises `GblmError` where one is none."""
    found = listed(text)
    if not found or not all(item.isdecimal() and int(item) > 1 for item in found):
        raise GblmError(f"--length {text}: give numbers of tokens, such as 2048 or 2048,4096")
    return [int(item) for item in found]


def setting(args: argparse.Namespace, model: str, length: int) -> argparse.Namespace:
    """Return the flags of `eval/quality.py` for one model and one window."""
    own = {"side": "llm", "checkpoint": None, "model": model, "length": length}
    return argparse.Namespace(**{**vars(args), **own})


def tests(args: argparse.Namespace) -> list[Test]:
    """Return the tests: the text and every task."""
    tasks = zero_shot.PAPER if args.tasks == "paper" else listed(args.tasks.replace("none", ""))
    folder = f"{tables.portable(str(args.task_data))}/" if args.task_data else ""
    return [
        Test(tables.portable(args.evaluate), args.windows),
        *(Test(f"{folder}{task}", args.limit, task) for task in tasks),
    ]


# 2. The runs of a model.


def measure(
    args: argparse.Namespace, runs: list[quality.Run], asked: list[Test]
) -> dict[quality.Key, dict[str, Any]]:
    """Carry out what the store does not have of a model, and return all it then has.

    Raises `GblmError` for a linear that cannot have a pattern, before any run of its draw.
    """
    keys = {
        (run, test.name): quality.key_of(test.key(args, run))
        for run in (None, *runs)
        for test in asked
    }
    if args.again:
        quality.add(args.store, forget=tuple(keys.values()))
    found = quality.stored(args.store)
    left: dict[quality.Run | None, list[Test]] = {}
    for run in (None, *runs):
        if missing := [test for test in asked if keys[run, test.name] not in found]:
            left[run] = missing
    if not left:
        return found
    harness = opened(args, [test for missing in left.values() for test in missing])
    bench = quality.OPEN["llm"](args)
    if None in left:
        judge(args, bench, None, left.pop(None), harness, {})
    for seed in range(args.draws):
        here = [run for run in left if run and run.seed == seed]
        if not here:
            continue
        draw = quality.prepare_all(bench, seed, here)
        for run in here:
            with quality.pruning(bench, draw, run.method, run.pattern) as done:
                judge(args, bench, run, left[run], harness, done)
    return quality.stored(args.store)


def judge(
    args: argparse.Namespace,
    bench: quality.Bench,
    run: quality.Run | None,
    asked: list[Test],
    harness: dict[str, Any],
    done: dict[str, Any],
) -> None:
    """Try the model as it is, and store every result as soon as it is there."""
    for test in asked:
        metrics = tried(args, bench, harness[test.task]) if test.task else bench.evaluate()
        quality.add(args.store, {**test.key(args, run), **done, "metrics": metrics})
        where = f"{run.column:6} {run.row:18}" if run else f"{quality.DENSE:25}"
        values = "  ".join(f"{k} {value:.4g}" for k, value in metrics.items())
        print(f"{Path(args.model).name}  {where} {Path(test.name).name}: {values}", flush=True)


def opened(args: argparse.Namespace, asked: list[Test]) -> dict[str, Any]:
    """Return the tasks among the tests by name; raises `GblmError` where one cannot be had."""
    names = dict.fromkeys(test.task for test in asked if test.task)
    return {name: zero_shot.open_tasks([name], args.task_data, args.limit) for name in names}


def tried(args: argparse.Namespace, bench: quality.Bench, task: Any) -> dict[str, float]:
    """Return acc, acc_norm and their standard errors, those that the task has."""
    (found,) = zero_shot.accuracy(bench.model, load_tokenizer(args.model)[1], task).values()
    return found


# 3. The tables.

Found = dict[quality.Key, dict[str, Any]]
Cells = dict[tuple[str, str], list[float]]
Model = tuple[argparse.Namespace, list[quality.Run], list[Test], Found]


def metric(name: str, entries: list[dict[str, Any]]) -> float:
    """Return a metric of one run: of a text, or the mean over tasks in %.

    "acc_norm" is acc where a task has no other.
    """
    own = [entry["metrics"] for entry in entries]
    if name == "perplexity":
        return own[0][name]
    return 100 * mean(one.get(name, one["acc"]) for one in own)


def column(model: Model, name: str, pattern: str) -> dict[str, list[float]]:
    """Return a metric of one model by method, over the draws, the dense model first."""
    args, runs, asked, found = model
    of = [test for test in asked if bool(test.task) == (name != "perplexity")]
    values = defaultdict(list)
    for run in (None, *(run for run in runs if run.column == pattern)):
        entries = [found[quality.key_of(test.key(args, run))] for test in of]
        values[run.row if run else quality.DENSE].append(metric(name, entries))
    return values


def beside(model: Model, name: str, pattern: str) -> dict[str, list[float]]:
    """Return what is published of the same model, window, pattern and test, by method."""
    args, runs, asked, _ = model
    if not comparable(args, name, asked):
        return {}
    methods = {run.row: run.method.name for run in runs}
    values = {}
    for row, method in {quality.DENSE: quality.DENSE, **methods}.items():
        level = "" if row == quality.DENSE else pattern
        known = published.look_up(args.model, name, args.length, level, method)
        if known is not None:
            values[row] = [known]
    return values


def comparable(args: argparse.Namespace, name: str, asked: list[Test]) -> bool:
    """Return whether the tests are those of the papers: WikiText-2, or the six tasks, whole."""
    if name == "perplexity":
        named = re.search(r"wikitext-?2", Path(args.evaluate).name)
        return bool(named) and args.windows is None
    return args.limit is None and {test.task for test in asked if test.task} == set(zero_shot.PAPER)


def compared(models: dict[str, Model], pattern: str, name: str, ours: tuple[str, ...]) -> str:
    """Return the table of one pattern over all models: our metrics, and theirs where there are."""
    cells: Cells = {}
    for label, model in models.items():
        columns = {own: column(model, own, pattern) for own in ours}
        headed = {f"{label}, {own}" if len(ours) > 1 else label: columns[own] for own in ours}
        for heading, values in {
            **headed,
            f"{label}, published": beside(model, name, pattern),
        }.items():
            cells |= {(row, heading): found for row, found in values.items()}
    return tables.table("method", cells)


def by_task(model: Model) -> str:
    """Return the accuracies of one model in %, task by task."""
    args, runs, asked, found = model
    cells: Cells = defaultdict(list)
    for run in (None, *runs):
        for test in (test for test in asked if test.task):
            entry = found[quality.key_of(test.key(args, run))]
            row = f"{run.row}, {run.column}" if run else quality.DENSE
            cells[row, test.task].append(100 * entry["metrics"]["acc"])
    return tables.table("method, pattern", cells)


def markdown(models: dict[str, Model], length: int) -> str:
    """Return the tables of one window."""
    args, runs, asked, _ = next(iter(models.values()))
    draws = f"; mean ± standard deviation of {args.draws} draws" if args.draws > 1 else ""
    source, test = (Path(name).name for name in (args.calibration, args.evaluate))
    first = f", its first {args.windows} windows" if args.windows else ""
    text = f"{args.samples} calibration windows of {length} tokens of {source}; perplexity on "
    text += f"{test}{first}, in windows of {length}{draws}.\n\n"
    tasks = [test for test in asked if test.task]
    for pattern in dict.fromkeys(run.column for run in runs):
        title = f"Perplexity on {test}, window {length}, {pattern}"
        text += f"{title}:\n\n{compared(models, pattern, 'perplexity', ('perplexity',))}\n"
        if tasks:
            title = f"Zero-shot accuracy in %, mean of {len(tasks)} tasks, {pattern}"
            ours = ("acc", "acc_norm")
            text += f"{title}:\n\n{compared(models, pattern, 'zero-shot', ours)}\n"
    if not tasks:
        return text
    few = f", the first {args.limit} items of each" if args.limit else ""
    for label, model in models.items():
        text += f"{label}, acc by task in %{few}:\n\n{by_task(model)}\n"
    return f"{text}`acc_norm` is the harness's, and acc for the tasks that have none.\n\n"


def main() -> None:
    """Read the flags, carry out what is missing, show and write the tables."""
    args = parser().parse_args()
    names = [Path(model.rstrip("/")).name for model in args.models]
    labels = names if len(set(names)) == len(names) else args.models
    args.section = args.section or ", ".join(labels)
    command = f"    {tables.portable(shlex.join(['python', *sys.argv]))}\n"
    asked = tests(args)
    for length in lengths(args.length) if args.models else ():
        models: dict[str, Model] = {}
        for label, model in zip(labels, args.models, strict=True):
            own = setting(args, model, length)
            runs = quality.wanted(own)
            models[tables.portable(label)] = (own, runs, asked, measure(own, runs, asked))
        text = markdown(models, length) + command
        print(text)
        if args.write:
            heading = f"## {args.section}, window {length}"
            tables.write(args.write, f"paper:{args.section}:{length}", heading, text)
    text = published.text()
    if not args.models:
        print(text)
    if args.write:
        tables.write(args.write, "paper:published", "## Published figures", text)


if __name__ == "__main__":
    sys.exit(guarded(main))
