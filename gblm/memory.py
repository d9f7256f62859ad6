"""Memory: how much is free, and micro-batches that shrink until they fit."""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

from gblm.base import GblmError

T = TypeVar("T")


@dataclass
class MicroBatch:
    """How many samples a block sees at a time; with `auto`, halved when memory runs out."""

    samples: int
    auto: bool = False

    def run(self, work: Callable[[int], T]) -> T:
        """Return `work(samples)`, begun anew with half as many while memory does not suffice.

        Raises `GblmError` where a single sample, or the size the user fixed, is too much.
        """
        while True:
            try:
                return work(self.samples)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if not self.auto or self.samples == 1:
                    raise GblmError(
                        f"out of memory with micro-batches of {self.samples}; use a smaller "
                        "--micro-batch, shorter samples or another device"
                    ) from error
            self.samples = self.samples // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a device, or the machine, has no memory left."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(text in str(error).lower() for text in texts)


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process so far, in bytes: on a GPU that of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
