"""The paper's figures: what is drawn, and the number that says whether a mask has structure."""

import json
import sys
from pathlib import Path

import figures
import pytest
import quality
import torch
from scipy.stats import hypergeom

import gblm
from gblm import GblmError
from gblm.base import Statistics
from gblm.maths import patterns, scores

SMALL = ["--sparsities", "0.3,0.6", "--alphas", "0,100", "--counts", "2,4", "--draws", "2"]


def call(monkeypatch, arguments: list[str], page: Path, *more: str) -> str:
    """Run the script and return the page it wrote."""
    places = ["--store", str(page.with_name("figures.json")), "--write", str(page)]
    monkeypatch.setattr(sys, "argv", ["eval/figures.py", *arguments, *places, *SMALL, *more])
    figures.main()
    return page.read_text()


def section(page: str, name: str) -> str:
    return page.split(f"<!-- figures:tiny:{name} -->")[1].split("<!-- /")[0]


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of the first table, by row."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split("\n\n    python")[0].splitlines()
        if line.startswith("|")
    ]
    return {line[0]: line[1:] for line in lines if line[0] != "---"}


# --- structure ------------------------------------------------------------------------------------


def test_random_masks_have_the_variance_of_the_hypergeometric_distribution():
    torch.manual_seed(0)
    found = []
    for _ in range(200):
        keep = torch.zeros(24 * 40, dtype=torch.bool)
        keep[torch.randperm(24 * 40)[: 24 * 12]] = True
        found.append(figures.structure(keep.view(24, 40)))
    columns, rows = torch.tensor(found).mean(dim=0).tolist()
    assert columns == pytest.approx(1, abs=0.05)
    assert rows == pytest.approx(1, abs=0.08)


def test_a_ratio_is_the_variance_over_that_of_the_library():
    keep = torch.rand(6, 10, generator=torch.Generator().manual_seed(1)) < 0.4
    kept = int(keep.sum())
    expected = tuple(
        counts.double().var(correction=0).item() / hypergeom(60, kept, size).var()
        for counts, size in ((keep.sum(0), 6), (keep.sum(1), 10))
    )
    assert figures.structure(keep) == pytest.approx(expected)


def test_lines_that_are_empty_or_alike_show():
    empty = torch.zeros(8, 16, dtype=torch.bool)
    empty[:, ::2] = True
    columns, rows = figures.structure(empty)
    assert (columns, rows) == (pytest.approx(8 * 127 / 120), 0)  # every row keeps 8
    assert figures.structure(empty.T) == (rows, columns)
    whole = figures.structure(torch.ones(4, 4, dtype=torch.bool))
    assert all(value != value for value in whole)  # NaN: nothing is left out


# --- masks ----------------------------------------------------------------------------------------


def test_masks_are_those_of_the_scores_of_the_dense_model(llm):
    args = figures.parser().parse_args([*llm, "--mask-pattern", "0.5/layer"])
    found, linear, chosen = figures.collect(args)
    assert linear == "model.layers.1.self_attn.q_proj"
    assert list(chosen) == ["magnitude", "wanda", "gradient", "gblm:alpha=100"]
    assert all(len(ratios) == 14 for ratios in found.values())
    model, tokenizer = gblm.llm.load(llm[2], device="cpu")
    batch = gblm.llm.windows(llm[4], model.config, tokenizer, samples=6, length=16)
    gradients = gblm.gradient_sums(model, batch, {"grad_abs"})[linear]
    weight = model.get_parameter(f"{linear}.weight").detach()
    keep = patterns.unstructured(0.5, "layer").keep
    inputs = []
    module = model.get_submodule(linear)
    module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    model(**batch)
    sums = {"input_sq": inputs[0].square().sum(dim=(0, 1)), "grad_abs": gradients["grad_abs"]}
    statistics = Statistics(sums, 6, 6 * 16)
    for row, score in (
        ("magnitude", scores.magnitude),
        ("wanda", scores.wanda),
        ("gradient", scores.gradient),
        ("gblm:alpha=100", scores.gblm),
    ):
        expected = keep(score(weight, statistics))
        assert (chosen[row] == expected).float().mean() > 0.998  # but for ties within rounding
        assert found[row][linear] == figures.structure(chosen[row])


def test_an_unknown_linear_or_figure_is_an_error(llm, monkeypatch, tmp_path):
    args = figures.parser().parse_args([*llm, "--linear", "model.layers.1.q_proj"])
    with pytest.raises(GblmError, match=r"unknown linear.*self_attn\.q_proj"):
        figures.collect(args)
    with pytest.raises(GblmError, match="unknown figure 'mask'; did you mean 'masks'"):
        call(monkeypatch, llm, tmp_path / "figures.md", "--figures", "mask")


def test_masks_of_images_are_drawn_once(vit, tmp_path, monkeypatch):
    page = call(monkeypatch, vit, tmp_path / "figures.md", "--figures", "masks")
    found = rows(section(page, "masks"))
    linear = "blocks.1.attn.qkv"
    assert found["method"][:2] == [f"columns, {linear}", "columns, median of all"]
    assert list(found)[1:] == ["magnitude", "wanda", "gradient", "gblm:alpha=auto"]
    drawing = (tmp_path / "figures-masks-tiny.svg").read_text()
    assert drawing.count("data:image/png") == 4
    (entry,) = json.loads((tmp_path / "figures.json").read_text())
    assert entry["linear"] == linear
    monkeypatch.setattr(quality, "OPEN", {})
    assert call(monkeypatch, vit, tmp_path / "figures.md", "--figures", "masks") == page


# --- lines ----------------------------------------------------------------------------------------


def test_every_figure_has_its_numbers_and_a_second_call_measures_nothing(
    llm, tmp_path, monkeypatch
):
    more = ["--methods", "magnitude,wanda"]
    page = call(monkeypatch, llm, tmp_path / "figures.md", *more)
    found = rows(section(page, "sparsity"))
    assert found["method"] == ["0.3", "0.6"]
    args = quality.parser().parse_args([*llm, "--store", str(tmp_path / "other.json")])
    args.methods, args.patterns = "magnitude,wanda", "0.3,0.6"
    values, level = figures.measured(args)
    for row in ("magnitude", "wanda"):
        assert found[row] == [f"{values[row, column][0]:.2f}" for column in ("0.3", "0.6")]
    assert f"(dense: {level:.2f})" in section(page, "sparsity")
    assert list(rows(section(page, "alpha"))) == ["alpha", "0", "100", "gradient alone"]
    found = rows(section(page, "samples"))
    assert list(found) == ["method", "wanda"]  # magnitude does not look at samples
    assert found["method"] == ["2", "4"]
    assert all("±" in cell for cell in found["wanda"])
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {f"figures-{name}-tiny.svg" for name in figures.FIGURES}
    monkeypatch.setattr(quality, "OPEN", {})
    assert call(monkeypatch, llm, tmp_path / "figures.md", *more) == page


def test_samples_take_one_pattern_and_methods_that_look_at_them(llm, tmp_path, monkeypatch):
    for more in (["--patterns", "0.5,2:4"], ["--methods", "magnitude"]):
        with pytest.raises(GblmError, match="one pattern"):
            call(monkeypatch, llm, tmp_path / "figures.md", "--figures", "samples", *more)
