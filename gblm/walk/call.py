"""A call of a block with one micro-batch, which can be had again, in pieces of some samples."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from gblm.machine.device import halved
from gblm.machine.placement import Placement
from gblm.walk.blocks import Block, Carried
from gblm.walk.coroutine import Scope
from gblm.walk.products import Products

Forward = Callable[..., Any]
Output = Any  # what a block gives: a tensor, or a tuple, list or dict with some


@dataclass
class Call:
    """One call of a block by the model's code, with the arguments of `samples` samples.

    carried: where each leaf of the arguments holds the samples. compute_dtype: of the products in a
    piece that is run with `half=True`. scope: where the model's code waits in this call.
    """

    block: Block
    forward: Forward
    leaves: list[Any]
    spec: TreeSpec
    samples: int
    scope: Scope
    placement: Placement
    compute_dtype: torch.dtype
    carried: list[Carried] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.carried:
            self.carried = [self._carries(i, leaf) for i, leaf in enumerate(self.leaves)]

    def pieces(self, step: int) -> Iterator[slice]:
        """Yield the slices of `step` samples, the last one shorter where it must be."""
        for start in range(0, self.samples, step):
            yield slice(start, min(start + step, self.samples))

    def arguments(self, piece: slice) -> list[Any]:
        """Return the leaves for the samples of one piece, on the device."""
        return [
            self.placement.wake(part(leaf, self.carried[i], piece, self.samples))
            if isinstance(leaf, Tensor)
            else leaf
            for i, leaf in enumerate(self.leaves)
        ]

    def run(self, leaves: list[Any], half: bool = False, watch: Products | None = None) -> Output:
        """Return what the block's own forward gives for these leaves.

        It runs with the context variables and the modes of the model's code around it. half:
        products are in the dtype of the walk, where that is narrower than the block's; what the
        block gives has its own, for the model's code goes on in that. watch: sees the products.
        """
        args, kwargs = tree_unflatten(leaves, self.spec)
        narrow = self.compute_dtype if half else torch.float32
        with (
            self.scope.inside() as context,
            watch or nullcontext(),
            halved(self.block.module, narrow),
        ):
            output = context.run(self.forward, *args, **kwargs)
        own = next(self.block.module.parameters()).dtype
        if own == torch.float32 != narrow:
            output = tree_map(lambda x: x.to(own) if _is(x, narrow) else x, output)
        return output

    def outputs(self, step: int, half: bool = False) -> Output:
        """Return the outputs for all samples, computed `step` samples at a time."""
        pieces = list(self.pieces(step))
        return self.joined([self.run(self.arguments(piece), half) for piece in pieces], pieces)

    def joined(self, outputs: list[Output], pieces: list[slice]) -> Output:
        """Return the outputs for all samples, from those of their pieces.

        What does not hold the samples stays as the first piece gave it.
        """
        if len(outputs) == 1:
            return outputs[0]
        leaves, spec = tree_flatten(outputs[0])
        others = [tree_flatten(output)[0] for output in outputs]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.ndim:
                at = place(self.block.outputs, i, leaf, pieces[0].stop)
                if at:
                    leaves[i] = torch.cat([leaf[i] for leaf in others], dim=at[0])
        return tree_unflatten(leaves, spec)

    def sample(self, index: int) -> "Call":
        """Return the call for one sample alone."""
        leaves = self.arguments(slice(index, index + 1))
        return replace(self, leaves=leaves, samples=1)

    def _carries(self, index: int, leaf: Any) -> Carried:
        if not isinstance(leaf, Tensor) or self.samples == 1:
            return None
        return place(self.block.arguments, index, leaf, self.samples)


def place(known: list[Carried], index: int, leaf: Tensor, samples: int) -> Carried:
    """Return where a leaf holds so many samples, by what the survey knows of it, None for nowhere.

    A leaf that the survey has not met holds them in its first dimension, if at all.
    """
    carried = known[index] if index < len(known) else None
    if carried and carried[0] < leaf.ndim and leaf.shape[carried[0]] % samples == 0:
        return carried[0], leaf.shape[carried[0]] // samples
    if index >= len(known) and leaf.ndim and len(leaf) == samples:
        return 0, 1
    return None


def part(leaf: Tensor, carried: Carried, piece: slice, samples: int) -> Tensor:
    """Return the part of a leaf that holds the samples of a piece."""
    if carried is None or piece.stop - piece.start == samples:
        return leaf
    dim, entries = carried
    return leaf.narrow(dim, piece.start * entries, (piece.stop - piece.start) * entries)


def first_differentiable(outputs: list[Any]) -> int | None:
    """Return which of a block's outputs, flattened, is the first that a gradient can reach."""
    reached = (i for i, x in enumerate(outputs) if isinstance(x, Tensor) and x.requires_grad)
    return next(reached, None)


def _is(leaf: Any, dtype: torch.dtype) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == dtype
