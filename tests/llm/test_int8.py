"""A result that is quantised too: weights of 8 bits, whose zeros stay zeros."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gblm.llm import int8
from gblm.llm.__main__ import main


def command(llm: list[str], output: Path) -> int:
    given = ["--model", llm[2], "--calibration", llm[4], "--samples", "4", "--method", "magnitude"]
    return main([*given, "--also", "int8", "--output", str(output)])


def test_what_is_missing_is_named(llm: list[str], tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    assert command(llm, tmp_path / "pruned") == 2
    assert "pip install 'gblm[int8]'" in capsys.readouterr().err
    assert not (tmp_path / "pruned").exists()


@pytest.mark.slow
def test_a_result_is_quantised_too(llm: list[str], tmp_path: Path, capsys):
    pytest.importorskip("torchao")  # an extra: with it every import of transformers takes seconds
    assert command(llm, tmp_path / "pruned") == 0
    assert "in int8; on a CPU" in " ".join(capsys.readouterr().out.split())
    dense, small = (
        AutoModelForCausalLM.from_pretrained(tmp_path / place)
        for place in ("pruned", "pruned/int8")
    )
    ids = torch.arange(16)[None]
    with torch.no_grad():
        wanted, got = dense(ids).logits, small(ids).logits
    assert 0 < (got - wanted).norm() < 0.02 * wanted.norm()
    name = "model.layers.0.mlp.up_proj.weight"
    zeros = dense.get_parameter(name) == 0
    assert not small.get_parameter(name).dequantize()[zeros].any()
