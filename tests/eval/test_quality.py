"""The script of the quality tables: what it measures, what it keeps, what it writes."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import quality
import tables
import torch
from matplotlib.figure import Figure

import gblm
from gblm import GblmError
from gblm.llm import evaluation, load, perplexity, windows


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "quality.json"


def asked(arguments: list[str], store: Path, methods: str, patterns: str, *more: str):
    """Return the flags of a call and its runs."""
    flags = ["--store", str(store), "--methods", methods, "--patterns", patterns, *more]
    args = quality.parser().parse_args([*arguments, *flags])
    return args, quality.wanted(args)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that were pruned by, in their order."""
    done, own = [], quality.pruned

    def pruned(bench, draw, method, pattern):
        done.append(method.name)
        return own(bench, draw, method, pattern)

    monkeypatch.setattr(quality, "pruned", pruned)
    return done


@pytest.mark.parametrize(
    ("text", "side", "full", "name"),
    [
        ("wanda", "llm", "wanda", "wanda"),
        ("gblm", "llm", "gblm:alpha=100", "gblm(alpha=100, norm=l1)"),
        ("gblm", "vit", "gblm:alpha=auto", "gblm(alpha=auto, norm=l1)"),
        ("gblm:norm=l2:alpha=5e1", "vit", "gblm:alpha=50:norm=l2", "gblm(alpha=50, norm=l2)"),
        ("sparsegpt:damping=0.1", "llm", "sparsegpt:damping=0.1", "sparsegpt"),
    ],
)
def test_a_method_is_named_with_its_options(text, side, full, name):
    found, method = quality.named(text, side)
    assert (found, method.name) == (full, name)


@pytest.mark.parametrize(
    ("text", "said"),
    [("wandu", "did you mean 'wanda'"), ("wanda:alpha=3", "no option 'alpha'")],
)
def test_an_unknown_method_or_option_is_an_error(text, said):
    with pytest.raises(GblmError, match=said):
        quality.named(text, "llm")


def test_a_run_is_what_the_api_gives(llm, store):
    args, runs = asked(llm, store, "magnitude,gblm", "0.5/row,2:4", "--draws", "2")
    found = quality.measure(args, runs)
    assert len(found) == 1 + 2 * 2 * 2
    model, tokenizer = load(args.model, device="cpu")
    test = evaluation(args.evaluate, tokenizer, 16, 8)
    assert quality.dense(args, found) == {"perplexity": pytest.approx(perplexity(model, test))}
    batch = windows(args.calibration, model.config, tokenizer, samples=6, length=16, seed=1)
    report = gblm.prune(model, batch, gblm.METHODS["gblm"](alpha=100), "2:4")
    (last,) = [v for k, v in found.items() if k[-3:] == ("gblm:alpha=100", "2:4", 1)]
    assert last["metrics"]["perplexity"] == pytest.approx(perplexity(model, test), rel=1e-5)
    assert (last["sparsity"], last["name"]) == (report.sparsity, report.method)
    assert set(last["seconds"]) == {"gradients", "prune"}


def test_a_rotated_model_is_tied_again(llama, batch):
    llama.lm_head.weight = llama.model.embed_tokens.weight
    with torch.no_grad():
        before = llama(**batch).logits
        with quality.unchanged(llama):
            gblm.prune(llama, batch, "best:rotate=1", "0.5")
            assert not torch.equal(llama(**batch).logits, before)
        assert torch.equal(llama(**batch).logits, before)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_images_are_measured_by_the_same_script(vit, store):
    args, runs = asked(vit, store, "wanda,gblm", "0.5/layer")
    found = quality.measure(args, runs)
    assert [sorted(entry["metrics"]) for entry in found.values()] == 3 * [
        ["cross_entropy", "top1", "top5"]
    ]
    values = quality.cells(args, runs, found, "cross_entropy")
    assert set(values) == {("wanda", "0.5/layer"), ("gblm:alpha=auto", "0.5/layer")}


def test_a_second_call_does_what_is_missing(llm, store, count):
    quality.measure(*asked(llm, store, "magnitude,wanda", "0.5/row"))
    quality.measure(*asked(llm, store, "magnitude,sparsegpt", "0.5"))
    # Magnitude without a group is per layer, which the first call did not have.
    assert count == ["magnitude", "wanda", "magnitude", "sparsegpt"]
    quality.measure(*asked(llm, store, "sparsegpt,magnitude,wanda", "0.5"))
    assert len(count) == 4
    quality.measure(*asked(llm, store, "wanda", "0.5", "--again"))
    assert count[4:] == ["wanda"]
    assert len(json.loads(store.read_text())) == 1 + 4


def test_what_is_finished_stays_when_a_run_fails(llm, store, monkeypatch, count):
    args, runs = asked(llm, store, "magnitude,wanda,sparsegpt", "0.5")
    counting = quality.pruned

    def failing(bench, draw, method, pattern):
        if method.name == "sparsegpt":
            raise KeyboardInterrupt
        return counting(bench, draw, method, pattern)

    monkeypatch.setattr(quality, "pruned", failing)
    with pytest.raises(KeyboardInterrupt):
        quality.measure(args, runs)
    assert [entry["method"] for entry in json.loads(store.read_text())] == [
        "dense",
        "magnitude",
        "wanda",
    ]
    assert [path.name for path in store.parent.iterdir()] == ["quality.json"]
    monkeypatch.setattr(quality, "pruned", counting)
    quality.measure(args, runs)
    assert count == ["magnitude", "wanda", "sparsegpt"]


