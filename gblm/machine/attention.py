"""Attention in plain products, where a CPU is quicker with them than with the fused kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SCORES = 1 << 21  # at a time, which the caches of a CPU still hold

WRITES = {Tensor.__setitem__, Tensor.index_put_, Tensor.index_add_, Tensor.index_copy_}
WRITES |= {Tensor.index_put, Tensor.index_add, Tensor.index_copy, torch.index_add}
WRITES |= {Tensor.scatter_, Tensor.scatter_add_, Tensor.masked_scatter_}


class HalfProducts(TorchFunctionMode):
    """A context for autocast: attention of a CPU by plain products, and writes that cast.

    What is written into a tensor by index takes its dtype, for products are narrower there than the
    tensors that a model has made to hold them. Attention in bfloat16 on a CPU is
    softmax(QKᵀ·scale)V of some samples at a time, with scores in bfloat16. For short samples that
    takes two thirds of the time of torch's fused kernel, and with its backward one third. Samples
    with many scores, a mask that is not the causal one, dropout and other dtypes are left to torch.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WRITES and args[0].is_floating_point():
            args = tuple(
                x.to(args[0].dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
                for x in args
            )
        if func is F.scaled_dot_product_attention:
            output = _plain(*args, **kwargs)
            if output is not None:
                return output
        return func(*args, **kwargs)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return what `F.scaled_dot_product_attention` does with these arguments, None to let it."""
    device, half = query.device.type, torch.bfloat16
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    if device != "cpu" or dtype != half or query.ndim != 4 or attn_mask is not None or dropout_p:
        return None
    samples = SCORES // (query[0, ..., 0].numel() * key.shape[-2])  # at a time
    if not samples:
        return None
    query = query.to(half) * (query.shape[-1] ** -0.5 if scale is None else scale)
    key, value = key.to(half).transpose(-1, -2), value.to(half)
    if enable_gqa:
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    future = query.new_full((query.shape[-2], key.shape[-1]), -torch.inf).triu(1)
    outputs = []
    for q, k, v in zip(*(x.split(samples) for x in (query, key, value)), strict=True):
        scores = q @ k
        if is_causal:
            scores += future
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
