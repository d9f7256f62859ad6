"""Packed image classifiers, of timm and of transformers."""

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import gblm
from gblm import vit as vision
from gblm.vit.__main__ import main


def test_a_packed_result_is_loaded(vit: list[str], tmp_path: Path, capsys):
    given = ["--model", vit[2], "--calibration", vit[4], "--samples", "8", "--device", "cpu"]
    more = ["--method", "magnitude", "--format", "packed", "--output", str(tmp_path / "small")]
    assert main([*given, *more]) == 0
    scope: dict = {}
    exec(gblm.Report.read(tmp_path / "small").loading, scope)
    gblm.unpack(tmp_path / "small", tmp_path / "again")
    ordinary = vision.load(str(tmp_path / "again")).state_dict()
    assert all(torch.equal(own, ordinary[k]) for k, own in scope["model"].state_dict().items())
    assert main(["--model", str(tmp_path / "small"), *given[2:]]) == 2
    assert "is packed; python -m gblm.packed unpack" in capsys.readouterr().err


def test_one_of_transformers_is_loaded(tmp_path: Path):
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16}
    config = ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    gblm.pack(tmp_path / "model", tmp_path / "small")
    again = vision.load(str(tmp_path / "small")).state_dict()
    assert all(torch.equal(own, again[name]) for name, own in model.state_dict().items())


def test_packed_is_a_form_of_an_output(vit: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["--model", vit[2], "--calibration", vit[4], "--format", "packed"]) == 2
    assert "name a folder by --output" in capsys.readouterr().err