def test_an_entry_takes_the_place_of_one_of_the_same_run(llm, store):
    args, runs = asked(llm, store, "magnitude,wanda", "0.5")
    first, other = ({**quality.key(args, run), "metrics": {}} for run in runs)
    quality.add(store, first, other)
    quality.add(store, again := {**first, "metrics": {"perplexity": 7.0}})
    assert json.loads(store.read_text()) == [again, other]


def test_a_pattern_that_does_not_fit_ends_before_work(llm, store, count):
    with pytest.raises(GblmError, match=r"q_proj \[32, 32\].*not divisible by 5"):
        quality.measure(*asked(llm, store, "wanda", "0.5,2:5"))
    assert count == []


def test_ready_windows_have_one_draw(llm, store):
    with pytest.raises(GblmError, match="the same in every draw"):
        asked([*llm, "--calibration", "ready.npz"], store, "wanda", "0.5", "--draws", "2")


def test_the_command_writes_table_and_figure(llm, store, tmp_path, monkeypatch):
    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n\nBy hand.\n")
    flags = ["--store", str(store), "--methods", "wanda,gblm", "--patterns", "0.5,2:4"]
    flags += ["--draws", "2", "--write", str(page), "--section", "mine"]
    monkeypatch.setenv("GBLM_ASSETS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["eval/quality.py", *llm, *flags])
    for _ in range(2):  # the second call finds all, and changes nothing
        quality.main()
        text = page.read_text()
        assert text.startswith("# Benchmarks\n\nBy hand.\n\n## Quality: mine\n\n<!-- quality:mine")
        assert text.count("<!--") == 2
        rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
        assert [row[1].strip() for row in rows] == ["method", "---", "wanda", "gblm:alpha=100"]
        assert all("±" in cell for row in rows[2:] for cell in row[2:4])
        assert "--write $GBLM_ASSETS/benchmarks.md" in text
        assert "![quality-mine](quality-mine.svg)" in text
    assert "<svg" in (tmp_path / "quality-mine.svg").read_text()


# --- the tables -----------------------------------------------------------------------------------


def test_a_cell_is_mean_and_standard_deviation():
    assert tables.cell([3.0]) == "3.00"
    assert tables.cell([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert tables.cell([123456.0]) == "1.235e+05"


def test_what_is_not_there_is_left_empty():
    cells = {("a", "x"): [1.0], ("b", "y"): [2.0]}
    assert tables.table("t", cells).splitlines()[2:] == ["| a | 1.00 |  |", "| b |  | 2.00 |"]


@pytest.mark.parametrize(("value", "drawn"), [(5.7, False), (12, True), (50, True), (70, False)])
def test_a_level_far_off_is_left_out(tmp_path, value, drawn):
    def draw(axes):
        axes.plot([1, 2], [20, 30], label="line")
        tables.level(axes, "dense", value)
        tables.logarithmic(axes)
        assert len(axes.get_lines()) == 1 + drawn

    assert tables.figure(tmp_path / "a.svg", draw)


def test_a_section_is_replaced_and_the_rest_stays(tmp_path):
    page = tmp_path / "page.md"
    for text in ("old\n", "new\n"):
        tables.write(page, "a", "## A", text)
        tables.write(page, "b", "## B", "other\n")
    page.write_text(page.read_text() + "By hand.\n")
    tables.write(page, "a", "## A", "newest\n")
    assert page.read_text() == (
        "## A\n\n<!-- a -->\nnewest\n<!-- /a -->\n"
        "\n## B\n\n<!-- b -->\nother\n<!-- /b -->\nBy hand.\n"
    )
    assert list(tmp_path.iterdir()) == [page]


def test_a_missing_matplotlib_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert tables.figure(tmp_path / "a.svg", lambda axes: None) == ""
    assert "pip install 'gblm[eval]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_same_values_give_the_same_figure(tmp_path):
    def draw(axes):
        axes.plot(["a", "b"], [1, 2], label="line")

    tables.figure(path := tmp_path / "a.svg", draw)
    first = path.read_text()
    tables.figure(path, draw)
    assert path.read_text() == first


@pytest.mark.parametrize("columns", [["0.5", "0.6", "2:4", "4:8"], ["0.5/row", "0.5/layer", "2:4"]])
def test_a_line_joins_rising_sparsities_alone(columns):
    rows = ["wanda", "best", "best:focus=0", "mine"]
    values = {(row, column): [float(i)] for row in rows for i, column in enumerate(columns, 1)}
    args = argparse.Namespace(side="llm")
    axes = Figure().subplots()
    quality.draw_patterns(args, "perplexity", values, 1.0)(axes)
    joined = [line for line in axes.get_lines() if line.get_linestyle() == "-"]
    assert {tuple(line.get_xdata()) for line in joined} == {(0, 1) if "0.6" in columns else (), ()}
    alone = [line for line in axes.get_lines() if line.get_linestyle() == "None"]
    assert {tuple(line.get_xdata()) for line in alone} == {
        (2, 3) if "0.6" in columns else (0, 1, 2)
    }
    labels = [text for text in axes.get_legend_handles_labels()[1] if text != quality.DENSE]
    assert labels == ["wanda", "best"]  # few, and the same colour and marker everywhere
    assert len({line.get_marker() for line in alone}) == 2
