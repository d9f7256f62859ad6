"""Rotations of the stream: the model stays the same, and fewer of its weights are worth more."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import gblm
from gblm import methods
from gblm.llm.__main__ import main
from gblm.maths.rotation import Part, entropy, learn, rotation_of
from gblm.methods.rotate import Rotate
from gblm.walk.journal import Journal
from gblm.walk.survey import find_adapter
from gblm.walk.walk import Walk

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
IDS = torch.randint(96, (16, 12), generator=torch.Generator().manual_seed(0))


def llama(tied: bool = True) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def qwen3() -> nn.Module:
    config = transformers.Qwen3Config(**SIZES, head_dim=8, attention_bias=True)
    return transformers.Qwen3ForCausalLM(config)


def gemma() -> nn.Module:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES, head_dim=8))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 96}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.2))


def neox() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))


def vit() -> nn.Module:
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


MODELS = {own.__name__: own for own in (llama, qwen3, gemma, gpt2, neox, vit)}


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model in double precision whose norms and biases are drawn, and samples."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().double()
    with torch.no_grad():
        for own in model.parameters():
            if own.ndim == 1:
                own.add_(0.3 * torch.randn_like(own))
    if name == "vit":
        images = torch.randn(16, 3, 32, 32, dtype=torch.float64)
        return model, {"images": images, "labels": torch.arange(16) % 5}
    return model, {"input_ids": IDS}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(batch["images"]) if "images" in batch else model(**batch).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_turned_model_gives_the_same_and_can_be_turned_back(name):
    model, batch = make(name)
    before, wanted = copy.deepcopy(model.state_dict()), logits(model, batch)
    walk = Walk.of(model, batch, find_adapter(model))
    step = Rotate(10)
    step.check_model(walk)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    blocks = {key: copy.deepcopy(own.module.state_dict()) for key, own in enumerate(walk.blocks)}
    known = step.begin(walk)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=1e-5)  # norms in fp32
    changed = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    assert len(changed) > len(before) / 2
    step.undo(walk, known)
    for key, own in enumerate(walk.blocks):
        own.module.load_state_dict(blocks[key])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name == "llama":
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings


@pytest.mark.parametrize("centred", [False, True])
def test_what_is_learnt_is_a_rotation_that_gathers_importance(centred):
    draw = torch.Generator().manual_seed(0)
    x, w, v = (torch.randn(n, 24, generator=draw) for n in (200, 40, 40))
    x = x * torch.linspace(0.1, 3, 24) @ rotation_of(torch.randn(24, 24, generator=draw))
    y = torch.randn(200, 40, generator=draw)
    parts = [Part(w, x.T @ x), Part(v.T, y.T @ y, writes=True)]

    def total(rotation: Tensor) -> float:
        gram = rotation.T @ parts[0].gram @ rotation
        gram = gram / gram.diagonal().mean() + 0.01 * torch.eye(24)
        own = (w @ rotation).square() / torch.linalg.inv(gram).diagonal()
        other = parts[1].gram / parts[1].gram.diagonal().mean() + 0.01 * torch.eye(40)
        written = (v @ rotation).square() / torch.linalg.inv(other).diagonal()[:, None]
        return (entropy(own) + entropy(written)).item()

    rotation = learn(parts, 60, centred)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(24), atol=1e-5, rtol=0)
    assert total(rotation) < 0.95 * total(torch.eye(24))
    if centred:
        torch.testing.assert_close(rotation @ torch.ones(24), torch.ones(24), atol=1e-5, rtol=0)


def test_a_result_is_loaded_by_transformers_with_a_head_of_its_own(tmp_path):
    model, batch = make("llama")
    model.float()
    report = gblm.prune(model, batch, "best:rotate=5", "2:4")
    assert report.sparsity == 0.5
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert not again.config.tie_word_embeddings


def test_a_run_that_is_resumed_turns_the_model_as_before(make_llama, make_batch, prune, tmp_path):
    method, key, found = methods.make("best", rotate=5), {"run": "one"}, []
    for resume in (False, True):
        model = make_llama()
        journal = Journal(tmp_path / "run", key, resume)
        if resume:
            journal.finished.pop()
            journal.entries = journal.entries[: -len(journal.entries) // 2]
        prune(model, make_batch(), method, "0.5", journal=journal)
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


def test_a_run_after_a_turned_one_is_what_it_is_alone(llm, tmp_path):
    known = [own.replace("--windows", "--evaluate-windows") for own in llm[1:]]

    def run(names: str, where: str) -> None:
        flags = ["--method", names, "--sparsity", "0.5", "--output", str(tmp_path / where)]
        assert main([*known, *flags]) == 0

    run("sparsegpt", "alone")
    run("best:rotate=3,sparsegpt", "both")
    (own,) = (tmp_path / "both").glob("sparsegpt*")
    turned = {x.name for x in (tmp_path / "both").glob("best*/model.safetensors")}
    assert turned == {"model.safetensors"}
    alone, after = (load_file(x / "model.safetensors") for x in (tmp_path / "alone", own))
    assert {*alone} == {*after}
    assert all(torch.equal(value, after[name]) for name, value in alone.items())


def test_what_cannot_be_turned_is_refused_before_work():
    with pytest.raises(gblm.GblmError, match="scores by gradients"):
        methods.rotated(methods.make("gblm"), 10)
    with pytest.raises(gblm.GblmError, match="is no number of steps"):
        methods.make("best", rotate=-1)
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SIZES, head_dim=8)
    model = transformers.Gemma2ForCausalLM(config)
    with torch.no_grad():
        for own in model.parameters():
            own.add_(0.1 * torch.randn_like(own))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gblm.GblmError, match="Gemma2ForCausalLM gives something else once turned"):
        gblm.prune(model, {"input_ids": IDS}, "best:rotate=5", "0.5")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model, batch = make("llama")
    without = replace(find_adapter(model), logits=None)
    with pytest.raises(gblm.GblmError, match="an adapter without logits"):
        gblm.prune(model, batch, "best:rotate=5", "0.5", adapter=without)
