"""How quick a device is, and what work costs on it."""

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from gblm.machine.device import peak_memory, reset_peak

# The part of the measured rate that a model reaches, what stands between its products included.
EFFICIENCY = 0.8


@dataclass
class Machine:
    """How quick a device is: operations and bytes a second, and the seconds of a small call."""

    device: torch.device
    operations: float
    bytes: float
    call: float


def measure(device: torch.device, dtype: torch.dtype, width: int, least: float = 0.05) -> Machine:
    """Measure a device for about three times `least` seconds, by products of that width."""
    width = min(width, 2048)
    x = torch.ones(1024, width, dtype=dtype, device=device)
    w = torch.ones(width, width, dtype=dtype, device=device)
    large = torch.ones(2**22, device=device)
    small = torch.ones(8, device=device)
    return Machine(
        device,
        operations=2 * 1024 * width * width / seconds(lambda: x @ w, device, least),
        bytes=3 * large.nbytes / seconds(lambda: large.add_(large), device, least),
        call=seconds(lambda: small.add_(small), device, least),
    )


def seconds(work: Callable[[], Any], device: torch.device, least: float) -> float:
    """Return the seconds of the quickest call, of as many as take `least` of them."""
    calls: list[float] = []
    work()
    while sum(calls) < least:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        calls.append(time.perf_counter() - start)
    return min(calls)


@dataclass
class Taken:
    """What a work takes: seconds of its quickest call, bytes held beside what was there before."""

    seconds: float = math.inf
    memory: int = 0


def take_turns(
    works: Sequence[Callable[[], Any]], device: torch.device, least: float
) -> list[Taken]:
    """Return what works take that are called in turns, at least three times and `least` seconds.

    So a machine that slows down slows them all. Of a single thread on a CPU those seconds count in
    which it works, whatever else the machine does.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    taken = [Taken() for _ in works]
    for work, own in zip(works, taken, strict=True):
        work()
        with suppress(OSError, AttributeError):  # another C library: what was freed goes back
            ctypes.CDLL(None).malloc_trim(0)
        reset_peak(device)
        before = peak_memory(device)
        work()
        own.memory = peak_memory(device) - before
    rounds, spent = 0, 0.0
    while rounds < 3 or spent < least * len(works):
        for work, own in zip(works, taken, strict=True):
            start = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            call = clock() - start
            own.seconds, spent = min(own.seconds, call), spent + call
        rounds += 1
    return taken


@dataclass
class Cost:
    """Operations of matrix products, bytes read or written, small calls, other seconds, memory.

    memory: bytes that the work holds at its peak; that of two works is the larger.
    """

    operations: float = 0
    bytes: float = 0
    calls: float = 0
    seconds: float = 0
    memory: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.operations + other.operations,
            self.bytes + other.bytes,
            self.calls + other.calls,
            self.seconds + other.seconds,
            max(self.memory, other.memory),
        )

    def on(self, machine: Machine) -> float:
        """Return the seconds on a machine."""
        products = self.operations / (machine.operations * EFFICIENCY)
        return products + self.bytes / machine.bytes + self.calls * machine.call + self.seconds
