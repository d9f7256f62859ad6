"""GPU kernels in Triton, each beside its torch reference of the same signature.

They are a choice by device and shape: without them every result is the same but for rounding.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Products in 16 bits are where a kernel wins; those in fp32 are left to the vendor's library.
HALVES = (torch.bfloat16, torch.float16)


def usable(*tensors: Tensor) -> bool:
    """Say whether kernels can take these tensors: on a GPU, with Triton, of at most 32 bits."""
    return all(x.is_cuda and x.dtype in (torch.float32, *HALVES) for x in tensors) and bool(
        importlib.util.find_spec("triton")
    )


def tuned(configs: list[Any], keys: list[str], sums: list[str]) -> Callable[[Any], Any]:
    """Return a decorator by which a kernel is run as is quickest on this device: `triton.autotune`.

    keys: the arguments for which that is found out anew. sums: those a kernel adds to, which trials
    must leave as they were. The interpreter, where nothing is quick, takes the first.
    """
    import triton

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return triton.autotune(configs[:1] if interpreted else configs, keys, restore_value=sums)


def precision(dtype: torch.dtype) -> str:
    """Return the input precision of products: fp32 as it is, unless the user allowed TF32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"
