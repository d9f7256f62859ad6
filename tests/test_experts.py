"""Whole experts go: which ones, with what of the router, and what the config then says."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import gblm
from gblm import methods
from gblm.llm.__main__ import main
from gblm.maths import patterns
from gblm.walk.experts import Closed, Experts
from gblm.walk.sample import some
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 6,
    "initializer_range": 0.2,
}
WORDS = {"input_ids": torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(0))}
MODELS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": SIZES,
    "Qwen3MoeForCausalLM": {**SIZES, "head_dim": 8, "num_experts": 6},
    "Qwen2MoeForCausalLM": {
        **SIZES,
        "num_experts": 6,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
    "OlmoeForCausalLM": {**SIZES, "num_experts": 6},
    "GptOssForCausalLM": {**SIZES, "head_dim": 8},
}


def language(name: str) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**MODELS[name])).double().eval()
    model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    found: Tensor = model(**WORDS).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_fewer_experts_is_that_whose_routers_pass_them_by(monkeypatch, tmp_path, name):
    model = language(name)
    dense, passed = outputs(model), list[Tensor]()
    apply = Experts.apply

    def watched(self: Experts) -> None:
        with Closed([*self.mixtures.values()]):
            passed.append(outputs(self.model))
        apply(self)

    monkeypatch.setattr(Experts, "apply", watched)
    report = gblm.prune(model, WORDS, methods.make("wanda"), "experts:0.34")
    assert report.left == sum(own.numel() for own in model.parameters()) < report.parameters
    torch.testing.assert_close(outputs(model), passed[-1], rtol=1e-9, atol=1e-9)
    assert (outputs(model) - dense).abs().max() > 1e-6
    names = ("num_local_experts", "num_experts")
    assert 4 in [getattr(model.config, key, 0) for key in names]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    again.set_experts_implementation("eager")
    torch.testing.assert_close(outputs(again), passed[-1], rtol=1e-6, atol=1e-6)


def test_each_time_that_expert_goes_without_which_the_block_changes_least():
    model = language("MixtralForCausalLM")
    walk = Walk.of(model, WORDS)
    experts = Experts.of(walk, patterns.parse("experts:0.34"))
    found: dict[str, list[int]] = {}

    def work(visit: Visit) -> None:
        block, gate = visit.block.module, visit.block.module.mlp.gate
        calls = [call.sample(i) for call in visit.calls for i in range(call.samples)]
        dense = [call.run(list(call.leaves)) for call in calls]
        gone, weight = list[int](), gate.weight.detach().clone()
        forward_of = gate.forward
        for _ in range(2):
            errors = {}
            for i in set(range(6)) - {*gone}:
                left = [j for j in range(6) if j not in {*gone, i}]

                def routed(x: Tensor, left: list[int] = left) -> Any:
                    logits = torch.full((*x.shape[:-1], 6), -torch.inf, dtype=x.dtype)
                    logits[..., left] = x @ weight[left].T
                    scores, index = torch.topk(logits.softmax(dim=-1), 2, dim=-1)
                    return logits, scores / scores.sum(dim=-1, keepdim=True), index

                gate.forward = routed
                given = [call.run(list(call.leaves)) for call in calls]
                errors[i] = sum(
                    float((x - y).square().sum()) for x, y in zip(given, dense, strict=True)
                )
            gone.append(min(errors, key=lambda i: errors[i]))
        del gate.forward
        assert gate.forward == forward_of
        assert block is not None
        found[visit.block.name] = gone

    forward(some(walk), work)
    experts.choose(walk, {})
    assert {name: own.gone for name, own in experts.mixtures.items()} == found


def test_other_units_and_a_pattern_are_for_the_experts_that_stay():
    assert patterns.parse("neurons:0.25+experts:0.34").name == "experts:0.34+neurons:0.25"
    model = language("MixtralForCausalLM").float()
    pattern = "experts:0.34+neurons:0.25+0.5"
    report = gblm.prune(model, WORDS, methods.make("magnitude"), pattern)
    block = model.model.layers[0].mlp
    assert block.gate.weight.shape == (4, 32)
    assert block.experts.down_proj.shape == (4, 32, 36)
    assert (block.experts.down_proj == 0).float().mean() == pytest.approx(0.5)
    shares = [x.sparsity for x in report.linears if "layers.0" in x.name and "down_proj" in x.name]
    assert sorted(shares) == [pytest.approx(1 - 0.75 / 2)] * 4 + [1, 1]


@pytest.mark.parametrize(
    ("name", "share", "words"),
    [
        ("MixtralForCausalLM", 0.9, "cannot be"),
        ("MixtralForCausalLM", 0.05, "removes none; use experts:0.17"),
        ("LlamaForCausalLM", 0.5, "no mixture of experts"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(monkeypatch, name, share, words):
    monkeypatch.setitem(MODELS, "LlamaForCausalLM", SIZES)
    model = (
        language(name)
        if "Mix" in name
        else transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    )
    before = outputs(model)
    with pytest.raises(gblm.GblmError, match=words):
        gblm.prune(model, WORDS, methods.make("wanda"), f"experts:{share}")
    assert torch.equal(outputs(model), before)


def test_the_command_writes_fewer_experts(llm, tmp_path):
    model = language("MixtralForCausalLM").float()
    flags = [flag.replace("--windows", "--evaluate-windows") for flag in llm[1:]]
    source = flags[flags.index("--model") + 1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**SIZES, "vocab_size": len(tokenizer)})
    )
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    flags[flags.index("--model") + 1] = str(tmp_path / "moe")
    flags += ["--method", "best", "--sparsity", "experts:0.34"]
    assert main([*flags, "--dry-run"]) == 0
    assert main([*flags, "--output", str(tmp_path / "out")]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.num_local_experts == 4
