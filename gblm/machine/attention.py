"""Attention in plain products, where a CPU is quicker with them than with the fused kernel."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SCORES = 1 << 18  # at a time, which the caches of a CPU still hold
ROWS = 128  # queries at a time, where no gradient is wanted: those before them see fewer keys

WRITES = {Tensor.__setitem__, Tensor.index_put_, Tensor.index_add_, Tensor.index_copy_}
WRITES |= {Tensor.index_put, Tensor.index_add, Tensor.index_copy, torch.index_add}
WRITES |= {Tensor.scatter_, Tensor.scatter_add_, Tensor.masked_scatter_}
FILLS = {Tensor.masked_fill, Tensor.masked_fill_, torch.masked_fill}


class HalfProducts(TorchFunctionMode):
    """A context for products in 16 bits: attention of a CPU by plain ones, and writes that cast.

    What is written into a tensor by index takes its dtype, and a number that fills it becomes the
    nearest that it can hold, for under autocast products are narrower than a model expects.
    Attention in bfloat16 on a CPU is softmax(QKᵀ·scale)V of some heads at a time, with scores in
    bfloat16. For samples of up to 512 positions that takes 0.6 to 0.9 of the time of torch's fused
    kernel, and half with its backward; for causal ones of up to 2048 without gradients two thirds.
    Longer samples, a mask that is not the causal one, dropout and other dtypes are left to torch.
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
        if func in FILLS and args[0].is_floating_point() and isinstance(args[-1], float):
            most = math.inf if math.isinf(args[-1]) else torch.finfo(args[0].dtype).max
            args = (*args[:-1], min(max(args[-1], -most), most))
        if func is F.scaled_dot_product_attention:
            with suppress(TypeError):  # of an argument that only torch knows
                output = _Attention(*args, **kwargs).plain()
                if output is not None:
                    return output
        return func(*args, **kwargs)


@dataclass
class _Attention:
    """The arguments of `F.scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def plain(self) -> Tensor | None:
        """Return the attention by plain products, None to leave it to torch."""
        query, key, half = self.query, self.key, torch.bfloat16
        if query.device.type != "cpu" or query.ndim != 4:
            return None
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else query.dtype
        if dtype != half or self.attn_mask is not None or self.dropout_p:
            return None
        positions, keys = query.shape[-2], key.shape[-2]
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, self.value))
        rows = min(ROWS, positions) if self.is_causal and not learns else positions
        if rows * keys > SCORES:
            return None
        query = query.to(half) * (query.shape[-1] ** -0.5 if self.scale is None else self.scale)
        key, value = key.to(half).transpose(-1, -2), self.value.to(half)
        if self.enable_gqa:
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        future = query.new_full((rows, rows), -torch.inf).triu(1) if self.is_causal else None
        parts = (x.flatten(0, 1).split(SCORES // (rows * keys)) for x in (query, key, value))
        outputs = [_of_heads(q, k, v, future) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outputs).unflatten(0, query.shape[:2])


def _of_heads(query: Tensor, key: Tensor, value: Tensor, future: Tensor | None) -> Tensor:
    """Return the attention of some heads, some queries at a time by the keys that they see.

    future: −Inf where a key is behind a query, for so many of both; None where all see all.
    """
    if future is None:
        return (query @ key).softmax(-1) @ value
    outputs, rows = [], len(future)
    for start in range(0, query.shape[1], rows):
        stop = start + rows
        scores = query[:, start:stop] @ key[..., :stop]
        last = scores[..., start:]
        last += future[: last.shape[1], : last.shape[2]]
        outputs.append(scores.softmax(-1) @ value[:, :stop])
    return torch.cat(outputs, dim=1)
