"""The command `python -m gblm.report`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gblm.llm.__main__ import main as prune
from gblm.report.__main__ import main


@pytest.fixture
def runs(make_report, vision, tmp_path: Path) -> Path:
    """A folder of two runs."""
    for name, report in {"a": make_report(), "b": vision}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        report.write(tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_one_run_gets_its_page(runs: Path, tmp_path: Path, capsys):
    page = tmp_path / "one.html"
    assert main([str(runs / "a"), "--output", str(page)]) == 0
    assert "tiny-llama, pruned to" in page.read_text()
    assert str(page) in capsys.readouterr().out


def test_a_folder_of_runs_is_compared(runs: Path, tmp_path: Path):
    (runs / "a" / "report.html").write_text("its page")
    page = tmp_path / "pages" / "all.html"
    assert main([str(runs), "--output", str(page)]) == 0
    text = page.read_text()
    assert "2 runs of tiny-llama, vit_tiny" in text
    assert text.count("../runs/a/report.html") == 1
    assert "runs/b/report.html" not in text  # there is none


def test_a_run_named_twice_counts_once(runs: Path, tmp_path: Path):
    page = tmp_path / "one.html"
    assert main([str(runs / "a"), str(runs / "a"), "--output", str(page)]) == 0
    assert "pruned to" in page.read_text()


def damaged(runs: Path, **values: object) -> Path:
    path = runs / "a" / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return runs / "a"


@pytest.mark.parametrize(
    "values",
    [
        {"linears": []},
        {"linears": [{"name": "x"}]},
        {"linears": 3},
        {"linears": [{"name": "x", "shape": [1, 1], "sparsity": "a", "relative_error": 0}]},
        {"method": None},
        {"seconds": {"load": "long"}},
        {"evaluation": {"text": {"dense": 1, "pruned": 2}}},
        {"evaluation": {"text": {"metric": "perplexity", "dense": 1}}},
        {"evaluation": {"text": {"metric": ["a"], "dense": 1, "pruned": 2}}},
        {"pictures": {"x": {"rows": 2, "columns": 2, "kept": "AA==", "corner": False}}},
        {"examples": [{"given": "x"}]},
    ],
)
def test_reports_that_are_none(runs: Path, tmp_path: Path, values: dict, capsys):
    page = tmp_path / "page.html"
    assert main([str(damaged(runs, **values)), "--output", str(page)]) == 2
    assert "is no report" in capsys.readouterr().err
    assert not page.exists()


def test_what_is_no_run(runs: Path, tmp_path: Path, capsys):
    page = tmp_path / "page.html"
    for given, said in (
        (tmp_path / "none", "holds no report.json"),
        (tmp_path, "holds no report.json"),
        (runs / "a" / "report.json", "is no report"),
    ):
        assert main([str(given), "--output", str(page)]) == 2
        assert said in capsys.readouterr().err
    (runs / "a" / "report.json").write_text('{"method": "wan')
    assert main([str(runs / "a"), "--output", str(page)]) == 2
    assert "is no report" in capsys.readouterr().err
    (runs / "a" / "report.json").write_text("[1]")
    assert main([str(runs / "a"), "--output", str(page)]) == 2
    assert "is no report" in capsys.readouterr().err


def test_a_page_is_not_replaced_unasked(runs: Path, tmp_path: Path, capsys):
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert main([str(runs / "a"), "--output", str(page)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert main([str(runs / "a"), "--output", str(page), "--overwrite"]) == 0
    assert page.read_text() != "mine"
    assert main([str(runs / "a"), "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_the_module_runs(runs: Path, tmp_path: Path):
    command = [sys.executable, "-m", "gblm.report", str(runs)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").exists()


def test_a_page_that_nothing_can_draw_is_said_before_work(
    tmp_path: Path, monkeypatch, capsys, make_report
):
    make_report().write(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    assert "pip install 'gblm[report]'" in capsys.readouterr().err
    assert prune(["--model", "none", "--report", str(tmp_path / "shown")]) == 2
    assert "pip install 'gblm[report]'" in capsys.readouterr().err
    assert not (tmp_path / "shown").exists()
