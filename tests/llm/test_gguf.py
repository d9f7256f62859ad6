"""A model in GGUF is dequantised; its result is an ordinary folder of safetensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

from gblm.llm import checkpoint
from gblm.llm.__main__ import main

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def file(llm: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA in GGUF, its matrices in 8 bits, its tokenizer with a merge."""
    path, model = tmp_path_factory.mktemp("gguf") / "tiny.gguf", LlamaForCausalLM.from_pretrained
    dense = model(llm[llm.index("--model") + 1])
    tokens = json.loads((Path(llm[llm.index("--model") + 1]) / "tokenizer.json").read_text())
    words = [*tokens["model"]["vocab"]]
    words[-1] = "li"
    writer, eight = gguf.GGUFWriter(path, "llama"), gguf.GGMLQuantizationType.Q8_0
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(256)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["l i"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, own in dense.named_parameters():
        place, numbers = name.removesuffix(".weight"), own.detach().numpy()
        if place.startswith("model.layers."):
            _, _, layer, place = place.split(".", 3)
            place = f"blk.{layer}.{NAMES[place]}.weight"
        else:
            place = f"{NAMES[place]}.weight"
        if numbers.ndim == 2 and not numbers.shape[1] % 32:
            writer.add_tensor(place, gguf.quants.quantize(numbers, eight), raw_dtype=eight)
        else:
            writer.add_tensor(place, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def command(llm: list[str], model: Path, *more: str) -> int:
    sizes = ["--calibration", llm[llm.index("--calibration") + 1], "--samples", "4"]
    return main(["--model", str(model), *sizes, "--length", "16", "--method", "wanda", *more])


def test_the_result_of_a_gguf_is_an_ordinary_folder(
    llm: list[str], file: Path, tmp_path: Path, capsys
):
    output = tmp_path / "pruned"
    assert command(llm, file, "--output", str(output)) == 0
    said = capsys.readouterr().out
    assert "tiny.gguf was dequantised: the result is a folder of safetensors in float32" in said
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    whole, given = GgufConfig(dequantize=True), {"gguf_file": file.name}
    dense = AutoModelForCausalLM.from_pretrained(
        file.parent, **given, quantization_config=whole
    ).state_dict()
    pruned = load_file(output / "model.safetensors")
    assert pruned.keys() == dense.keys()
    for name, own in pruned.items():
        kept = own == dense[name]
        assert (kept | (own == 0)).all(), name
        if "_proj" in name:
            assert (own == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        else:
            assert kept.all()
    ids = [
        AutoTokenizer.from_pretrained(place, **more)("a line of text").input_ids
        for place, more in ((file.parent, given), (output, {}))
    ]
    assert ids[0] == ids[1]
    assert torch.isfinite(
        AutoModelForCausalLM.from_pretrained(output)(torch.tensor([ids[0]])).logits
    ).all()


def test_what_cannot_be_read_is_refused(
    llm: list[str], file: Path, tmp_path: Path, capsys, monkeypatch
):
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    refused = {
        tmp_path / "bad.gguf": "cannot be loaded",
        tmp_path / "none.gguf": "no such file",
        file.parent: f"has no config.json; name {file}",
    }
    for model, message in refused.items():
        assert command(llm, model) == 2
        assert message in capsys.readouterr().err
    assert command(llm, file, "--offload", "disk") == 2
    assert "no safetensors to be read block by block; --offload cpu" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    assert command(llm, file) == 2
    assert "pip install 'gblm[gguf]'" in capsys.readouterr().err
