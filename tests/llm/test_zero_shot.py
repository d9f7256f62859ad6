"""Zero-shot tasks: the harness' own prompts and metrics, whatever the items come from."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gblm import GblmError
from gblm.llm import load
from gblm.llm.__main__ import main
from gblm.llm.zero_shot import PAPER, _known, accuracy, entries, mean, open_tasks, zero_shot

LIMIT = 5
ITEMS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"question": f"is {i} even", "passage": f"Of {i} we know little.", "answer": i % 2 == 0}
        for i in range(6)
    ],
    "winogrande": [
        {
            "sentence": f"The {a} met the {b} when the _ woke.",
            "option1": a,
            "option2": b,
            "answer": c,
        }
        for a, b, c in [("cat", "dog", "1"), ("hen", "fox", "2"), ("owl", "mouse", "1")] * 2
    ],
    "arc_easy": [
        {
            "id": str(i),
            "question": f"What is {i} and 1?",
            "choices": {
                "text": [str(i + k) for k in range(3 + i % 2)],
                "label": list("ABCD")[: 3 + i % 2],
            },
            "answerKey": "B",
        }
        for i in range(6)
    ],
}


def write(folder: Path, items: dict[str, list[dict[str, Any]]], end: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for task, rows in items.items():
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{task}{end}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of items of three tasks."""
    return write(tmp_path_factory.mktemp("tasks") / "data", ITEMS, "_validation")


