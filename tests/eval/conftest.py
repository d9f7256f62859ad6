"""A tiny random language model and classifier on disk, as the scripts of eval/ take them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))  # as where a script runs


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a LLaMA of two blocks with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("llm")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that pruning shows in the perplexity
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    text = folder / "notes.txt"
    text.write_text("".join(f"line {i} of the notes, {i * i}\n" for i in range(400)))
    sources = ["--calibration", str(text), "--evaluate", str(text)]
    sizes = ["--samples", "6", "--length", "16", "--windows", "8", "--device", "cpu"]
    return ["llm", "--model", str(folder / "tiny"), *sources, *sizes]


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a ViT of two blocks and three classes with twelve noisy pictures."""
    folder = tmp_path_factory.mktemp("vit")
    draw = np.random.default_rng(0)
    for index in range(12):
        (folder / "images" / f"class{index % 3}").mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"class{index % 3}" / f"{index}.png")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    timm.models.save_for_hf(model, folder / "tiny", model_args=sizes, safe_serialization=True)
    sources = ["--calibration", str(folder / "images"), "--evaluate", str(folder / "images")]
    return ["vit", "--model", str(folder / "tiny"), *sources, "--samples", "8", "--device", "cpu"]
