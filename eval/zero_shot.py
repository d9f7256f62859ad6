"""Measure what a model can do unshown: zero-shot tasks of lm-evaluation-harness, one model a call.

    python eval/zero_shot.py $GBLM_ASSETS/llama/novels-6M --task-data $GBLM_ASSETS/zeroshot \\
        --limit 50 --write docs/benchmarks.md

Any folder that transformers loads will do, a pruned one of gblm's among them. Tasks, prompts and
metrics are the harness' own: acc takes the likeliest answer, acc_norm the likeliest by its length,
± is the standard error. The mean is that of acc.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import tables

from gblm.command.settings import listed
from gblm.command.side import guarded
from gblm.llm import models
from gblm.llm.zero_shot import BATCH, METRICS, Accuracy, accuracy, mean, open_tasks
from gblm.report import versions


def parser() -> argparse.ArgumentParser:
    """Return the parser of the script."""
    new = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = new.add_argument
    add("model", help="a folder or a hub name")
    add("--tasks", default="paper", help="tasks of the harness, with commas [the paper's six]")
    add("--task-data", type=Path, help="a folder with the items of each, TASK_….jsonl [the hub]")
    add("--limit", type=int, help="evaluate on the first items of each task alone")
    add("--batch-size", type=int, default=BATCH, help="sequences at a time [%(default)s]")
    add("--device", default="auto", help="cpu, cuda, auto [%(default)s]")
    add("--write", type=Path, help="Markdown file for the table")
    add("--json", type=Path, help="file for the figures, as fractions")
    return new


def percent(values: dict[str, float], metric: str) -> str:
    """Return a metric with its standard error in percent; nothing where the task has none."""
    if metric not in values:
        return ""
    error = values.get(f"{metric}_stderr")
    return f"{100 * values[metric]:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def table(found: Accuracy) -> str:
    """Return a Markdown table of the tasks, and the mean of acc below them."""
    lines = [["task", *(f"{metric} in %" for metric in METRICS)], ["---", "--:", "--:"]]
    lines += [
        [task, *(percent(values, metric) for metric in METRICS)] for task, values in found.items()
    ]
    lines.append(["mean", f"{100 * mean(found):.1f}", ""])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Read the flags, measure, show the table and write it where asked."""
    args = parser().parse_args()
    tasks = open_tasks(listed(args.tasks), args.task_data, args.limit)
    model, tokenizer = models.load(args.model, device=args.device)
    found = accuracy(model, tokenizer, tasks, args.batch_size)
    name = Path(args.model).name
    first = f", the first {args.limit} items of each task" if args.limit else ""
    text = f"{name}, zero-shot{first}.\n\n{table(found)}"
    tables.publish(text, args.write, f"zero-shot:{name}", f"### Zero-shot: {name}")
    if args.json:
        whole = {"model": name, "limit": args.limit, "tasks": found, "mean": mean(found)}
        tables.replace(args.json, json.dumps({**whole, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(guarded(main))
