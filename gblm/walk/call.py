"""A call of a block over the whole batch, which can be had in pieces of some samples."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gblm.machine.device import free_memory
from gblm.walk.survey import Block

Forward = Callable[..., Any]


@dataclass
class Call:
    """One call of a block over the whole batch, which can be had in pieces of some samples."""

    forward: Forward
    leaves: list[Any]
    spec: TreeSpec
    carries: list[
        int
    ]  # leading entries per sample of each leaf; 0 where it is no matter of samples
    samples: int
    wanted: list[bool] = field(default_factory=list)  # the leaves whose gradient is wanted
    device: torch.device | None = None  # of the block
    spill: Path | None = None  # a folder for outputs that fit nowhere else

    @classmethod
    def of(
        cls,
        block: Block,
        forward: Forward,
        samples: int,
        args: tuple,
        kwargs: dict,
        spill: Path | None = None,
    ) -> "Call":
        device = next((own.device for own in block.module.parameters()), None)
        leaves, spec = tree_flatten((args, kwargs))
        carries = [0] * len(leaves)
        # Against the run of one sample: what grew with the number of samples carries them.
        if samples > 1:
            for i, (leaf, one) in enumerate(zip(leaves, block.leading, strict=True)):
                if one is not None and len(leaf) == samples * one:
                    carries[i] = one
        return cls(forward, leaves, spec, carries, samples, device=device, spill=spill)

    def pieces(self, step: int) -> Iterator[slice]:
        """Yield the slices of `step` samples, the last one shorter where it must be."""
        for start in range(0, self.samples, step):
            yield slice(start, min(start + step, self.samples))

    def part(self, index: int, piece: slice) -> slice:
        """Return where the samples of a piece stand in the leaf of that index."""
        carried = self.carries[index]
        return slice(piece.start * carried, piece.stop * carried) if carried else slice(None)

    def arguments(self, piece: slice) -> list[Any]:
        """Return the leaves for the samples of one piece, on the device of the block."""
        return [
            leaf[self.part(i, piece)].to(self.device or leaf.device) if self.carries[i] else leaf
            for i, leaf in enumerate(self.leaves)
        ]

    def halves(self) -> tuple["Call", "Call"]:
        """Return the calls for the first and for the last half of the samples."""
        half = self.samples // 2
        calls = []
        for piece in (slice(0, half), slice(half, 2 * half)):
            leaves = [
                leaf[self.part(i, piece)] if self.carries[i] else leaf
                for i, leaf in enumerate(self.leaves)
            ]
            calls.append(replace(self, leaves=leaves, samples=half))
        return calls[0], calls[1]

    def some(self, chosen: Tensor) -> "Call":
        """Return the call for the chosen samples alone, by their numbers."""
        leaves = [
            leaf.unflatten(0, (self.samples, carried))[chosen.to(leaf.device)].flatten(0, 1)
            if carried
            else leaf
            for leaf, carried in zip(self.leaves, self.carries, strict=True)
        ]
        return replace(self, leaves=leaves, samples=len(chosen))

    def run(self, leaves: list[Any]) -> Any:
        """Return what the block's own forward gives for these leaves."""
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.forward(*args, **kwargs)

    def outputs(self, step: int) -> Any:
        """Return the outputs for the whole batch, computed in micro-batches."""
        return self.joined(step, (self.run(self.arguments(piece)) for piece in self.pieces(step)))

    def joined(self, step: int, outputs: Iterable[Any]) -> Any:
        """Return the outputs for the whole batch, from those of its pieces.

        What is not a tensor with the samples first stays as the first micro-batch gave it.
        """
        joined: list[Any] = []
        spec = None
        for piece, output in zip(self.pieces(step), outputs, strict=True):
            parts, spec = tree_flatten(output)
            if piece.stop - piece.start == self.samples:
                return tree_unflatten(parts, spec)
            if not joined:
                joined = [self._room(part, piece.stop - piece.start) for part in parts]
            for whole, part in zip(joined, parts, strict=True):
                if isinstance(part, Tensor) and part.ndim:
                    carried = len(part) // (piece.stop - piece.start)
                    whole[piece.start * carried : piece.stop * carried] = part
        assert spec is not None
        return tree_unflatten(joined, spec)

    def _room(self, part: Any, samples: int) -> Any:
        """Return an empty tensor for all samples, where a part holds some of them."""
        if not isinstance(part, Tensor) or not part.ndim:
            return part
        shape = (len(part) // samples * self.samples, *part.shape[1:])
        return room(part, shape, self.spill)


def made(outputs: list[Any]) -> int | None:
    """Return which of a block's outputs, flattened, is the first that a gradient can reach."""
    reached = (i for i, x in enumerate(outputs) if isinstance(x, Tensor) and x.requires_grad)
    return next(reached, None)


def twice(first: Any, last: Any, spill: Path | None) -> Any:
    """Return the outputs of all samples, from those of both halves."""
    parts, spec = tree_flatten(first)
    joined = []
    for one, other in zip(parts, tree_flatten(last)[0], strict=True):
        whole = other
        if isinstance(one, Tensor) and one.ndim:
            whole = room(one, (2 * len(one), *one.shape[1:]), spill)
            whole[: len(one)], whole[len(one) :] = one, other
        joined.append(whole)
    return tree_unflatten(joined, spec)


def room(like: Tensor, shape: tuple[int, ...], spill: Path | None = None) -> Tensor:
    """Return an empty tensor for outputs of a block, as near to it as there is room.

    That is on the device where it takes at most a quarter of the free memory; else in main memory,
    pinned for a GPU; else, given a folder, in a file there that goes with the tensor.
    """
    size = math.prod(shape) * like.element_size()
    if size <= free_memory(like.device) / 4:
        return like.new_empty(shape)
    cuda = like.device.type == "cuda"
    if spill is None or size <= free_memory(torch.device("cpu")) / 4:
        return torch.empty(shape, dtype=like.dtype, pin_memory=cuda)
    with tempfile.NamedTemporaryFile(dir=spill, prefix="stream-") as file:
        file.truncate(size)
        found = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=like.dtype)
    return found.view(shape)
