"""What one sample tells of a model that need have no values: its blocks, operations and bytes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gblm.base import Adapter, Batch, GblmError
from gblm.walk.blocks import Block, Linear, frozen, hooked
from gblm.walk.gradients import activations
from gblm.walk.survey import survey


@dataclass
class Footprint:
    """What one sample tells of a model; bytes and operations are those of a sample.

    weights, numbers: the bytes and the count of the parameters. sample: bytes of the input.
    stream: of a block's input. kept: of what a backward pass of the blocks keeps, and of the head.
    trunk, head: operations of a forward pass.

    Of a run: samples, how many it prunes with; micro, how many go together; keep, the seconds of
    choosing a mask, for each weight.
    """

    blocks: list[Block]
    weights: int
    numbers: int
    sample: int
    stream: int
    kept: int
    kept_head: int
    trunk: int
    head: int
    samples: int = 1
    micro: int = 1
    keep: float = 0.0

    @property
    def linears(self) -> list[Linear]:
        return [linear for block in self.blocks for linear in block.linears]

    @property
    def widest(self) -> int:
        """The bytes of the largest input of a linear."""
        return max(linear.positions * linear.shape[1] * 4 for linear in self.linears)


def footprint(model: nn.Module, one: Batch, adapter: Adapter) -> Footprint:
    """Return what a batch of one sample tells of a model."""
    from torch.utils.flop_counter import FlopCounterMode

    blocks = survey(model, one, adapter)
    stream = _Stream()
    hooks = [b.module.register_forward_pre_hook(stream.enter, with_kwargs=True) for b in blocks]
    counter = FlopCounterMode(display=False)
    kept = kept_head = 0
    with suppress(GblmError):  # of a model that has no loss
        one = adapter.coupled(model, one)
        with frozen(model), torch.no_grad(), hooked(hooks), counter:
            hidden = adapter.trunk(model, one)
            trunk = counter.get_total_flops()
            adapter.loss(model, hidden, one)
        with frozen(model), torch.enable_grad():
            kept, kept_head = activations(model, one, adapter, blocks)
    parameters = list(model.parameters())
    return Footprint(
        blocks,
        weights=sum(own.nbytes for own in parameters),
        numbers=sum(own.numel() for own in parameters),
        sample=sum(value.nbytes for value in one.values()),
        stream=stream.most,
        kept=kept,
        kept_head=kept_head,
        trunk=trunk,
        head=counter.get_total_flops() - trunk,
    )


class _Stream:
    """Notes the most bytes that a block is called with."""

    most = 0

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        leaves = tree_flatten((args, kwargs))[0]
        sizes = [leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        self.most = max(self.most, *sizes, 0)
