"""Laws of placement: a model on another device than the CPU gets the masks that it gets there.

With ample memory what the blocks give stays on the device. With little, it waits in main memory,
and every module, those between the blocks too, must have its own part of it back on the device.
"""

import gc
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import gblm
from gblm import methods
from gblm.maths import stats
from gblm.walk.journal import Journal

DEVICE = "second"
METHODS = [*methods.METHODS, "gblm+repair", "wanda++:rounds=1"]
SAMPLES = 6
Batch = dict[str, Tensor]


def method_of(text: str) -> gblm.Method:
    name, options = methods.parse(text)
    return methods.make(name, **options)


# In double precision: what rounds otherwise on one way than on the other moves no mask.


def vit() -> nn.Module:
    """Return a ViT of two blocks."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return classifier(partial(timm.create_model, "vit_tiny_patch16_224", **sizes))


def swin() -> nn.Module:
    """Return a Swin of two stages with a block each, and a linear downsample between them."""
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8}
    return classifier(partial(SwinTransformer, depths=(1, 1), num_heads=(2, 2), **sizes))


def moe() -> nn.Module:
    """Return a Qwen3-MoE of two blocks, whose experts are tensors of three dimensions."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    model = Qwen3MoeForCausalLM(config).eval().double()
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    return model


def tokens(samples: int = SAMPLES) -> Batch:
    draw = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(64, (samples, 96), generator=draw)}


def classifier(make: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        return make(num_classes=3).eval().double()
    finally:
        timm.layers.set_fused_attn(before)


def pictures(samples: int = SAMPLES, size: int = 16) -> Batch:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, size, size, generator=draw, dtype=torch.float64)
    return {"images": images, "labels": torch.arange(samples) % 3}


Made = Callable[[str], tuple[nn.Module, Batch]]


@pytest.fixture
def made(make_llama, make_batch) -> Made:
    """Return what makes a model of a side, and a batch for it."""

    def make(side: str) -> tuple[nn.Module, Batch]:
        if side == "llm":
            model = make_llama(torch.float64)
            model.set_attn_implementation("eager")  # there is no kernel of another for the device
            return model, make_batch(SAMPLES)
        if side == "moe":
            return moe(), tokens()
        return {"vit": vit, "swin": swin}[side](), pictures()

    return make


@pytest.fixture
def expected(made: Made) -> Callable[[str, str, str], dict[str, Tensor]]:
    """Return what gives the weights that a model has after a method and a backward on the CPU."""
    return partial(on_cpu, made)


RESULTS: dict[tuple[str, str, str], dict[str, Tensor]] = {}


def on_cpu(made: Made, side: str, name: str, backward: str) -> dict[str, Tensor]:
    if (side, name, backward) not in RESULTS:
        model, batch = made(side)
        gblm.prune(model, batch, method_of(name), "0.5", backward=backward)
        RESULTS[side, name, backward] = model.state_dict()
    return RESULTS[side, name, backward]


