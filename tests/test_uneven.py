"""Widths that no config states: layers share a budget, and what is written loads without gblm."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import gblm
from gblm import llm, methods, vit
from gblm.llm.__main__ import main
from gblm.maths import patterns
from gblm.maths.allocation import cheapest
from gblm.vit.__main__ import main as vit_main
from gblm.walk.journal import Journal
from gblm.walk.narrow import Narrowing
from gblm.walk.walk import Walk
from tests.forked import ended, start

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BOTH = "neurons:0.3/uneven+heads:0.4/uneven"
WORDS = {"input_ids": torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(0))}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 1}
LANGUAGE: dict[str, tuple[dict[str, Any], str]] = {
    "LlamaForCausalLM": ({**SIZES, "num_key_value_heads": 2}, BOTH),
    "GPT2LMHeadModel": ({**GPT2, "bos_token_id": 0}, "heads:0.5"),
    "OPTForCausalLM": ({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, BOTH),
    "GPTNeoXForCausalLM": (SIZES, BOTH),
    "MixtralForCausalLM": (
        {**SIZES, "num_key_value_heads": 2, "num_local_experts": 3, "intermediate_size": 64},
        BOTH,
    ),
}
IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 3}, "neurons:0.25/uneven+heads:0.34"),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "ls_init_value": 1.0}, "neurons:0.25"),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 28, "depths": (1, 1), "num_heads": (3, 6)},
        "neurons:0.25/uneven",
    ),
}
LOAD = {
    "transformers": "from transformers import AutoModelForCausalLM as Auto; "
    "model = Auto.from_pretrained(FOLDER, trust_remote_code=True).eval()",
    "timm": "import runpy; model = runpy.run_path(FOLDER + '/narrowed.py')['load']()",
}


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    given: Any = model(batch.get("input_ids", batch.get("images")))
    return given if isinstance(given, Tensor) else given.logits


def pruned(monkeypatch, model: nn.Module, batch: dict[str, Tensor], pattern: str) -> Tensor:
    """Prune a copy in float64, where what is narrow is what is zero; then the model itself."""
    wide: list[Tensor] = []
    apply = Narrowing.apply

    def watched(self: Narrowing) -> None:
        if self.model is exact:
            wide.append(outputs(self.model, double))
        apply(self)

    monkeypatch.setattr(Narrowing, "apply", watched)
    exact: Any = copy.deepcopy(model).double()
    double = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    if "Mix" in type(model).__name__:  # torch's grouped product has no float64
        exact.set_experts_implementation("eager")
    dense = outputs(exact, double)
    report = gblm.prune(exact, double, methods.make("wanda"), pattern)
    assert report.left == sum(own.numel() for own in exact.parameters()) < report.parameters
    torch.testing.assert_close(outputs(exact, double), wide[0], rtol=1e-9, atol=1e-9)
    assert (wide[0] - dense).abs().max() > 1e-6
    gblm.prune(model, batch, methods.make("wanda"), pattern)
    return outputs(model, batch)


def loaded_elsewhere(folder: Path, batch: dict[str, Tensor], kind: str) -> Tensor:
    """Return what the model in a folder gives in a process that has no gblm."""
    given = next(value for name, value in batch.items() if name in ("input_ids", "images"))
    torch.save(given, folder.parent / "given.pt")
    code = (
        f"import sys, torch; FOLDER = {str(folder)!r}; torch.set_num_threads(1)\n"
        f"{LOAD[kind]}\n"
        f"given = torch.load({str(folder.parent / 'given.pt')!r})\n"
        "with torch.no_grad():\n    out = model(given)\n"
        "assert not any(name.partition('.')[0] == 'gblm' for name in sys.modules)\n"
        f"torch.save(getattr(out, 'logits', out), {str(folder.parent / 'out.pt')!r})"
    )
    process = start(code, [], folder.parent / "said")
    assert ended(process) == 0, (folder.parent / "said").read_text()
    found: Tensor = torch.load(folder.parent / "out.pt")
    return found


def mostly_slow(names: Iterable[str], quick: str) -> list[Any]:
    """Return parameters of which all but one are slow: each starts a process of its own."""
    return [x if x == quick else pytest.param(x, marks=pytest.mark.slow) for x in names]


@pytest.mark.parametrize("name", mostly_slow(LANGUAGE, "GPT2LMHeadModel"))
def test_a_language_model_loads_elsewhere_as_it_is_and_is_the_zeroed_one(
    monkeypatch, tmp_path, name
):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**LANGUAGE[name][0])).eval()
    narrow = pruned(monkeypatch, model, WORDS, LANGUAGE[name][1])
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    llm.models.write_widths(model, folder, "AutoModelForCausalLM")
    assert torch.equal(loaded_elsewhere(folder, WORDS, "transformers"), narrow)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(again).__name__ == name
    again.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    ).eval()
    assert torch.equal(outputs(again, WORDS), narrow)
    assert again.generate(WORDS["input_ids"], max_new_tokens=3, do_sample=False).shape[0] == 6
    with pytest.raises(Exception, match="size"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_classifier_loads_elsewhere_as_it_is_and_is_the_zeroed_one(
    monkeypatch, tmp_path, name
):
    torch.manual_seed(0)
    options, pattern = IMAGES[name]
    model = timm.create_model(name, num_classes=10, **options).eval()
    size = options.get("img_size", 32)
    images = torch.randn(4, 3, size, size)
    batch = {"images": images, "labels": torch.tensor([0, 1, 2, 3])}
    narrow = pruned(monkeypatch, model, batch, pattern)
    vit.models.save(model, tmp_path / "model")
    assert torch.equal(loaded_elsewhere(tmp_path / "model", batch, "timm"), narrow)
    again = vit.load(str(tmp_path / "model"))
    assert torch.equal(outputs(again, batch), narrow)
    sketched = vit.models.sketch(str(tmp_path / "model"))
    assert [own.shape for own in sketched.parameters()] == [own.shape for own in again.parameters()]


# The budget


def test_layers_keep_what_costs_most_by_the_gradients(make_llama, make_batch):
    model, batch = make_llama(), make_batch(16)
    with torch.no_grad():
        for own in model.model.layers[1].mlp.parameters():
            own.mul_(1e-3)  # it hardly counts
    gblm.prune(model, batch, methods.make("wanda"), "neurons:0.25/uneven")
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert min(widths) == widths[1] < max(widths)
    assert sum(widths) == pytest.approx(0.75 * 48 * 3, abs=3)
    assert model.config.intermediate_size == 48  # what the loader begins with


def test_the_shares_are_those_of_one_threshold_on_the_loss_per_weight():
    draw = torch.Generator().manual_seed(0)
    curves = [torch.rand(n, generator=draw).double().sort().values for n in (12, 12, 24)]
    curves[1] *= 3
    sizes = [120, 120, 240]
    shares = cheapest(curves, sizes, 0.5, 1.0)
    gone = [round(share * len(own)) for share, own in zip(shares, curves, strict=True)]
    assert sum(10 * n for n in gone) == 240
    dropped = max(float(own[n - 1]) for own, n in zip(curves, gone, strict=True) if n)
    assert all(
        float(own[n]) >= dropped for own, n in zip(curves, gone, strict=True) if n < len(own)
    )


@pytest.mark.parametrize("method", ["magnitude", "wanda+repair", "best"])
def test_methods_share_a_budget(llama, make_batch, method):
    report = gblm.prune(llama, make_batch(), methods.make(method), "neurons:0.25/uneven+2:4")
    assert "gradient" in report.allocation
    for layer in llama.model.layers:
        weight = layer.mlp.down_proj.weight
        assert weight.shape[1] == layer.mlp.up_proj.weight.shape[0]


def test_what_is_uneven_can_be_pruned_again_and_given_back(llama, make_batch):
    batch = make_batch()
    gblm.prune(llama, batch, methods.make("wanda"), "neurons:0.25/uneven")
    before, stated = outputs(llama, batch), copy.deepcopy(llama.narrowed)
    narrowing = Narrowing.of(Walk.of(llama, batch), patterns.parse("heads:0.5"))
    narrowing.apply()
    assert llama.narrowed.items() >= stated.items()
    assert llama.model.layers[0].self_attn.o_proj.in_features == 16
    narrowing.undo()
    assert llama.narrowed == stated
    assert torch.equal(outputs(llama, batch), before)


def test_blocks_do_not_go_from_what_is_uneven(llama, make_batch):
    gblm.prune(llama, make_batch(), methods.make("wanda"), "neurons:0.25/uneven")
    with pytest.raises(gblm.GblmError, match="remove blocks first"):
        gblm.prune(llama, make_batch(), methods.make("wanda"), "blocks:0.34")


def test_a_pattern_says_that_it_is_uneven():
    assert patterns.parse("heads:0.5+2:4", uneven=True).name == "heads:0.5/uneven+2:4"
    own = patterns.parse("blocks:0.5+neurons:0.25/uneven")
    assert not own.uneven
    assert own.then is not None
    assert own.then.uneven
    assert patterns.parse(own.name).name == own.name == "blocks:0.5+neurons:0.25/uneven"


@pytest.mark.parametrize("pattern", [BOTH, "mlps:0.34"])
def test_a_run_that_is_resumed_gives_the_same_model(
    make_llama, make_batch, prune, tmp_path, pattern
):
    found = []
    for resume in (False, True):
        model = make_llama()
        journal = Journal(tmp_path / "run", {"run": "one"}, resume)
        if resume:
            journal.finished.pop()
            journal.entries = journal.entries[: -len(journal.entries) // 3]
        prune(model, make_batch(), methods.make("best"), pattern, journal=journal)
        found.append((model.narrowed, model.state_dict()))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value)


# The command


@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_the_command_writes_what_loads_by_code_beside_it(llm, tmp_path, offload):
    flags = [flag.replace("--windows", "--evaluate-windows") for flag in llm[1:]]
    flags += ["--method", "best", "--sparsity", "neurons:0.25", "--uneven", "--offload", offload]
    assert main([*flags, "--output", str(tmp_path / "out")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    )
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert sum(widths) < 48 * len(widths)
    flags[flags.index("--model") + 1] = str(tmp_path / "out")
    flags[flags.index("neurons:0.25")] = "2:4"
    flags.remove("--uneven")
    assert main([*flags, "--trust-remote-code", "--output", str(tmp_path / "again")]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    )
    assert [layer.mlp.up_proj.out_features for layer in again.model.layers] == widths
    assert (again.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5


def test_the_command_writes_a_narrower_attention(vit, tmp_path):
    flags = [*vit[1:], "--method", "wanda", "--sparsity", "heads:0.34"]
    assert vit_main([*flags, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "narrowed.py").is_file()
    assert "runpy" in (tmp_path / "out" / "README.md").read_text()
