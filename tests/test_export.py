"""The result for other runtimes: ONNX gives the same outputs, Core ML stores zeros as a bitmask."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gblm
from gblm import GblmError
from gblm.llm.__main__ import main as prune_llm
from gblm.machine import export
from gblm.vit.__main__ import main as prune_vit

MAINS = {"llm": prune_llm, "vit": prune_vit}


def command(arguments: list[str], *more: str) -> int:
    """Run the command of a side with its model and calibration samples."""
    side, *given = arguments
    names = ("--model", "--calibration")
    model = [word for name in names for word in given[given.index(name) :][:2]]
    return MAINS[side]([*model, "--samples", "4", "--method", "magnitude", *more])


@pytest.mark.slow
@pytest.mark.parametrize("side", ["llm", "vit"])
def test_a_result_is_exported_to_onnx(side: str, request, tmp_path: Path):
    output = tmp_path / "pruned"
    arguments = request.getfixturevalue(side)
    assert command(arguments, "--export", "onnx", "--output", str(output)) == 0
    assert (output / "model.onnx").stat().st_size > 10_000
    notes = json.loads((output / "report.json").read_text())["notes"]
    assert any("outputs in onnxruntime within" in note for note in notes)


@pytest.mark.slow
def test_other_outputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "NEAR", -1)
    with pytest.raises(GblmError, match="gives other outputs than the model"):
        export.export("onnx", nn.Linear(4, 4), torch.randn(1, 4, 4, 4), tmp_path)


@pytest.mark.slow
def test_zeros_make_a_core_ml_model_smaller(tmp_path: Path):
    pytest.importorskip("coremltools")  # an extra that the tests do not install
    linear = nn.Linear(256, 256)
    sizes = []
    for name in ("dense", "pruned"):
        (tmp_path / name).mkdir()
        export.export("coreml", nn.Sequential(linear), torch.randn(1, 3, 8, 256), tmp_path / name)
        weights = (tmp_path / name).rglob("weight.bin")
        sizes.append(sum(file.stat().st_size for file in weights))
        weight = linear.weight.data
        weight[~gblm.parse("0.5", "row").keep(weight.abs())] = 0
    assert sizes[1] < 0.6 * sizes[0]  # of 16 bits, 8 and one for the place


def test_what_is_missing_is_named(vit: list[str], tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert command(vit, "--export", "coreml", "--output", str(tmp_path / "pruned")) == 2
    assert "pip install 'gblm[coreml]'" in capsys.readouterr().err
    assert command(vit, "--export", "onnx") == 2
    assert "--export onnx is a form of the result; name a folder" in capsys.readouterr().err


def test_core_ml_is_for_classifiers(llm: list[str], tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: "there")
    assert command(llm, "--export", "coreml", "--output", str(tmp_path / "pruned")) == 2
    assert "--export coreml is for image classifiers" in capsys.readouterr().err
    assert not (tmp_path / "pruned").exists()
