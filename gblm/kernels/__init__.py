"""GPU kernels in Triton, each beside its torch reference of the same signature.

They are a choice by device and shape: without them every result is the same but for rounding.
"""

import importlib.util

import torch
from torch import Tensor

# Products in 16 bits are where a kernel wins; those in fp32 are left to the vendor's library.
HALVES = (torch.bfloat16, torch.float16)


def usable(*tensors: Tensor) -> bool:
    """Say whether kernels can take these tensors: on a GPU, with Triton, of at most 32 bits."""
    return all(x.is_cuda and x.dtype in (torch.float32, *HALVES) for x in tensors) and bool(
        importlib.util.find_spec("triton")
    )


def precision(dtype: torch.dtype) -> str:
    """Return the input precision of products: fp32 as it is, unless the user allowed TF32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"
