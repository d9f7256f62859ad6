"""Small models and batches that the tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

VOCABULARY = 64


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a random LLaMA of three blocks with grouped-query attention, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that the samples differ in more than rounding
    )
    model = LlamaForCausalLM(config).eval()
    if dtype == torch.float64:  # the norm of transformers computes in fp32 whatever the model is
        for name, module in list(model.named_modules()):
            if isinstance(module, LlamaRMSNorm):
                model.set_submodule(name, nn.RMSNorm(32, eps=module.variance_epsilon))
    return model.to(dtype)


def random_batch(samples: int = 7, length: int = 12) -> dict[str, Tensor]:
    """Return random windows `input_ids [samples, length]`, the same every time."""
    ids = torch.randint(
        VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(samples)
    )
    return {"input_ids": ids}


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., nn.Module]:
    return tiny_llama


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, Tensor]]:
    return random_batch


@pytest.fixture
def llama() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def llama64() -> nn.Module:
    return tiny_llama(torch.float64)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return random_batch()


@pytest.fixture(scope="session")
def assets() -> Path:
    """Return the folder of real models and data, which the environment names."""
    folder = os.environ.get("GBLM_ASSETS")
    if not folder:
        pytest.skip("GBLM_ASSETS is not set")
    return Path(folder)