@pytest.fixture(scope="session")
def tiny(llm: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of the tiny LLaMA, with a tokenizer that can begin a text."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(llm[2], folder)
    AutoTokenizer.from_pretrained(folder, eos_token="Ā").save_pretrained(folder)
    return [*llm[:2], str(folder), *llm[3:]]


@pytest.fixture(params=["made", "real"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, list[str]]:
    """A model, the items of tasks, and the tasks."""
    if request.param == "made":
        made = request.getfixturevalue("tiny")[2], request.getfixturevalue("data")
        return (*made, list(ITEMS))
    assets: Path = request.getfixturevalue("assets")
    for file in (assets / "zeroshot").glob("*.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        (tmp_path / file.name).write_text("".join(lines[: LIMIT + 3]))
    return str(assets / "llama/stories260K"), tmp_path, ["paper"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Let the harness find in a folder what it asks the hub for, in the hub's form."""
    import datasets

    paths = {
        ("aps/super_glue", "boolq"): ("boolq", "validation"),
        ("nyu-mll/glue", "rte"): ("rte", "validation"),
        ("Rowan/hellaswag", None): ("hellaswag", "validation"),
        ("allenai/winogrande", "winogrande_xl"): ("winogrande", "validation"),
        ("allenai/ai2_arc", "ARC-Easy"): ("arc_easy", "test"),
        ("allenai/openbookqa", "main"): ("openbookqa", "test"),
    }

    def use(folder: Path) -> None:
        def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
            task, evaluated = paths[path, name]
            (file,) = folder.glob(f"{task}*.jsonl")
            items = datasets.Dataset.from_json(str(file), cache_dir=tmp_path / "cache")
            if task == "boolq":
                names = datasets.ClassLabel(names=["False", "True"])
                items = items.rename_column("answer", "label").cast_column("label", names)
            if task == "hellaswag":
                items = items.cast_column("label", datasets.Value("string"))
            others = items.select(range(len(items) - 1, len(items) - 4, -1))
            splits = dict.fromkeys(("train", "validation", "test"), others)
            return datasets.DatasetDict({**splits, evaluated: items})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return use


def requests(tasks: Any) -> dict[str, list[tuple[str, str]]]:
    """Return what the harness asks a model, by task: contexts and continuations."""
    found = {}
    for name, task in tasks.tasks.items():
        task.build_all_requests(limit=LIMIT)
        found[name] = [instance.args for instance in task.instances]
    return found


def test_local_items_are_evaluated_as_those_of_the_hub(pair, hub):
    name, folder, names = pair
    model, tokenizer = load(name, device="cpu")
    local = open_tasks(names, folder, LIMIT)
    hub(folder)
    stock = open_tasks(names, limit=LIMIT)
    asked = requests(local)
    assert asked == requests(stock)
    assert list(asked) == (list(PAPER) if names == ["paper"] else names)
    assert all(len(own) >= 2 * LIMIT for own in asked.values())
    found = accuracy(model, tokenizer, local)
    assert (
        found
        == accuracy(model, tokenizer, stock)
        == zero_shot(model, tokenizer, names, folder, LIMIT)
    )
    for task, values in found.items():
        normed = task in ("hellaswag", "arc_easy", "openbookqa")
        assert list(values) == ["acc", "acc_stderr", *["acc_norm", "acc_norm_stderr"] * normed]
        assert values["acc"] * LIMIT == pytest.approx(round(values["acc"] * LIMIT))
        spread = math.sqrt(values["acc"] * (1 - values["acc"]) / (LIMIT - 1))
        assert values["acc_stderr"] == pytest.approx(spread)
    assert mean(found) == pytest.approx(sum(v["acc"] for v in found.values()) / len(found))


def test_another_item_is_another_request(data, hub, tmp_path):
    hub(data)
    rows = [{**row, "passage": row["passage"].lower()} for row in ITEMS["boolq"]]
    edited = open_tasks(["boolq"], write(tmp_path / "edited", {"boolq": rows}))
    assert requests(edited) != requests(open_tasks(["boolq"]))


def test_the_harness_chooses_what_is_likelier(tiny, data):
    """Against log probabilities without the harness: its padding, its batches, its cuts."""
    import torch

    model, tokenizer = load(tiny[2], device="cpu")
    right = 0
    for row in ITEMS["winogrande"]:
        start, end = row["sentence"].split("_")
        scores = []
        for option in (row["option1"], row["option2"]):
            context, ids = (
                tokenizer(text)["input_ids"] for text in (start + option, start + option + end)
            )
            window = torch.tensor([ids[-65:]])
            logits = model(window[:, :-1]).logits.log_softmax(-1)
            tokens = logits.gather(-1, window[:, 1:, None])[0, :, 0]
            scores.append(tokens[len(context) - len(ids) :].sum().item())
        right += scores.index(max(scores)) == int(row["answer"]) - 1
    found = zero_shot(model, tokenizer, ["winogrande"], data, batch_size=3)
    assert found["winogrande"]["acc"] == pytest.approx(right / 6)


def test_the_model_and_its_tokenizer_stay_as_they_were(tiny, data):
    model, tokenizer = load(tiny[2], device="cpu")
    before = {name: (own, own._version) for name, own in model.named_parameters()}
    zero_shot(model, tokenizer, ["boolq"], data, limit=1)
    assert {name: (own, own._version) for name, own in model.named_parameters()} == before
    assert tokenizer.pad_token is None
    assert len(tokenizer) == 256


def command(llm: list[str], *more: str) -> list[str]:
    """Return the flags of a run of the command line, without another evaluation."""
    found = llm[1 : llm.index("--evaluate")]
    return [*found, "--samples", "6", "--length", "16", "--device", "cpu", *more]


def tasked(llm: list[str], data: Path, output: Path, *more: str) -> list[str]:
    tasks = ["--tasks", ",".join(ITEMS), "--task-data", str(data), "--task-limit", str(LIMIT)]
    return command(llm, *tasks, "--method", "gblm", "--output", str(output), *more)


def evaluation(output: Path) -> dict[str, dict[str, Any]]:
    return json.loads((output / "report.json").read_text())["evaluation"]


def test_accuracies_join_the_report_and_the_table(tiny, data, tmp_path, capsys):
    evaluate = tiny[tiny.index("--evaluate") :][:2]
    assert main(tasked(tiny, data, tmp_path / "pruned", *evaluate, "--sparsity", "0.9")) == 0
    found = evaluation(tmp_path / "pruned")
    assert list(found) == [evaluate[1], *ITEMS, "arc_easy acc_norm", "mean of tasks"]
    for when, folder in (("dense", tiny[2]), ("pruned", str(tmp_path / "pruned"))):
        own = zero_shot(*load(folder, device="cpu"), list(ITEMS), data, LIMIT)
        for name, values in entries(own).items():
            metric = found[name]["metric"]
            assert values[metric] == found[name][when]
            assert values.get(f"{metric}_stderr") == found[name].get(f"{when}_stderr")
    lines = capsys.readouterr().out.splitlines()
    head, dense, pruned = (
        next(line for line in lines if key in line) for key in ("method", "dense", "gblm(")
    )
    assert all(name in head for name in ITEMS)
    assert "acc_norm" not in head
    for line, when in ((dense, "dense"), (pruned, "pruned")):
        shown = [f"{100 * found[name][when]:.1f} %" for name in [*ITEMS, "mean of tasks"]]
        assert [cell.strip() for cell in line.split("│") if "%" in cell] == shown


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_model_is_evaluated_where_its_weights_live(
    kind, request, data, tiny, tmp_path
):
    whole, away = tmp_path / "none", tmp_path / kind
    assert main(tasked(tiny, data, whole, "--offload", "none", "--sparsity", "0.9")) == 0
    assert main(tasked(tiny, data, away, "--offload", kind, "--sparsity", "0.9")) == 0
    assert evaluation(whole) == evaluation(away)


def test_the_other_processes_take_what_process_0_has_found(tiny, data, monkeypatch):
    from gblm.llm import zero_shot as module

    found = {"boolq": {"acc": 0.5}}
    monkeypatch.setattr(module, "rank", lambda: 1)
    monkeypatch.setattr(module, "gathered", lambda own: [found, own])
    monkeypatch.setattr("lm_eval.evaluator.evaluate", None)  # nothing is evaluated here
    assert zero_shot(*load(tiny[2], device="cpu"), ["boolq"], data) == found


@pytest.mark.slow
def test_the_tasks_are_those_of_the_index_of_the_harness():
    from lm_eval.tasks import TaskManager

    own = TaskManager()
    known = {name: own.task_index[name].yaml_path for name in own.all_subtasks}
    assert _known() == known


@pytest.mark.slow
def test_process_0_evaluates_for_all(tiny, data, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = tasked(tiny, data, tmp_path / "many", "--method", "magnitude")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([*launch, "-m", "gblm.llm", *flags], check=True, env=environment)
    assert main(tasked(tiny, data, tmp_path / "one", "--method", "magnitude")) == 0
    assert evaluation(tmp_path / "many") == evaluation(tmp_path / "one")


BAD = {
    "unknown": (["--tasks", "bolq"], "unknown task 'bolq'; did you mean 'boolq'?"),
    "group": (["--tasks", "mmlu"], "groups of tasks are not taken"),
    "limit": (["--tasks", "boolq", "--task-limit", "0"], "limit of 1 or more"),
    "no tasks": (["--task-limit", "3"], "go with --tasks"),
    "missing": (["--tasks", "paper"], "has neither rte.jsonl nor rte_*.jsonl"),
    "judged otherwise": (["--tasks", "gsm8k"], "judged by exact_match, not by acc"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tasks_end_before_work(case, tiny, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gblm.llm.models.load_offloaded", None)  # nothing is loaded
    flags, message = BAD[case]
    rows = [{"question": "1 and 1?", "answer": "#### 2"}]
    folder = write(tmp_path / "data", {"gsm8k": rows, "boolq": ITEMS["boolq"]})
    source = [] if case == "no tasks" else ["--task-data", str(folder)]
    assert main(command(tiny, *flags, *source)) == 2
    assert message in capsys.readouterr().err


def test_a_missing_harness_is_named(monkeypatch, data):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(GblmError, match=r"pip install 'gblm\[eval\]'"):
        open_tasks(["boolq"], data)


def test_a_hub_out_of_reach_is_named(monkeypatch):
    import datasets

    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        GblmError, match=r"task boolq cannot be loaded \(ConnectionError: no route\)"
    ):
        open_tasks(["boolq"])


DAMAGED = {
    "no JSON": ("{'question': 1}", "line 1: no item"),
    "a list": ("[1, 2]", "line 1: no item"),
    "no answer": ('{"question": "a", "passage": "b"}', "line 1: no item of the task boolq"),
    "no passage": ('{"question": "a", "answer": true}', "has not the form of the task boolq"),
    "empty": ("\n \n", "is empty"),
    "other fields": (
        '{"question": "a", "passage": "b", "answer": true}\n{"question": "a", "answer": true}',
        "items have question, passage, answer, label, but one question, answer, label",
    ),
    "other types": (
        '{"question": "a", "passage": "b", "label": 1}\n'
        '{"question": "a", "passage": [], "label": 0}',
        "is no table of items",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_items_are_named(case, tmp_path):
    text, message = DAMAGED[case]
    (tmp_path / "boolq.jsonl").write_text(text)
    with pytest.raises(GblmError, match=message) as error:
        open_tasks(["boolq"], tmp_path)
    assert str(tmp_path / "boolq.jsonl") in str(error.value)


def test_what_the_harness_cannot_run_is_refused(llm, data):
    with pytest.raises(GblmError, match="neither a bos nor an eos token"):
        zero_shot(*load(llm[2], device="cpu"), ["boolq"], data)
    with pytest.raises(GblmError, match="a batch of 0"):
        zero_shot(*load(llm[2], device="cpu"), ["boolq"], data, batch_size=0)


def test_files_are_found_by_the_name_of_their_task(tmp_path):
    with pytest.raises(GblmError, match="no such folder"):
        open_tasks(["boolq"], tmp_path / "none")
    write(tmp_path, {"boolq": ITEMS["boolq"]})
    assert len(open_tasks(["boolq"], tmp_path).tasks["boolq"].eval_docs) == 6
    write(tmp_path, {"boolq": ITEMS["boolq"][:3]}, "_test")
    with pytest.raises(GblmError, match=r"boolq\.jsonl, boolq_test\.jsonl; keep one"):
        open_tasks(["boolq"], tmp_path)
