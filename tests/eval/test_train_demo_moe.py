"""The small Qwen3-MoE: its training runs, and its folder loads."""

import sys
from pathlib import Path

import pytest
import torch
import train_demo_moe
from transformers import AutoModelForCausalLM, AutoTokenizer


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Run the script for two steps on few tokens; return the saved weights."""
    call = f"train_demo_moe.py --output {folder} --steps 2 --threads 1"
    monkeypatch.setattr(sys, "argv", call.split())
    monkeypatch.setattr(train_demo_moe, "encode", lambda tokenizer, split: torch.arange(4096) % 99)
    monkeypatch.setattr("train_demo_llm.BATCH", 2)
    train_demo_moe.main()
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_seed_gives_a_model_that_loads(tmp_path, monkeypatch, capsys):
    first = trained(tmp_path / "first", monkeypatch)
    assert "held-out perplexity" in capsys.readouterr().out
    again = trained(tmp_path / "again", monkeypatch)
    assert all(torch.equal(first[name], again[name]) for name in first)
    experts = first["model.layers.0.mlp.experts.down_proj"]
    assert experts.shape == (train_demo_moe.EXPERTS, 160, 80)
    assert experts.dtype == torch.float16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert tokenizer.decode(tokenizer("import sys").input_ids) == "import sys"


def test_the_shares_of_the_experts_of_a_block_are_one_together():
    torch.manual_seed(0)
    model = train_demo_moe.small_qwen3_moe()
    shares = train_demo_moe.expert_shares(model, torch.arange(512).view(2, 256))
    assert shares.shape == (4, train_demo_moe.EXPERTS)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))
