"""Checkpoints that hold experts one by one, or under other names, are read and written as such."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import gblm
from gblm import methods
from gblm.llm.checkpoint import Checkpoint
from gblm.llm.models import load_offloaded, save

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def mixtral() -> transformers.PreTrainedModel:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES))


def qwen3_moe() -> transformers.PreTrainedModel:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES))


def llava() -> transformers.PreTrainedModel:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_index=3,
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    torch.manual_seed(0)
    model = request.param()
    with torch.no_grad():
        for own in model.parameters():
            own.normal_(0, 0.2)
    model.half().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("source", [mixtral, qwen3_moe, llava], indirect=True)
def test_a_run_from_disk_gives_the_bytes_of_one_in_memory(source, tmp_path):
    ids = torch.randint(4, 64, (6, 8), generator=torch.Generator().manual_seed(0))
    results, checkpoint = {}, Checkpoint(str(source))
    device = torch.device("cpu")
    for kind in ("none", "disk"):
        (tmp_path / f"work-{kind}").mkdir()
        model, offload = load_offloaded(
            checkpoint, kind, tmp_path / f"work-{kind}", device, "float32"
        )
        assert (offload is not None) == (kind == "disk")
        report = gblm.prune(
            model, {"input_ids": ids}, methods.make("gblm"), "2:4", backward="blocks"
        )
        assert report.weights
        save(model, transformers.BertTokenizer(vocab={"a": 0}), tmp_path / kind, checkpoint)
        results[kind] = load_file(tmp_path / kind / "model.safetensors")
        if offload:
            offload.close()
    dense = load_file(source / "model.safetensors")
    assert results["none"].keys() == results["disk"].keys() == dense.keys()
    assert all(torch.equal(results["none"][name], own) for name, own in results["disk"].items())
    experts = [name for name in dense if ".experts.0." in name or "mlp.down_proj" in name]
    assert experts
    for name in experts:
        assert ((results["disk"][name] == 0).sum() - (dense[name] == 0).sum()) > 0, name


@pytest.mark.parametrize("source", [mixtral], indirect=True)
def test_an_expert_of_another_shape_is_named(source, tmp_path):
    config = transformers.MixtralConfig.from_pretrained(source)
    config.intermediate_size = 32
    config.save_pretrained(source)
    with pytest.raises(gblm.GblmError, match=r"experts\.gate_up_proj is .* by config\.json"):
        load_offloaded(Checkpoint(str(source)), "disk", tmp_path, torch.device("cpu"), "auto")
