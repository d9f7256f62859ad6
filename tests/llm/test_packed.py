"""Packed checkpoints in transformers: loaded as they were, and saved as ordinary ones."""

import filecmp
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import gblm.llm
from gblm import GblmError
from gblm.llm.__main__ import main


@pytest.fixture
def packed(llm: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A packed result of the command, with the ordinary one beside it."""
    given = ["--model", llm[2], "--calibration", llm[4], "--samples", "6", "--length", "16"]
    for form in ("safetensors", "packed"):
        more = ["--method", "wanda", "--format", form, "--output", str(tmp_path / form)]
        assert main([*given, *more]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "zstd alone makes" in said
    assert "takes the memory and the time of the dense model" in said
    return tmp_path / "packed"


def test_a_result_is_loaded_and_saved_as_if_it_were_ordinary(packed: Path, tmp_path: Path):
    ordinary = tmp_path / "safetensors"
    assert [file.name for file in packed.glob("*.safetensors")] == ["model.packed.safetensors"]
    report = gblm.Report.read(packed)
    scope: dict = {}
    exec(report.loading, scope)  # as it tells the reader
    dense = AutoModelForCausalLM.from_pretrained(ordinary)
    weights = scope["model"].state_dict()
    assert weights.keys() == dense.state_dict().keys()
    assert all(torch.equal(weights[name], own) for name, own in dense.state_dict().items())
    for model, name in ((scope["model"], "one"), (dense, "two")):
        model.save_pretrained(tmp_path / name)
    files = ["config.json", "model.safetensors"]
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", files, shallow=False)[0] == files
    gblm.unpack(packed, tmp_path / "again")
    assert filecmp.cmp(tmp_path / "again" / files[1], ordinary / files[1], shallow=False)
    half = AutoModelForCausalLM.from_pretrained(packed, variant="packed", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_damage_and_the_wrong_name_are_loud(packed: Path):
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(GblmError, match=r"is packed; python -m gblm\.packed unpack"):
        gblm.llm.load(str(packed))
    file = packed / "model.packed.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-9] ^= 4
    file.write_bytes(changed)
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(packed, variant="packed")


def test_experts_are_unpacked_before_they_are_merged(tmp_path: Path):
    sizes = {"hidden_size": 16, "moe_intermediate_size": 16, "head_dim": 8, "vocab_size": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3MoeConfig(**sizes, **layers, num_experts=4, num_experts_per_tok=2)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "experts")
    gblm.pack(tmp_path / "experts", tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", variant="packed")
    assert all(torch.equal(again.state_dict()[k], own) for k, own in model.state_dict().items())
