"""Zero-shot accuracy of a causal language model, by lm-evaluation-harness on the model in memory.

Tasks, prompts and metrics are the harness' own. What gblm brings is where the items come from: the
hub, as the harness has it, or local files.
"""

import copy
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gblm.base import GblmError, explained, nearest
from gblm.machine.device import BatchSize
from gblm.machine.processes import gathered, rank

PAPER = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "openbookqa")
METRICS = ("acc", "acc_norm")  # the first is the headline of a task
BATCH = 8  # items' choices the model sees at a time
NAME = re.compile(r"""^["']?task["']?\s*:[ \t]*["']?([^\s"'\[]+)""", re.MULTILINE)  # of a YAML

Accuracy = dict[str, dict[str, float]]  # by task: metrics and their standard errors, as fractions
Row = dict[str, Any]


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness with their items, by name; `limit` keeps the first items of each."""

    tasks: dict[str, Any]
    limit: int | None = None

    def counts(self) -> dict[str, tuple[int, str]]:
        """Return how many items of each are evaluated."""
        found = {name: len(list(task.eval_docs)) for name, task in self.tasks.items()}
        return {name: (min(n, self.limit or n), "items") for name, n in found.items()}


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH,
) -> Accuracy:
    """Open tasks and return the accuracy in them: see `open_tasks` and `accuracy`."""
    return accuracy(model, tokenizer, open_tasks(tasks, data, limit), batch_size)


def open_tasks(names: Sequence[str], data: Path | None = None, limit: int | None = None) -> Tasks:
    """Return tasks of the harness with their items; "paper" stands for the six of the paper.

    data: a folder of TASK.jsonl or TASK_….jsonl, one item a line, such as
    hellaswag_validation.jsonl; without it the harness loads the items from the hub. limit: evaluate
    on the first items of each task alone.

    Raises `GblmError` where the harness is missing, does not know a task or does not judge it by
    accuracy, and where items are missing or of another form than the task's.
    """
    if limit is not None and limit < 1:
        raise GblmError(f"{limit} items of a task are none; give a limit of 1 or more")
    groups = {"paper": PAPER}
    tasks = list(dict.fromkeys(task for name in names for task in groups.get(name, (name,))))
    if not tasks:
        raise GblmError("no task given; paper stands for the six of the paper")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise GblmError(
            f"tasks are evaluated by lm-evaluation-harness, which is missing ({error}); "
            "pip install 'gblm[eval]'"
        ) from error
    with redirect_stderr(io.StringIO()):  # where gblm has its own bar
        manager = _manager(tasks)
        files = {name: _file(name, data) for name in tasks} if data else {}
        return Tasks({name: _open(name, files.get(name), manager) for name in tasks}, limit)


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    batch_size: int = BATCH,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Return acc and acc_norm with their standard errors, as fractions, by task.

    A task has the metrics that the harness defines for it. A batch that does not fit is halved. Of
    several processes, process 0 evaluates for all. Raises `GblmError` where the tokenizer has no
    token that the harness could begin a text with.
    """
    if batch_size < 1:
        raise GblmError(f"a batch of {batch_size} holds nothing; give 1 or more")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise GblmError(
            "the tokenizer has neither a bos nor an eos token, and lm-evaluation-harness needs one "
            "of them; name it in tokenizer_config.json, or leave out the tasks"
        )

    def run(step: int) -> Accuracy:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        accuracies = {}
        with redirect_stderr(io.StringIO()):
            # A copy, for the harness gives a tokenizer a token to pad with, which no result needs.
            lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=step)
            for name, task in tasks.tasks.items():
                one = {"tasks": {name: task}}
                results = evaluate(lm, one, limit=tasks.limit, log_samples=False)["results"]
                accuracies[name] = _metrics(results[name])
                progress(len(accuracies), len(tasks.tasks))
        return accuracies

    return gathered({} if rank() else BatchSize(batch_size, auto=True).run(run))[0]


def mean(accuracies: Accuracy) -> float:
    """Return the mean of acc over the tasks."""
    return sum(values[METRICS[0]] for values in accuracies.values()) / len(accuracies)


