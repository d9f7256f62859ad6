"""Whole blocks go: which ones, what stays in their place, and what the config then says."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import gblm
from gblm import methods
from gblm.llm import adapters
from gblm.llm.__main__ import main
from gblm.machine import processes
from gblm.maths import patterns
from gblm.vit.__main__ import main as vit_main
from gblm.vit.models import save
from gblm.walk.depth import Depth, bypass_of
from gblm.walk.journal import Journal
from gblm.walk.sample import mean_loss, some
from gblm.walk.walk import Walk

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
WORDS = {"input_ids": torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(0))}
BART = {"layers": 4, "attention_heads": 2, "ffn_dim": 24}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": SIZES,
    "Gemma2ForCausalLM": {**SIZES, "head_dim": 8, "sliding_window": 4},
    "SmolLM3ForCausalLM": {**SIZES, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
    "GPT2LMHeadModel": {"vocab_size": 64, "n_embd": 32, "n_layer": 5, "n_head": 4},
    "MixtralForCausalLM": {**SIZES, "num_local_experts": 3},
}


def language(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**MODELS[name], **more)).double().eval()
    if "Mix" in name:  # torch's grouped product has no float64
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    given: Any = model(batch.get("input_ids", batch.get("images")))
    return given if isinstance(given, Tensor) else given.logits


def shortened(monkeypatch, model: nn.Module, batch: dict[str, Tensor], pattern: str) -> Tensor:
    """Remove blocks; return the outputs of the model that passed these blocks by before."""
    passed: list[Tensor] = []
    apply = Depth.apply

    def watched(self: Depth) -> None:
        with self.passing(self.gone):
            passed.append(outputs(self.model, batch))
        apply(self)

    monkeypatch.setattr(Depth, "apply", watched)
    report = gblm.prune(model, batch, methods.make("wanda"), pattern)
    assert report.left == sum(own.numel() for own in model.parameters()) < report.parameters
    return passed[-1]


@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_without_blocks_passes_them_by_and_loads_by_its_own_library(
    monkeypatch, tmp_path, name
):
    model = language(name)
    dense = outputs(model, WORDS)
    passed = shortened(monkeypatch, model, WORDS, "blocks:0.4")
    torch.testing.assert_close(outputs(model, WORDS), passed, rtol=1e-9, atol=1e-9)
    assert (passed - dense).abs().max() > 1e-6
    assert model.config.num_hidden_layers == 3
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    if "Mix" in name:
        again.set_experts_implementation("eager")
    torch.testing.assert_close(outputs(again, WORDS), passed, rtol=1e-6, atol=1e-6)
    assert again.generate(WORDS["input_ids"], max_new_tokens=3, do_sample=False).shape == (6, 15)


def images(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options).double().eval()
    pixels = torch.randn(4, 3, options["img_size"], options["img_size"], dtype=torch.float64)
    return model, {"images": pixels, "labels": torch.tensor([0, 1, 2, 3])}


def test_an_image_classifier_without_blocks_loads_by_timm(monkeypatch, tmp_path):
    model, batch = images("vit_tiny_patch16_224", img_size=32, depth=4)
    passed = shortened(monkeypatch, model, batch, "blocks:0.5")
    torch.testing.assert_close(outputs(model, batch), passed, rtol=1e-9, atol=1e-9)
    save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["depth"] == 2
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).double().eval()
    torch.testing.assert_close(outputs(again, batch), passed, rtol=1e-6, atol=1e-6)


def test_encoder_and_decoder_are_counted_by_settings_of_their_own():
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART.items()}
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64, d_model=16, max_position_embeddings=32, init_std=0.2, **sizes
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    batch = {"input_ids": WORDS["input_ids"] % 60 + 4, "labels": WORDS["input_ids"] % 60 + 4}
    gblm.prune(model, batch, methods.make("wanda"), "blocks:0.5")
    left = len(model.model.encoder.layers), len(model.model.decoder.layers)
    assert sum(left) == 4
    assert (model.config.encoder_layers, model.config.decoder_layers) == left


# The choice


def test_each_time_that_block_goes_without_which_the_loss_is_lowest():
    model = language("LlamaForCausalLM")
    walk = Walk.of(model, WORDS)
    depth = Depth.of(walk, patterns.parse("blocks:0.4"))
    layers, gone = [*model.model.layers], list[int]()
    with torch.no_grad():
        for _ in range(2):
            losses = {}
            for i in set(range(5)) - {*gone}:
                left = [own for j, own in enumerate(layers) if j not in {*gone, i}]
                model.model.layers = nn.ModuleList(left)
                losses[i] = float(model(**WORDS, labels=WORDS["input_ids"]).loss)
            model.model.layers = nn.ModuleList(layers)
            gone.append(min(losses, key=lambda i: losses[i]))
    depth.choose(walk, {})
    assert depth.gone == [f"model.layers.{i}" for i in gone]
    with depth.passing(depth.gone):
        assert mean_loss(walk) == pytest.approx(losses[gone[-1]])
    assert depth.renamed == {
        f"model.layers.{old}": f"model.layers.{new}"
        for new, old in enumerate(sorted({*range(5)} - {*gone}))
    }


@pytest.mark.parametrize("counts", [[40], [20, 20], [14, 13, 13]])
def test_all_processes_together_judge_by_the_same_samples(monkeypatch, llama, counts):
    ids, seen = torch.arange(40)[:, None].repeat(1, 4), list[int]()
    walk = Walk.of(llama, {"input_ids": ids})
    for rank, part in enumerate(ids.split(counts)):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "gathered", lambda value: counts)
        seen += some(replace(walk, batch={"input_ids": part})).batch["input_ids"][:, 0].tolist()
    assert seen == [*range(0, 40, 2)]


def test_a_block_that_gives_two_tensors_cannot_be_passed_by():
    x, other = torch.rand(2, 3), torch.rand(2, 3)
    bypass = bypass_of([None, x], (x + 1, None))
    assert bypass is not None
    assert bypass.of([None, other]) == (other, None)
    assert bypass_of([x], (x, x)) is None
    assert bypass_of([x[:1]], x) is None


def test_a_model_gets_its_blocks_back():
    model = language("LlamaForCausalLM")
    walk = Walk.of(model, WORDS)
    before, blocks, config = outputs(model, WORDS), [*model.model.layers], model.config
    depth = Depth.of(walk, patterns.parse("blocks:0.4"))
    depth.choose(walk, {})
    assert [*model.model.layers] == blocks
    depth.apply()
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    depth.undo()
    assert [*model.model.layers] == blocks
    assert model.config is config
    assert torch.equal(outputs(model, WORDS), before)


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "pattern", "words"),
    [
        ("vit_tiny_patch16_224", {"depth": 3}, "blocks:0.1", "removes none; use blocks:0.33"),
        ("vit_tiny_patch16_224", {"depth": 2}, "blocks:0.9", "leaves too few"),
        ("convnext_atto", {}, "blocks:0.5", "cannot state fewer blocks"),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "depths": (2, 4), "num_heads": (3, 6)},
            "blocks:0.17",
            "makes other blocks of those that stay",
        ),
    ],
)
def test_what_a_config_cannot_state_is_refused_and_nothing_changed(
    monkeypatch, name, options, pattern, words
):
    if "swin" in name:  # whose blocks shift their windows by turns
        monkeypatch.setattr(Depth, "_free", lambda self: ["layers.0.blocks.0"])
    given = {"img_size": 32} | options
    if "convnext" in name:
        del given["img_size"]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **given).eval()
    pixels = torch.randn(4, 3, *2 * [options.get("img_size", 32)])
    batch = {"images": pixels, "labels": torch.tensor([0, 1, 2, 3])}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gblm.GblmError, match=words):
        gblm.prune(model, batch, methods.make("magnitude"), pattern)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())


def test_blocks_that_share_positions_are_refused():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = dict.fromkeys(("input_ids", "decoder_input_ids", "labels"), WORDS["input_ids"])
    with pytest.raises(gblm.GblmError, match="no block that gives one tensor"):
        gblm.prune(model, batch, methods.make("wanda"), "blocks:0.5")


def test_units_that_could_not_go_afterwards_are_refused_before_any_block_goes(monkeypatch):
    monkeypatch.setattr(adapters, "narrows", lambda model: False)  # as of a class of its own
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        **{**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 3}
    )
    model = transformers.OPTForCausalLM(config).eval()
    with pytest.raises(gblm.GblmError, match=r"heads:0.5: the config of OPTForCausalLM cannot"):
        gblm.prune(model, WORDS, methods.make("wanda"), "blocks:0.34+heads:0.5")
    assert len(model.model.decoder.layers) == 3


# What becomes of the others


def test_a_score_leaves_the_other_blocks_as_they_were(llama, make_batch):
    before = [copy.deepcopy(own.state_dict()) for own in llama.model.layers]
    report = gblm.prune(llama, make_batch(), methods.make("wanda"), "blocks:0.34")
    gone = [linear.name for linear in report.linears if linear.sparsity]
    assert len(gone) == 7
    assert report.sparsity == pytest.approx(1 / 3)
    names = [name for name in report.blocks if not gone[0].startswith(f"{name}.")]
    for own, name in zip(llama.model.layers, names, strict=True):
        for key, value in own.state_dict().items():
            assert torch.equal(value, before[int(name[-1])][key])
    assert not report.masks()[gone[0]].any()


def test_best_refines_the_blocks_after_towards_the_dense_ones(make_llama, make_batch, monkeypatch):
    monkeypatch.setattr(Depth, "_free", lambda self: ["model.layers.1"])
    batch, errors = make_batch(16), []
    dense = outputs(make_llama(), batch)
    for refine in (0.0, 30.0):
        model = make_llama()
        first = copy.deepcopy(model.model.layers[0].state_dict())
        gblm.prune(model, batch, methods.make("best", refine=refine), "blocks:0.34")
        errors.append((outputs(model, batch) - dense).norm())
        left = model.model.layers[0].state_dict()
        assert all(torch.equal(own, left[name]) for name, own in first.items())
    assert errors[1] < 0.9 * errors[0]


def test_other_units_and_a_pattern_are_for_the_blocks_that_stay(llama, make_batch):
    assert patterns.parse("heads:0.5+blocks:0.34+2:4").name == "blocks:0.34+heads:0.5+2:4"
    report = gblm.prune(llama, make_batch(), methods.make("admm"), "blocks:0.34+neurons:0.25+2:4")
    assert llama.config.num_hidden_layers == 2
    assert llama.config.intermediate_size == 36
    for layer in llama.model.layers:
        weight = layer.mlp.down_proj.weight
        assert (weight.view(32, 9, 4) != 0).sum(dim=-1).eq(2).all()
    shares = sorted(own.sparsity for own in report.linears if "down_proj" in own.name)
    assert shares == [pytest.approx(1 - 0.75 / 2)] * 2 + [1]
    assert len(report.linears) == 3 * 7


def test_a_linear_that_is_left_out_stays_so_in_the_shorter_model(llama, make_batch):
    gblm.prune(
        llama,
        make_batch(),
        methods.make("wanda"),
        "blocks:0.34+2:4",
        exclude=["model.layers.2.*", "model.layers.*.mlp.up_proj"],
    )
    assert len(llama.model.layers) == 2
    assert llama.model.layers[1].mlp.down_proj.weight.all()
    assert llama.model.layers[0].mlp.up_proj.weight.all()
    assert not llama.model.layers[0].mlp.down_proj.weight.all()


def test_blocks_whose_linears_add_a_bias_can_be_distilled():
    model = language("GPT2LMHeadModel").float()
    before = outputs(model, WORDS)
    method = methods.make("best", refine=0.0, distill=1.0)
    gblm.prune(model, WORDS, method, "blocks:0.4")
    assert model.config.n_layer == 3
    assert outputs(model, WORDS).shape == before.shape


def test_a_run_that_is_resumed_gives_the_same_short_model(make_llama, make_batch, prune, tmp_path):
    method, key, found = methods.make("best"), {"run": "one"}, []
    for resume in (False, True):
        model = make_llama()
        journal = Journal(tmp_path / "run", key, resume)
        if resume:
            journal.finished.pop()
            journal.entries = journal.entries[: -len(journal.entries) // 3]
        prune(model, make_batch(), method, "blocks:0.34", journal=journal)
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    assert not any(".layers.2." in name for name in found[0])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


# The command


def test_the_command_writes_the_shorter_model_not_its_source(llm, tmp_path, capsys):
    flags = [flag.replace("--windows", "--evaluate-windows") for flag in llm[1:]]
    flags += ["--method", "wanda", "--sparsity", "blocks:0.5,blocks:0.5+neurons:0.25,0.5"]
    assert main([*flags, "--dry-run"]) == 0
    assert main([*flags, "--output", str(tmp_path / "out")]) == 0
    assert "parameters are left" in capsys.readouterr().out
    depths = []
    for folder in sorted((tmp_path / "out").iterdir()):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        depths.append((len(model.model.layers), model.config.intermediate_size))
        with safe_open(folder / "model.safetensors", "pt") as file:
            layers = {key.split(".")[2] for key in [*file.keys()] if ".layers." in key}
        assert len(layers) == depths[-1][0]
    assert sorted(depths) == [(1, 36), (1, 48), (2, 48)]


def test_timm_loads_what_the_command_writes(vit, tmp_path):
    flags = [*vit[1:], "--method", "best", "--sparsity", "blocks:0.5"]
    assert vit_main([*flags, "--output", str(tmp_path / "out")]) == 0
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert len(model.blocks) == 1
