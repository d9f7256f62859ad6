"""Experts whose statistics are those of all tokens, whichever are sent to them."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import gblm
from gblm import GblmError, methods
from gblm.llm.__main__ import main
from gblm.llm.adapters import adapter
from gblm.maths.patterns import parse
from gblm.methods import solve
from gblm.report import Report
from gblm.walk.blocks import Block
from gblm.walk.gradients import sweep
from gblm.walk.journal import Journal
from gblm.walk.prune import Pruning
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "initializer_range": 0.2,
}
SAMPLES, LENGTH = 6, 8
IDS = torch.randint(64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


def qwen() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).eval()


def gpt_oss() -> GptOssForCausalLM:
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**SIZES)).eval()


def grams(model: torch.nn.Module, experts: str) -> dict[str, Tensor]:
    """Return the Gram matrix of the inputs of every linear of a dense model."""
    found: dict[str, Tensor] = {}

    def collect(visit: Visit) -> None:
        for groups in visit.inputs(frozenset({"input_gram"})):
            for inputs in groups:
                names = [linear.name for linear in inputs.group]
                found.update(dict.fromkeys(names, inputs.statistics["input_gram"]))

    forward(Walk.of(model, {"input_ids": IDS}, adapter(model, experts)), collect)
    return found


def test_statistics_are_of_all_tokens_and_the_model_goes_its_own_way():
    model = qwen()
    inputs: list[Tensor] = []
    with torch.no_grad():
        hooks = [
            layer.mlp.experts.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
            for layer in model.model.layers
        ]
        model(input_ids=IDS)
        for hook in hooks:
            hook.remove()
    found, routed = grams(model, "all"), grams(model, "routed")
    for i, (layer, x) in enumerate(zip(model.model.layers, inputs, strict=True)):
        experts, name = layer.mlp.experts, f"model.layers.{i}.mlp.experts"
        for e in range(4):
            gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
            h = silu(gate) * up
            torch.testing.assert_close(found[f"{name}.gate_up_proj[{e}]"], x.T @ x)
            torch.testing.assert_close(found[f"{name}.down_proj[{e}]"], h.T @ h)
    for name, gram in routed.items():
        same = torch.allclose(found[name], gram, rtol=1e-4, atol=1e-6)
        assert same != (".experts." in name), name


def prune(make, method: str, experts: str) -> Report:
    model = make()
    batch = {"input_ids": IDS}
    given = {"adapter": adapter(model, experts), "backward": "blocks"}
    return gblm.prune(model, batch, methods.make(method), "0.5/row", **given)


@pytest.mark.parametrize("method", ["gblm", "best"])
@pytest.mark.parametrize("make", [qwen, gpt_oss])
def test_every_expert_has_all_inputs(make, method):
    report = prune(make, method, "all")
    experts = [linear for linear in report.linears if ".experts." in linear.name]
    assert experts
    assert {linear.positions for linear in experts} == {SAMPLES * LENGTH}
    assert not any(linear.note for linear in experts)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_experts_with_few_inputs_are_lent_those_of_their_layer(monkeypatch):
    # Each token goes to one expert: together they see what `--experts all` shows to each.
    monkeypatch.setattr(solve, "FEWEST", SAMPLES * LENGTH)
    masks = []
    for experts in ("routed", "all"):
        model = qwen()
        given = {"adapter": adapter(model, experts)}
        report = gblm.prune(model, {"input_ids": IDS}, methods.wanda(), "0.5", **given)
        masks.append(model.model.layers[0].mlp.experts.gate_up_proj == 0)
        lent = [linear for linear in report.linears if linear.note]
        assert len(lent) == (16 if experts == "routed" else 0)
        assert all(f"for it has {linear.positions}" in linear.note for linear in lent)
    assert torch.equal(*masks)


def test_a_model_without_experts_is_refused(make_llama):
    with pytest.raises(GblmError, match="no experts that all tokens could be sent to"):
        adapter(make_llama(), "all")


class Cut(Exception):
    """Planted between two blocks."""


class CutJournal(Journal):
    """A journal whose run is cut off after the first block."""

    def finish(self, block: Block) -> None:
        super().finish(block)
        raise Cut


@pytest.mark.parametrize("experts", ["routed", "all"])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(experts, tmp_path):
    method, pattern = methods.make("best", refine=0), parse("2:4")

    def run(journal: Journal | None) -> dict[str, Tensor]:
        model = qwen()
        walk = Walk.of(model, {"input_ids": IDS}, adapter(model, experts))
        pruning = Pruning(walk, method, pattern, journal=journal)
        pruning.gradients = sweep(walk, pruning.needs)[0]
        pruning.run()
        return model.state_dict()

    with pytest.raises(Cut):
        run(CutJournal(tmp_path, {}, resume=False))
    resumed, whole = run(Journal(tmp_path, {}, resume=True)), run(None)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_run_of_other_statistics_is_not_gone_on_with(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "moe")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | {"vocab_size": 256})).save_pretrained(
        tmp_path / "moe"
    )
    (tmp_path / "notes.txt").write_text("words " * 200)
    command = ["--model", str(tmp_path / "moe"), "--samples", "4"]
    command += ["--calibration", str(tmp_path / "notes.txt")]
    command += ["--length", "16", "--method", "wanda", "--sparsity", "0.5"]
    command += ["--work-dir", str(tmp_path / "work")]
    assert main([*command, "--experts", "all"]) == 0
    assert main([*command, "--resume"]) == 2
    assert "another experts" in capsys.readouterr().err
    assert main([*command, "--experts", "all", "--dry-run"]) == 0
