"""The script of the zero-shot table: what it measures, shows and writes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import zero_shot
from transformers import AutoTokenizer

from gblm import GblmError
from gblm.llm import load
from gblm.llm.zero_shot import zero_shot as measured


@pytest.fixture(scope="module")
def model(llm: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaMA, with a tokenizer that can begin a text."""
    folder = tmp_path_factory.mktemp("zero-shot") / "tiny"
    shutil.copytree(llm[2], folder)
    AutoTokenizer.from_pretrained(folder, eos_token="Ā").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with items of two tasks."""
    folder = tmp_path_factory.mktemp("data")
    names = [str(i) for i in range(8)]
    choices = {"text": names[:4], "label": list("ABCD")}
    rows = {
        "boolq": [{"question": f"is it {i}", "passage": i, "answer": i > "3"} for i in names],
        "openbookqa": [
            {"id": i, "question_stem": f"It is {i}", "choices": choices, "answerKey": "B"}
            for i in names
        ],
    }
    for task, items in rows.items():
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval/zero_shot.py", *map(str, flags), "--device", "cpu"])
    zero_shot.main()


def test_the_table_holds_what_was_measured(model, data, tmp_path, monkeypatch, capsys):
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    flags = ["--tasks", "boolq,openbookqa", "--task-data", data, "--limit", 6]
    for _ in range(2):  # the second takes the place of the first
        run(monkeypatch, model, *flags, "--write", page, "--json", figures)
    found = measured(*load(str(model), device="cpu"), ["boolq", "openbookqa"], data, 6)
    mean = (found["boolq"]["acc"] + found["openbookqa"]["acc"]) / 2
    stored = json.loads(figures.read_text())
    assert stored["tasks"] == found
    assert (stored["limit"], stored["mean"]) == (6, pytest.approx(mean))
    assert "lm_eval" in stored["versions"]
    text = page.read_text()
    assert text.split("-->\n")[1].split("<!--")[0].strip() in capsys.readouterr().out
    lines = [line.strip("|\n").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[0] == ["task", "acc in %", "acc_norm in %"]
    own = found["openbookqa"]
    assert cells[2:] == [
        [
            "boolq",
            f"{100 * found['boolq']['acc']:.1f} ± {100 * found['boolq']['acc_stderr']:.1f}",
            "",
        ],
        [
            "openbookqa",
            f"{100 * own['acc']:.1f} ± {100 * own['acc_stderr']:.1f}",
            f"{100 * own['acc_norm']:.1f} ± {100 * own['acc_norm_stderr']:.1f}",
        ],
        ["mean", f"{100 * mean:.1f}", ""],
    ]
    assert "the first 6 items" in text
    assert "python eval/zero_shot.py" in text


def test_bad_tasks_end_before_the_model_is_loaded(data, monkeypatch):
    with pytest.raises(GblmError, match="has neither rte"):
        run(monkeypatch, "no-such-model", "--tasks", "rte", "--task-data", data)


def test_a_single_item_has_no_standard_error(model, data, monkeypatch, capsys):
    run(monkeypatch, model, "--tasks", "boolq", "--task-data", data, "--limit", 1)
    assert "±" not in capsys.readouterr().out
