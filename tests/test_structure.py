"""Structured pruning: units are found, chosen as least squares says, and cut out of the model."""

import copy
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import gblm
from gblm import methods, vit
from gblm.base import Statistics
from gblm.llm import adapters
from gblm.maths import admm, patterns, structure
from gblm.walk.journal import Journal
from gblm.walk.narrow import Narrowing
from gblm.walk.units import find_units
from gblm.walk.walk import Walk

# The choice


def problem(inputs: int = 12) -> tuple[Tensor, Statistics]:
    draw = torch.Generator().manual_seed(0)
    mixed, x = (torch.randn(n, inputs, generator=draw, dtype=torch.float64) for n in (inputs, 60))
    x = x @ mixed
    weight = torch.randn(5, inputs, generator=draw, dtype=torch.float64)
    return weight, Statistics({"input_gram": x.T @ x}, 60, 60)


def error(own: admm.Problem, inputs: Tensor) -> float:
    """Return the squared error of the best weights that use some inputs, but for a constant."""
    new = torch.linalg.lstsq(own.hessian[inputs][:, inputs], own.target[:, inputs].T).solution.T
    return float(
        (new @ own.hessian[inputs][:, inputs] * new).sum() - 2 * (new * own.target[:, inputs]).sum()
    )


@pytest.mark.parametrize(("size", "panel"), [(1, 64), (1, 2), (3, 64)])
def test_units_go_step_by_step_as_solving_anew_says(monkeypatch, size, panel):
    monkeypatch.setattr(structure, "PANEL", panel)
    weight, statistics = problem()
    own = admm.Problem.of(weight, statistics, admm.DAMPING, 1.0, torch.float64)
    channels = torch.arange(12).view(-1, size)
    left = list(range(len(channels)))
    while len(left) > len(channels) // 2:
        errors = [error(own, channels[[u for u in left if u != v]].flatten()) for v in left]
        left.pop(errors.index(min(errors)))
    new, keep = structure.solve(weight, statistics, channels, len(left))
    assert keep.nonzero().flatten().tolist() == left
    inputs = channels[keep].flatten()
    best = torch.linalg.solve(own.hessian[inputs][:, inputs], own.target[:, inputs].T).T
    torch.testing.assert_close(new[:, inputs] * own.scale[inputs], best)
    assert not new[:, channels[~keep].flatten()].any()


def test_a_score_of_units_is_the_sum_over_their_weights():
    rows, columns = torch.rand(6, 4), torch.rand(3, 6)
    places = torch.tensor([[0, 3], [1, 4], [2, 5]])
    found = structure.unit_scores([(rows, places), (columns.T, places)])
    expected = [rows[own].sum() + columns[:, own].sum() for own in places]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(
    ("units", "share", "multiple", "stay"),
    [
        (11008, 0.25, 64, 8256),
        (768, 0.3, 64, 544),
        (172, 0.25, 64, 128),
        (9, 0.2, 1, 7),
        (4, 0.9, 1, 1),
    ],
)
def test_widths_are_rounded_to_multiples(units, share, multiple, stay):
    assert structure.kept(units, share, multiple) == stay


# Patterns


@pytest.mark.parametrize("text", ["neurons:0.25", "neurons:0.3+heads:0.2", "heads:0.5+2:4"])
def test_a_pattern_of_units_is_given_back_by_its_name(text):
    assert patterns.parse(text).name == text
    assert patterns.parse(patterns.parse(text).name).units == patterns.parse(text).units


@pytest.mark.parametrize(
    "text", ["neurons:0", "neurons:1", "nerves:0.5", "heads:0.1+heads:0.2", "heads:0.1+2:4+0.5"]
)
def test_what_is_no_pattern_of_units_is_refused(text):
    with pytest.raises(gblm.GblmError, match=r"neurons|heads|each kind"):
        patterns.parse(text)