def entries(accuracies: Accuracy) -> Accuracy:
    """Return accuracies as entries of an evaluation: of every task and metric, and the mean."""
    evaluation = {
        name if metric == METRICS[0] else f"{name} {metric}": {
            key: values[key] for key in (metric, f"{metric}_stderr") if key in values
        }
        for name, values in accuracies.items()
        for metric in METRICS
        if metric in values
    }
    several = {"mean of tasks": {METRICS[0]: mean(accuracies)}} if len(accuracies) > 1 else {}
    return evaluation | several


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return acc and acc_norm of a row of results, whose keys are "acc,FILTER", "acc_stderr,…"."""
    values = {key.partition(",")[0]: value for key, value in row.items()}
    keys = [f"{metric}{end}" for metric in METRICS for end in ("", "_stderr")]
    # A single item has no standard error, which the harness writes in words.
    return {key: float(values[key]) for key in keys if isinstance(values.get(key), float | int)}


@cache
def _known() -> dict[str, Path]:
    """Return the file of every task of the harness, whose own index takes many seconds to make."""
    import lm_eval.tasks

    files: dict[str, Path] = {}
    for file in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        for name in NAME.findall(file.read_text(encoding="utf-8")):
            files.setdefault(name, file)
    return files


def _manager(names: Sequence[str]) -> Any:
    """Return a task manager that knows the tasks; raises `GblmError` where the harness does not."""
    from lm_eval.tasks import TaskManager

    files = _known()
    for name in names:
        if name not in files:
            raise GblmError(
                f"unknown task {name!r}; {nearest(name, ['paper', *files])}"
                "`lm-eval ls subtasks` lists all, groups of tasks are not taken, and paper stands "
                "for the six of the paper"
            )
    folders: list[str | Path] = sorted({files[name].parent for name in names})
    return TaskManager(include_path=folders, include_defaults=False)


def _open(name: str, file: Path | None, manager: Any) -> Any:
    """Return a task of the harness, with the items of the file where there is one."""
    spec: str | Row = name
    what = f"the items of the task {name} cannot be loaded"
    way = "check the connection to the hub, or give a folder of them (--task-data)"
    if file:
        what, way = f"{file} has not the form of the task {name}", "repair it"
        items = _items(name, file)
        # A group may say what its tasks have otherwise: here the items, for whatever split.
        local = {"task": name, "custom_dataset": lambda **_: defaultdict(lambda: items)}
        spec = {"group": "local", "task": [local]}
    with explained(what, way):
        task = manager.load(spec)["tasks"][name]
    if METRICS[0] not in task.aggregation():
        metrics = ", ".join(task.aggregation())
        raise GblmError(f"the task {name} is judged by {metrics}, not by acc; leave it out")
    task.set_config("num_fewshot", 0)
    return task


def _file(name: str, data: Path) -> Path:
    """Return the file of a task in a folder; raises `GblmError` where none is, or several are."""
    if not data.is_dir():
        raise GblmError(f"task data {data}: no such folder; give one that holds {name}.jsonl")
    patterns = (f"{name}.jsonl", f"{name}_*.jsonl")
    names = sorted(file.name for pattern in patterns for file in data.glob(pattern))
    if not names:
        raise GblmError(f"task data {data} has neither {' nor '.join(patterns)}; add the items")
    if len(names) > 1:
        several = ", ".join(names)
        raise GblmError(f"task data {data} has several files for {name}: {several}; keep one")
    return data / names[0]


def _items(name: str, file: Path) -> Any:
    """Return the items of a file as a data set in memory; raises `GblmError` for a damaged one."""
    import datasets

    with explained(f"{file} cannot be read", "repair it"):
        lines = file.read_text(encoding="utf-8").split("\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with explained(f"{file}, line {number}: no item of the task {name}", "repair it"):
            rows.append(row := dict(json.loads(line)))
            if name == "boolq" and "label" not in row:  # in the file of its authors
                row["label"] = int(row["answer"])
    if not rows:
        raise GblmError(f"{file} is empty; give one item of the task {name} a line")
    if other := next((row for row in rows if row.keys() != rows[0].keys()), None):
        raise GblmError(
            f"{file}: items have {', '.join(rows[0])}, but one {', '.join(other)}; repair it"
        )
    with explained(f"{file} is no table of items", "repair it"):  # a field is not of one type
        return datasets.Dataset.from_list(rows)
