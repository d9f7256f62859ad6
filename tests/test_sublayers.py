"""Whole layers of attention, or MLPs, go: which ones, and what is loaded without gblm."""

import copy
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import gblm
from gblm import llm, methods, vit
from gblm.maths import patterns
from gblm.walk.sublayers import Sublayers
from gblm.walk.walk import Walk
from tests.test_uneven import loaded_elsewhere, outputs

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
WORDS = {"input_ids": torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(0))}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "eos_token_id": 1}
MODELS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    # its settings, and where the last linears of its layers are, attention then MLPs
    "LlamaForCausalLM": (SIZES, ["self_attn.o_proj"], ["mlp.down_proj"]),
    "GPT2LMHeadModel": ({**GPT2, "bos_token_id": 0}, ["attn.c_proj"], ["mlp.c_proj"]),
    "GPTNeoXForCausalLM": (SIZES, ["attention.dense"], ["mlp.dense_4h_to_h"]),
}


def language(name: str) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**MODELS[name][0])).eval()


def image_classifier() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, depth=4).eval()
    return model, {"images": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 3])}


def zeroed(model: nn.Module, ends: list[str], gone: list[str]) -> nn.Module:
    """Return a copy of the dense model in which what layers add is 0."""
    new = copy.deepcopy(model)
    layers = {
        name.rpartition(".")[0]: name
        for name, _ in new.named_modules()
        if any(name.endswith(end) for end in ends)
    }
    for name in gone:
        last: Any = new.get_submodule(layers[name])
        for own in last.parameters():
            own.detach().zero_()
    return new


QUICK = "GPT2LMHeadModel", "attention"  # the others start a process each, too


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (x, kind) if (x, kind) == QUICK else pytest.param(x, kind, marks=pytest.mark.slow)
        for x in MODELS
        for kind in ("attention", "mlps")
    ],
)
def test_a_language_model_without_layers_is_the_zeroed_one_and_loads_elsewhere(
    tmp_path, name, kind
):
    model = language(name)
    dense = copy.deepcopy(model)
    report = gblm.prune(model, WORDS, methods.make("wanda"), f"{kind}:0.5")
    assert report.left == sum(own.numel() for own in model.parameters()) < report.parameters
    gone = [key for key, own in model.narrowed.items() if isinstance(own, int)]
    assert len(gone) == 2
    ends = MODELS[name][1 if kind == "attention" else 2]
    exact, other = zeroed(dense, ends, gone).double(), copy.deepcopy(model).double()
    torch.testing.assert_close(outputs(other, WORDS), outputs(exact, WORDS), rtol=1e-9, atol=1e-9)
    assert (outputs(model, WORDS) - outputs(dense, WORDS)).abs().max() > 1e-6
    model.save_pretrained(tmp_path / "model")
    llm.models.write_widths(model, tmp_path / "model", "AutoModelForCausalLM")
    found = loaded_elsewhere(tmp_path / "model", WORDS, "transformers")
    assert torch.equal(found, outputs(model, WORDS))
    ids = model.generate(WORDS["input_ids"], max_new_tokens=4, do_sample=False)
    plain = model.generate(WORDS["input_ids"], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(ids, plain)


@pytest.mark.slow
def test_an_image_classifier_without_layers_loads_elsewhere(tmp_path):
    model, batch = image_classifier()
    gblm.prune(model, batch, methods.make("wanda"), "mlps:0.25+neurons:0.25")
    assert sum(isinstance(own, int) for own in model.narrowed.values()) == 1
    vit.models.save(model, tmp_path / "model")
    found = loaded_elsewhere(tmp_path / "model", batch, "timm")
    assert torch.equal(found, outputs(model, batch))


def test_each_time_that_layer_goes_without_which_the_loss_is_lowest():
    model = language("LlamaForCausalLM")
    walk = Walk.of(model, WORDS)
    layers = Sublayers.of(walk, patterns.parse("mlps:0.5"))
    gone = list[str]()
    for _ in range(2):
        losses = {}
        for name in {*layers.layers} - {*gone}:
            own = zeroed(model, ["mlp.down_proj"], [*gone, name])
            with torch.no_grad():
                losses[name] = float(own(**WORDS, labels=WORDS["input_ids"]).loss)
        gone.append(min(losses, key=lambda name: losses[name]))
    layers.choose(walk, {})
    assert layers.gone == gone
    before = outputs(model, WORDS)
    layers.apply()
    assert not torch.equal(outputs(model, WORDS), before)
    layers.undo()
    assert "narrowed" not in vars(model)
    assert torch.equal(outputs(model, WORDS), before)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_best_refines_the_blocks_after_towards_the_dense_ones(name):
    errors = []
    dense = outputs(language(name), WORDS)
    for refine in (0.0, 30.0):
        model = language(name)
        gblm.prune(model, WORDS, methods.make("best", refine=refine), "attention:0.25")
        errors.append((outputs(model, WORDS) - dense).norm())
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("mlps:0.1", "removes none; use mlps:0.25"), ("attention:0.9", "leaves too few")],
)
def test_what_cannot_go_is_refused(pattern, words):
    with pytest.raises(gblm.GblmError, match=words):
        gblm.prune(language("LlamaForCausalLM"), WORDS, methods.make("wanda"), pattern)