# Families

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WORDS = {"input_ids": torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(0))}
BOTH = "neurons:0.3+heads:0.4"
LANGUAGE: dict[str, tuple[dict[str, Any], str]] = {
    "Llama": (SIZES, BOTH),
    "Qwen2": (SIZES, BOTH),
    "Qwen3": ({**SIZES, "head_dim": 16}, BOTH),
    "Mistral": (SIZES, BOTH),
    "Gemma": ({**SIZES, "head_dim": 8}, BOTH),
    "Gemma2": ({**SIZES, "head_dim": 8}, BOTH),
    "Phi": (SIZES, BOTH),
    "Phi3": ({**SIZES, "pad_token_id": 0}, BOTH),
    "OPT": ({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, "neurons:0.3"),
    "GPT2": ({"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, "neurons:0.3"),
    "GPTNeoX": ({k: v for k, v in SIZES.items() if "key" not in k}, "neurons:0.3"),
    "Mixtral": ({**SIZES, "num_local_experts": 3}, BOTH),
    "Qwen3Moe": (
        {
            **SIZES,
            "moe_intermediate_size": 40,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "head_dim": 8,
        },
        BOTH,
    ),
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
IMAGES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 2},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 28, "depths": (1, 1), "num_heads": (3, 6)},
}


def language(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**LANGUAGE[family][0])
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config).double()
    if "Mo" in family or "Mix" in family:  # torch's grouped product has no float64
        model.set_experts_implementation("eager")
    return model.eval()


