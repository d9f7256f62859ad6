"""Distillation of what a pruned model keeps towards the dense model's logits."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import gblm
from gblm import methods
from gblm.llm.adapters import adapter
from gblm.methods import distill, refine
from gblm.methods.distill import Distill
from gblm.walk.divergence import mean_divergence

DISTILLED = replace(methods.make("wanda"), steps=(*methods.make("wanda").steps, Distill(4.0)))


def divergence(dense: torch.Tensor, own: torch.Tensor) -> float:
    """KL(dense ‖ own) of logits, the mean over positions."""
    logs = dense.double().log_softmax(-1), own.double().log_softmax(-1)
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()


def test_a_model_of_language_comes_nearer_to_the_dense_one_and_keeps_its_zeros(make_llama, batch):
    dense, pruned, distilled = (make_llama() for _ in range(3))
    gblm.prune(pruned, batch, methods.make("wanda"), "0.5")
    gblm.prune(distilled, batch, DISTILLED, "0.5")
    with torch.no_grad():
        logits = [model(**batch).logits for model in (dense, pruned, distilled)]
    assert divergence(logits[0], logits[2]) < 0.95 * divergence(logits[0], logits[1])
    blocks = pruned.model.layers.state_dict(), distilled.model.layers.state_dict()
    for name, value in blocks[0].items():
        assert torch.equal(value == 0, blocks[1][name] == 0), name
    for name, value in distilled.state_dict().items():
        if not name.startswith("model.layers."):
            assert torch.equal(value, dense.state_dict()[name]), "the head and the stem stay"
    assert not any(p.grad is not None for p in distilled.parameters())


def test_a_model_of_images_comes_nearer_to_the_dense_one():
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    pruned, distilled = (_copy(dense) for _ in range(2))
    images = {"images": torch.randn(24, 3, 32, 32), "labels": torch.zeros(24, dtype=torch.long)}
    gblm.prune(pruned, images, methods.make("wanda"), "0.7")
    gblm.prune(distilled, images, DISTILLED, "0.7")
    with torch.no_grad():
        logits = [model(images["images"]) for model in (dense, pruned, distilled)]
    assert divergence(logits[0], logits[2]) < 0.95 * divergence(logits[0], logits[1])


def _copy(model: nn.Module) -> nn.Module:
    copy = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def test_a_distillation_that_does_not_help_is_taken_back(make_llama, batch, monkeypatch):
    monkeypatch.setattr(distill, "RATE", 1e6)
    monkeypatch.setattr(refine, "MOST", 1e6)
    pruned, distilled = make_llama(), make_llama()
    gblm.prune(pruned, batch, methods.make("wanda"), "0.5")
    gblm.prune(distilled, batch, DISTILLED, "0.5")
    for name, value in pruned.state_dict().items():
        assert torch.equal(value, distilled.state_dict()[name]), name


def test_its_loss_is_the_mean_divergence_of_the_samples(make_llama, batch):
    seen: list[float] = []

    class Watched(Distill):
        def end(self, walk, known):
            seen.append(mean_divergence(walk, known))

    dense, pruned = make_llama(torch.float64), make_llama(torch.float64)
    steps = (*methods.make("wanda").steps, Watched(1.0))
    gblm.prune(pruned, batch, replace(methods.make("wanda"), steps=steps), "0.5", micro_batch=3)
    with torch.no_grad():
        wanted = divergence(dense(**batch).logits, pruned(**batch).logits)
    assert seen == [pytest.approx(wanted, rel=1e-9)]


def test_what_cannot_be_distilled_is_refused_before_work(llama, batch):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    without = replace(adapter(llama), logits=None)
    with pytest.raises(gblm.GblmError, match="needs an adapter with logits"):
        gblm.prune(llama, batch, DISTILLED, "0.5", adapter=without)
    with pytest.raises(gblm.GblmError, match="is no number of passes"):
        methods.make("best", distill=-1)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_products_in_bfloat16_feed_a_head_in_float32(monkeypatch):
    """The trunk may end with a product, whose dtype is then the narrow one."""
    monkeypatch.setattr("gblm.walk.walk.find_compute_dtype", lambda *_: torch.bfloat16)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](x).relu())

    sides = gblm.Adapter(
        blocks=lambda model: {f"blocks.{i}": block for i, block in enumerate(model.blocks)},
        trunk=lambda model, batch: model(batch["x"]),
        loss=lambda model, hidden, batch: model.head(hidden).square().mean(dim=1),
        logits=lambda model, hidden, batch: model.head(hidden),
    )
    x = torch.randn(32, 16)
    dense, pruned, distilled = Model(), Model(), Model()
    gblm.prune(pruned, {"x": x}, methods.make("wanda"), "0.5", adapter=sides)
    gblm.prune(distilled, {"x": x}, DISTILLED, "0.5", adapter=sides)
    with torch.no_grad():
        logits = [model.head(model(x)) for model in (dense, pruned, distilled)]
    assert divergence(logits[0], logits[2]) < divergence(logits[0], logits[1])