def check_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Fail unless a model on the device has the masks and the weights expected."""
    for name, value in model.state_dict().items():
        assert value.device.type == DEVICE, name
        assert torch.equal(value.cpu() == 0, expected[name] == 0), name
        error = (value.cpu() - expected[name]).norm() / expected[name].norm().clamp(min=1e-9)
        assert error < 1e-3, f"{name}: {error:.2g} apart"


class Cut(Exception):
    """Planted between two blocks."""


class CutJournal(Journal):
    """A journal whose run is cut off after the first block."""

    def finish(self, *given: Any) -> None:
        super().finish(*given)
        raise Cut


MEMORY: dict[str, dict[str, Any]] = {"ample": {}, "little": {"micro_batch": 2}}
RUNS = ["fresh", "resumed"]
SIDES = ["llm", "vit", "swin", "moe"]


@cache
def uses_backward(name: str) -> bool:
    method = method_of(name)
    return bool(method.needs & set(stats.GRADIENT) or method.allocation)


def cases() -> list[Any]:
    """Every case; by default each method once with little memory, and each side all ways."""
    found = []
    for side in SIDES:
        for name in METHODS:
            for backward in ("blocks", "model") if uses_backward(name) else ("blocks",):
                for memory in MEMORY:
                    for run in RUNS:
                        hard = (backward, memory, run) == ("blocks", "little", "resumed")
                        default = hard if side == "llm" else hard and name in ("gblm", "best")
                        default |= name == "gblm" and side == "llm"
                        marks = () if default else pytest.mark.slow
                        found.append(pytest.param(side, name, backward, memory, run, marks=marks))
    return found


@pytest.mark.parametrize(("side", "name", "backward", "memory", "run"), cases())
def test_masks_are_those_of_the_cpu(
    side, name, backward, memory, run, made, expected, prune, tmp_path
):
    model, batch = made(side)
    model.to(DEVICE)
    if memory == "little":
        torch.second.report_free(1)
    prune = partial(prune, batch=batch, method=method_of(name), pattern="0.5")
    prune = partial(prune, backward=backward, **MEMORY[memory])
    if run == "resumed":
        with pytest.raises(Cut):
            prune(model, journal=CutJournal(tmp_path, {}, resume=False))
        model = made(side)[0].to(DEVICE)
        prune(model, journal=Journal(tmp_path, {}, resume=True))
    else:
        prune(model)
    check_same(model, expected(side, name, backward))


@pytest.mark.parametrize("name", ["gblm", "best"])
def test_gradients_may_lie_in_main_memory(name, made, expected, prune):
    model, batch = made("llm")
    needs = {"grad_abs", "grad_sq", "grad_position"}
    gradients = gblm.gradient_sums(model.to(DEVICE), batch, needs)
    for statistics in gradients.values():
        statistics.sums = {key: value.cpu() for key, value in statistics.sums.items()}
    prune(model, batch, method_of(name), gradients=gradients)
    check_same(model, expected("llm", name, "blocks"))


# With a memory that is little indeed


class Narrow(nn.Module):
    """A block whose linears see a small part of what it hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        part = x[..., :8]
        return torch.cat([part + self.outer(self.inner(part).relu()), x[..., 8:]], dim=-1)


class Deep(nn.Module):
    """Eight such blocks on samples `ids [n, 4]` of vectors of 256, and a scale between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 256)
        self.layers = nn.ModuleList(Narrow() for _ in range(8))
        self.scale = nn.Parameter(torch.rand(256) + 0.5)
        self.head = nn.Linear(256, 3)

    def trunk(self, batch: Batch) -> Tensor:
        x = self.embed(batch["ids"])
        for layer in self.layers:
            x = layer(x) * self.scale
        return x

    def losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        logits = self.head(hidden.mean(dim=1))
        return nn.functional.cross_entropy(logits, batch["label"], reduction="none")


DEEP = gblm.Adapter(
    blocks=lambda model: {f"layers.{i}": block for i, block in enumerate(model.layers)},
    trunk=Deep.trunk,
    loss=Deep.losses,
)


@pytest.mark.parametrize("name", ["wanda", "gblm", "wanda++:rounds=1", "best"])
def test_a_stream_that_fills_the_memory_leaves_the_device(name):
    samples, expected = 48, Deep().double()
    ids = torch.randint(16, (samples, 4), generator=torch.Generator().manual_seed(0))
    batch = {"ids": ids, "label": torch.arange(samples) % 3}
    run = {"adapter": DEEP, "micro_batch": 2, "backward": "blocks"}
    gblm.prune(expected, batch, method_of(name), "0.5", **run)
    model = Deep().double().to(DEVICE)
    stream = samples * 4 * 256 * 8 * (2 if name == "best" else 1)  # with that of the dense model
    gc.collect()  # what other tests have left
    # Less than the inputs of all blocks; what a block takes and gives is soon more than a quarter
    # of what is free.
    torch.second.set_limit(torch.second.memory_allocated() + 6 * stream)
    gblm.prune(model, batch, method_of(name), "0.5", **run)
    check_same(model, expected.state_dict())
