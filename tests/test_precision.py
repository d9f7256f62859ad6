"""Laws of narrow dtypes: the gradients of a model in float16 are those of its values in float32."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gblm

NEEDS = {"grad_abs", "grad_sq", "grad_position"}
LENGTH = 513  # a mean over 512 targets, whose gradients are smaller than float16 can tell


def llama(spread: float, head: float) -> nn.Module:
    """Return a LLaMA in float16. spread: of its weights. head: a factor of those of its head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=spread,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(head)
    return model.half()


@pytest.mark.parametrize("backward", ["blocks", "model"])
@pytest.mark.parametrize(
    ("spread", "head"), [(0.02, 1), (0.05, 300)], ids=["small gradients", "large gradients"]
)
def test_gradients_in_float16_are_those_in_float32(spread, head, backward):
    ids = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    sums = [
        gblm.gradient_sums(model, {"input_ids": ids}, NEEDS, backward=backward)
        for model in (llama(spread, head), llama(spread, head).float())
    ]
    for name, expected in sums[1].items():
        assert sums[0][name].samples == expected.samples
        for key, value in expected.sums.items():
            apart = (sums[0][name][key] - value).abs().sum() / value.abs().sum()
            assert apart < 0.005, f"{name}: {key} is {apart:.1%} off"


class Between(nn.Module):
    """Blocks that end with a product, and a product of the model's own between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))
        self.between, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.between(self.blocks[0](x)))


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "best:distill=1"])
def test_code_between_blocks_goes_on_in_the_dtype_of_the_model(name, monkeypatch):
    monkeypatch.setattr("gblm.walk.walk.find_compute_dtype", lambda *_: torch.bfloat16)
    sides = gblm.Adapter(
        blocks=lambda model: {f"blocks.{i}": block for i, block in enumerate(model.blocks)},
        trunk=lambda model, batch: model(batch["x"]),
        loss=lambda model, hidden, batch: model.head(hidden).square().mean(dim=1),
        logits=lambda model, hidden, batch: model.head(hidden),
    )
    report = gblm.prune(Between(), {"x": torch.randn(32, 16)}, name, "0.5", adapter=sides)
    assert report.sparsity == 0.5