def pictures(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    options = {"num_classes": 10, **IMAGES[name]}
    model = timm.create_model(name, **options).double().eval()
    size = IMAGES[name].get("img_size", 32)
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    return model, {"images": images, "labels": torch.tensor([0, 1, 2, 3])}


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    given = model(batch.get("input_ids", batch.get("images")))
    return given if isinstance(given, Tensor) else given.logits


def pruned_twice(monkeypatch, model: nn.Module, batch: dict[str, Tensor], pattern: str):
    """Return the outputs of a model whose units are zeroed, and those once they are cut out."""
    wide: list[Tensor] = []
    apply = Narrowing.apply

    def watched(self: Narrowing) -> None:
        wide.append(outputs(self.model, batch))
        apply(self)

    monkeypatch.setattr(Narrowing, "apply", watched)
    report = gblm.prune(model, batch, methods.make("wanda"), pattern)
    assert report.left == sum(own.numel() for own in model.parameters()) < report.parameters
    return wide[0], outputs(model, batch)


@pytest.mark.parametrize("family", LANGUAGE)
def test_a_narrow_language_model_is_the_zeroed_one_and_loads_by_its_own_library(
    monkeypatch, tmp_path, family
):
    model = language(family)
    dense = outputs(model, WORDS)
    wide, narrow = pruned_twice(monkeypatch, model, WORDS, LANGUAGE[family][1])
    torch.testing.assert_close(narrow, wide, rtol=1e-9, atol=1e-9)
    assert (narrow - dense).abs().max() > 1e-6
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    if model.get_experts_implementation()[""] == "eager":
        again.set_experts_implementation("eager")
    torch.testing.assert_close(outputs(again, WORDS), narrow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", IMAGES)
def test_a_narrow_image_classifier_is_the_zeroed_one_and_loads_by_timm(monkeypatch, tmp_path, name):
    model, batch = pictures(name)
    wide, narrow = pruned_twice(monkeypatch, model, batch, "neurons:0.25")
    torch.testing.assert_close(narrow, wide, rtol=1e-9, atol=1e-9)
    vit.models.save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).double().eval()
    torch.testing.assert_close(outputs(again, batch), narrow, rtol=1e-6, atol=1e-6)


# Units


def test_heads_that_share_keys_and_values_go_together(llama, make_batch):
    units = find_units(Walk.of(llama, make_batch()))["model.layers.0"]
    heads, neurons = units
    assert (heads.kind, neurons.kind) == ("heads", "neurons")
    assert heads.channels.tolist() == [[*range(16)], [*range(16, 32)]]
    rows = {linear.name.rpartition(".")[2]: own.tolist() for linear, own in heads.writers}
    assert rows["q_proj"] == heads.channels.tolist()
    assert rows["k_proj"] == rows["v_proj"] == [[*range(8)], [*range(8, 16)]]
    assert [own.tolist() for _, own in neurons.writers] == [[[i] for i in range(48)]] * 2


class Mixed(nn.Module):
    """An MLP whose neurons a norm mixes, so that none of them can go alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)))


def test_neurons_that_a_norm_mixes_are_none():
    model = nn.Sequential(Mixed(), Mixed())
    adapter = gblm.Adapter(
        lambda m: dict(m.named_children()),
        lambda m, batch: m(batch["x"]),
        lambda m, hidden, batch: hidden.mean(dim=(1, 2)),
    )
    with pytest.raises(gblm.GblmError, match="no neurons found"):
        gblm.prune(
            model,
            {"x": torch.randn(4, 5, 8)},
            methods.make("wanda"),
            "neurons:0.25",
            adapter=adapter,
        )


# Methods


@pytest.mark.parametrize(
    "method", ["magnitude", "gradient", "gblm", "wanda+repair", "admm", "best"]
)
def test_methods_remove_the_same_count_of_units(llama, make_batch, method):
    report = gblm.prune(llama, make_batch(), methods.make(method), "neurons:0.25+heads:0.5")
    assert llama.config.intermediate_size == 36
    assert llama.config.num_key_value_heads == 1
    assert llama.model.layers[0].mlp.down_proj.weight.shape == (32, 36)
    named = {linear.name: linear.sparsity for linear in report.linears}
    assert named["model.layers.0.self_attn.o_proj"] == 0.5


@pytest.mark.parametrize("method", ["sparsegpt", "wanda++"])
def test_methods_without_a_score_of_units_are_refused(llama, make_batch, method):
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(gblm.GblmError, match="use "):
        gblm.prune(llama, make_batch(), methods.make(method), "neurons:0.25")
    assert all(torch.equal(own, before[name]) for name, own in llama.state_dict().items())


def test_a_pattern_after_the_units_is_for_what_is_left(llama, make_batch):
    report = gblm.prune(llama, make_batch(), methods.make("wanda"), "neurons:0.25+2:4")
    weight = llama.model.layers[0].mlp.down_proj.weight
    assert weight.shape == (32, 36)
    assert (weight.view(32, 9, 4) != 0).sum(dim=-1).eq(2).all()
    named = {linear.name: linear.sparsity for linear in report.linears}
    assert named["model.layers.0.mlp.down_proj"] == pytest.approx(1 - 0.75 / 2)
    assert named["model.layers.0.self_attn.q_proj"] == pytest.approx(0.5)


def test_a_config_that_cannot_state_fewer_heads_is_refused_before_work(monkeypatch):
    monkeypatch.setattr(adapters, "narrows", lambda model: False)  # as of a class of its own
    model = language("OPT")
    with pytest.raises(
        gblm.GblmError, match=r"heads:0.5: the config of OPTForCausalLM cannot state"
    ):
        gblm.prune(model, WORDS, methods.make("wanda"), "heads:0.5")


def test_a_run_that_is_resumed_gives_the_same_narrow_model(make_llama, make_batch, prune, tmp_path):
    method, key, found = methods.make("best"), {"run": "one"}, []
    for resume in (False, True):
        model = make_llama()
        journal = Journal(tmp_path / "run", key, resume)
        if resume:
            assert journal.finished
            journal.finished.pop()
            journal.entries = journal.entries[: -len(journal.entries) // 3]
        prune(model, make_batch(), method, "neurons:0.25", journal=journal)
        found.append(model.state_dict())
    assert found[0]["model.layers.2.mlp.down_proj.weight"].shape == (32, 36)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_a_model_gets_its_blocks_back(llama, make_batch):
    batch = make_batch()
    walk = Walk.of(llama, batch)
    before, blocks, config = outputs(llama, batch), [*llama.model.layers], llama.config
    narrowing = Narrowing.of(walk, patterns.parse("neurons:0.25"))
    narrowing.apply()
    assert llama.config.intermediate_size == 36
    narrowing.undo()
    assert [*llama.model.layers] == blocks
    assert llama.config is config
    assert torch.equal(outputs(llama, batch), before)
