"""The walk: all micro-batches go through the model together, from block to block.

Nothing here knows what a model computes. Its own code runs once for every micro-batch, each run a
coroutine that waits wherever it calls a block. When all have come to a block, the walk works on it
with all of their calls; then each takes its outputs and goes on to the next. So a block is at work
once, on all samples, and the model's code between blocks sees one micro-batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gblm.base import Adapter, Batch, GblmError
from gblm.machine import processes
from gblm.machine.device import BatchSize, find_compute_dtype
from gblm.machine.offload import placeholder, unhooked
from gblm.machine.placement import Placement
from gblm.walk.blocks import Block, MicroBatch, check_samples, micro_batches, size, to_device
from gblm.walk.call import Call, Forward, Output
from gblm.walk.coroutine import Coroutine, wait
from gblm.walk.survey import find_adapter, survey

# A micro-batch of about this many positions keeps a CPU's caches and a GPU's cores busy.
POSITIONS = {"cpu": 2048}
GPU_POSITIONS = 32768

Progress = Callable[[str, int, int], None]  # phase, done, of how many


def no_progress(phase: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass
class Walk:
    """A model, its blocks, and the samples on their way through them.

    batch: this process's share of the calibration samples. micro: how many go together.
    compute_dtype: of products where narrower ones do, float32 for none.
    """

    model: nn.Module
    adapter: Adapter
    blocks: list[Block]
    batch: Batch
    micro: BatchSize
    placement: Placement
    compute_dtype: torch.dtype = torch.float32
    progress: Progress = field(default=no_progress)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Batch,
        adapter: Adapter | None = None,
        *,
        blocks: list[Block] | None = None,
        micro_batch: int | None = None,
        folder: Path | None = None,
    ) -> Walk:
        """Return the walk of a calibration batch through a model.

        adapter: that of the model's library where None. blocks: what `survey` has given, where it
        has been asked. micro_batch: samples that go together, None to choose. folder: for what
        fits neither on the device nor in main memory.

        Raises `GblmError` where the batch is empty or the model cannot be pruned.
        """
        check_samples(batch)
        adapter = adapter or find_adapter(model)
        blocks = blocks or survey(model, batch, adapter)
        device = next(model.parameters()).device
        batch = processes.share(batch)
        micro = micro_batch_for(blocks, size(batch), micro_batch, device)
        dtype = find_compute_dtype("auto", device)
        return cls(model, adapter, blocks, batch, micro, Placement(device, folder), dtype)

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def samples(self) -> int:
        """The number of samples of this process."""
        return size(self.batch)

    def micro_batches(self) -> list[MicroBatch]:
        """Return the samples as they go together, without padding, where they rest."""
        return micro_batches(self.batch, self.micro.samples, self.adapter)

    @contextmanager
    def runs(self, streams: int = 1, to_file: bool = False) -> Iterator[list[list[Run]]]:
        """Give, for each stream, a run of the model for every micro-batch.

        They wait at the first block. The model's blocks wait wherever they are called, until the
        end. to_file: what rests does so in the folder, where there is one.
        """
        parts = self.micro_batches()
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(unhooked(block.module))
                stack.callback(_restore(block.module))
                block.module.forward = _WaitingForward(block, block.module.forward)
            runs = [[Run(self, part, to_file) for part in parts] for _ in range(streams)]
            runs[0][0].plans = len(parts) * streams
            for run in (run for stream in runs for run in stream):
                stack.callback(run.coroutine.close)
                run.go_on()
            yield runs


@dataclass
class _WaitingForward:
    """The forward of a block during a walk: it waits until the walk has its outputs."""

    block: Block
    forward: Forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return wait(_BlockCall(self.block, self.forward, args, kwargs))


@dataclass
class _BlockCall:
    block: Block
    forward: Forward
    args: tuple
    kwargs: dict[str, Any]


class Run:
    """A run of the model on one micro-batch: `call` is where it waits, `hidden` what it gives.

    numbers: of its samples in the batch. plans: for how many runs this one plans where tensors
    rest, 0 where another does.
    """

    plans = 0

    def __init__(self, walk: Walk, part: MicroBatch, to_file: bool) -> None:
        self.walk, self.to_file = walk, to_file
        self.batch, self.numbers = part.batch, part.numbers
        self.coroutine = Coroutine(self._work, walk.device)
        self.call: Call | None = None
        self.hidden: Any = None
        self.away: list[tuple[Tensor, Tensor]] = []  # tensors of the model's code, and their rest

    def _work(self) -> Any:
        self.batch = to_device(self.batch, self.walk.device)
        return self.walk.adapter.trunk(self.walk.model, self.batch)

    def at(self, block: Block) -> Call:
        """Return the call of a block that it waits in; raises `GblmError` where it does not."""
        if self.call is None or self.call.block is not block:
            where = self.call.block.name if self.call else "the end"
            raise GblmError(
                f"some samples come to {where} where others come to {block.name}; a model that "
                "chooses its blocks by the sample cannot be pruned"
            )
        return self.call

    def go_on(self, outputs: Output = None) -> None:
        """Go on with the outputs of the block it waits in, to the next block or to the end.

        What it was called with is on the device again meanwhile, and rests once it waits.
        """
        for tensor, rest in self.away:
            tensor.data = self.walk.placement.wake(rest)
        self.call, self.away = None, []
        event = self.coroutine.switch(outputs)
        if isinstance(event, _BlockCall):
            self.call = self._arrive(event)
        else:
            self.hidden = event

    def _arrive(self, arrival: _BlockCall) -> Call:
        """Return the call that the run waits in, its samples at rest."""
        leaves, spec = tree_flatten((arrival.args, arrival.kwargs))
        known = arrival.block.arguments
        carried = {
            id(leaf): leaf
            for leaf, place in zip(leaves, known, strict=False)
            if place and isinstance(leaf, Tensor)
        }
        placement = self.walk.placement
        if self.plans:
            bytes_of_all = self.plans * sum(leaf.nbytes for leaf in carried.values())
            placement.plan(bytes_of_all, self.to_file)
        rests = {key: placement.rest(leaf.detach()) for key, leaf in carried.items()}
        if placement.place != "device":
            for key, leaf in carried.items():
                self.away.append((leaf, rests[key]))
                leaf.data = placeholder(leaf.shape, leaf.dtype, leaf.device)
            leaves = [rests.get(id(leaf), leaf) for leaf in leaves]
        return Call(
            arrival.block,
            arrival.forward,
            leaves,
            spec,
            size(self.batch),
            self.coroutine.scope(),
            placement,
            self.walk.compute_dtype,
        )


def _restore(module: nn.Module) -> Callable[[], None]:
    """Return what gives a module the forward back that it has now."""
    before = vars(module).get("forward")

    def restore() -> None:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before

    return restore


def micro_batch_for(
    blocks: list[Block], samples: int, fixed: int | None, device: torch.device
) -> BatchSize:
    """Return the micro-batch the user fixed, None for one of about `POSITIONS` positions.

    It is one sample where a block is called with what cannot be cut into samples.
    """
    if fixed is not None and fixed < 1:
        raise GblmError(f"micro-batches of {fixed} samples are none; use 1 or more, or auto")
    if any(block.uncut for block in blocks):  # several samples could not be taken apart again
        return BatchSize(1)
    if fixed is not None:
        return BatchSize(fixed)
    most = POSITIONS.get(device.type, GPU_POSITIONS)
    positions = max(linear.positions for block in blocks for linear in block.linears)
    # Processes that begin anew by themselves would wait for each other in different places.
    return BatchSize(max(1, min(samples, most // positions)), auto=processes.world() == 1)
