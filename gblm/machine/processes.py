"""Several processes, as torchrun starts them, each with its share of the samples; alone, no-ops.

Every process holds the whole model and draws the whole calibration batch; statistics are sums, so
that one all-reduce gives every process those of all samples.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gblm.base import Batch, GblmError, Statistics

T = TypeVar("T")


def world() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this one is, from 0."""
    return dist.get_rank() if world() > 1 else 0


@contextmanager
def launched(device: str) -> Iterator[str]:
    """Join the processes that torchrun has started, and give the device of this one.

    They talk by NCCL on GPUs, by gloo on CPUs. Without torchrun nothing happens.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2 or "RANK" not in os.environ:
        yield device
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    try:
        yield device
        dist.barrier()  # nobody leaves while others still need its connections
    finally:
        dist.destroy_process_group()


def share(batch: Batch) -> Batch:
    """Return this process's share of the samples of a batch, of equal size but for one sample.

    Raises `GblmError` where there are fewer samples than processes.
    """
    samples, count = len(next(iter(batch.values()))), world()
    if samples < count:
        raise GblmError(
            f"{samples} samples cannot be shared by {count} processes; use more --samples"
        )
    return {name: value[part(samples)] for name, value in batch.items()} if count > 1 else batch


def part(samples: int) -> slice:
    """Return which of so many samples are this process's, of equal number but for one."""
    each, more = divmod(samples, world())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over all processes, by one all-reduce for each dtype."""
    if world() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.all_reduce(flat)
        for tensor, total in zip(alike, flat.split([x.numel() for x in alike]), strict=True):
            tensor.copy_(total.view_as(tensor))


def add_statistics(statistics: list[Statistics]) -> None:
    """Make statistics those of the samples of all processes."""
    add_up(tensor for each in statistics for tensor in each.sums.values())
    counts = gathered([(each.samples, each.positions, each.differentiated) for each in statistics])
    for each, of_processes in zip(statistics, zip(*counts, strict=True), strict=True):
        totals = map(sum, zip(*of_processes, strict=True))
        each.samples, each.positions, each.differentiated = totals


def sent(value: Tensor, source: int) -> Tensor:
    """Return what `value` is in the process `source`; it has one shape and dtype in all."""
    if world() > 1:
        value = value.contiguous()
        dist.broadcast(value.view(torch.uint8), source)  # gloo does not know every dtype
    return value


def gathered(value: T) -> list[T]:
    """Return the values of all processes, in their order."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Wait until all processes have come here."""
    if world() > 1:
        dist.barrier()


def agree(what: str, value: object) -> None:
    """Raise `GblmError` where a value is not the same in all processes."""
    values = gathered(value)
    if other := [i for i, theirs in enumerate(values) if theirs != values[0]]:
        raise GblmError(
            f"{what} of process {other[0]} is not that of process 0; check that all processes "
            "have the same files, packages and devices"
        )
