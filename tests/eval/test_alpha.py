"""The sweep of alpha: its cases, its rows, and the alpha of equal medians."""

from argparse import Namespace
from pathlib import Path

import alpha
import pytest
import quality

import gblm
from gblm import GblmError
from gblm.llm import load, windows


@pytest.fixture
def case(llm: list[str], tmp_path: Path) -> Namespace:
    return quality.parser().parse_args([*llm, "--store", str(tmp_path / "quality.json")])


@pytest.mark.parametrize("name", alpha.CASES)
def test_a_case_is_a_call_of_quality(name, monkeypatch):
    monkeypatch.setenv("GBLM_ASSETS", "/assets")
    monkeypatch.setenv("SMOLLM2", "/assets/smol")
    args = quality.parser().parse_args(alpha.case(name))
    assert args.calibration.startswith("/assets/")
    monkeypatch.delenv("GBLM_ASSETS")
    with pytest.raises(GblmError, match="GBLM_ASSETS is not set"):
        alpha.case(name)


def test_a_sweep_shows_every_alpha_and_its_limits(case, tmp_path):
    text = alpha.sweep(case, "0,100,1e12,auto", "0.5,2:4", tmp_path / "alpha.svg")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:]] == [
        "0",
        "100",
        "1000000000000",
        "auto",
        "gradient alone",
    ]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert rows["1000000000000"] == rows["gradient alone"]  # the limit
    case.methods, case.patterns = "wanda", "0.5,2:4"
    runs = quality.wanted(case)
    values = quality.cells(case, runs, quality.measure(case, runs), "perplexity")
    assert rows["0"] == [f"{value:.2f}" for (value,) in values.values()]
    assert rows["0"] != rows["100"] != rows["gradient alone"]
    assert (tmp_path / "alpha.svg").exists()


def test_a_second_sweep_measures_nothing(case, tmp_path, monkeypatch):
    first = alpha.sweep(case, "100", "0.5", tmp_path / "alpha.svg")
    monkeypatch.setattr(quality, "OPEN", {})
    assert alpha.sweep(case, "100", "0.5", tmp_path / "alpha.svg") == first


def test_equal_medians_are_those_of_the_dense_model(case, tmp_path):
    found = alpha.equal_medians(case)
    model, tokenizer = load(case.model, device="cpu")
    batch = windows(case.calibration, model.config, tokenizer, samples=6, length=16)
    gradients = gblm.gradient_sums(model, batch, {"grad_abs"})
    assert len(found) == len(gradients) == 14
    last = model.model.layers[-1].mlp.down_proj
    seen = []
    last.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**batch)  # the last linear sees the dense model, for nothing before it was pruned
    norm = (seen[0].square().sum(dim=(0, 1)) / 6).sqrt()
    middle = gradients["model.layers.1.mlp.down_proj"]["grad_abs"].median()
    assert found[-1] == pytest.approx((norm.median() / middle).item(), rel=1e-4)
