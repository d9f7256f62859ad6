"""Methods that look at weights alone need no data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gblm.llm.__main__ as llm_side
import gblm.vit.__main__ as vit_side


@pytest.mark.parametrize(("side", "main"), [("llm", llm_side.main), ("vit", vit_side.main)])
def test_magnitude_needs_no_data(
    side: str, main: Callable[..., int], tmp_path: Path, capsys, request: pytest.FixtureRequest
):
    given: list[str] = request.getfixturevalue(side)
    flag: Any = given.index
    model, images = given[flag("--model") + 1], given[flag("--calibration") + 1]
    blind = ["--model", model, "--method", "magnitude", "--device", "cpu"]
    results = {}
    for name, more in {
        "blind": [],
        "with data": ["--calibration", images, "--samples", "4"],
    }.items():
        if more and side == "llm":
            more += ["--length", "16"]
        assert main([*blind, *more, "--output", str(tmp_path / name)]) == 0
        results[name] = load_file(tmp_path / name / "model.safetensors")
    assert results["blind"].keys() == results["with data"].keys()
    assert all(torch.equal(own, results["with data"][key]) for key, own in results["blind"].items())
    report = json.loads((tmp_path / "blind" / "report.json").read_text())
    assert report["calibration"] == "no data"
    capsys.readouterr()
    again = [
        "--config",
        str(tmp_path / "blind" / "config.toml"),
        "--output",
        str(tmp_path / "again"),
    ]
    assert main(again) == 0
    assert main([*blind, "--method", "wanda", "--calibration", "none"]) == 2
    assert "nothing to calibrate on" in capsys.readouterr().err
