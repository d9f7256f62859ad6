"""The device: which one, what it is quick with, what memory it has left."""

import logging
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import nn

from gblm.base import GblmError, one_of
from gblm.machine import processes
from gblm.machine.attention import HalfProducts

log = logging.getLogger(__name__)

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
CPU_PRODUCTS = {  # what a CPU has that multiplies in a dtype of 16 bits, by torch's names
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "amx_tile", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def find_device(device: str | torch.device) -> torch.device:
    """Return the device, the GPU where there is one for "auto"; raises `GblmError` for none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise GblmError(f"device {device} is not there ({reason}); use cpu, cuda or auto") from None
    return torch.device(device)


def described(device: torch.device) -> str:
    """Return what a device is, in words."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}"


def find_dtype(
    dtype: str, device: torch.device, stored: Callable[[], torch.dtype | None]
) -> torch.dtype | None:
    """Return the dtype of that name; for "auto" None, that is as stored, where the device has it.

    A CPU without products in 16 bits is many times slower with them than in float32, which "auto"
    then gives: see `has_products`. `stored()` is the dtype of the checkpoint.
    Raises `GblmError` for an unknown name.
    """
    one_of(dtype, ["auto", *DTYPES], "dtype")
    if dtype != "auto" or device.type != "cpu":
        return DTYPES.get(dtype)
    kept = stored()
    return torch.float32 if kept in CPU_PRODUCTS and not has_products(device, kept) else None


def find_compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of products in fp32 blocks; "auto" is bfloat16 where a device has those."""
    one_of(dtype, COMPUTE_DTYPES, "compute dtype")
    if dtype == "auto":
        return torch.bfloat16 if has_products(device, torch.bfloat16) else torch.float32
    return DTYPES[dtype]


@cache
def has_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a device multiplies in a dtype of 16 bits, by what it is; process 0 decides."""
    if device.type == "cuda":
        able = dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = device.type == "cpu" and any(map(_cpu_has, CPU_PRODUCTS[dtype]))
    return processes.gathered(able)[0]


def _cpu_has(name: str) -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get(name))
    return bool(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)())  # before torch 2.9


@contextmanager
def halved(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Have products of an fp32 module in a narrower dtype for a time, and attention made for it."""
    parameter = next(module.parameters())
    if parameter.dtype == torch.float32 and dtype != torch.float32:
        # Without the cache, for weights change in between.
        with torch.autocast(parameter.device.type, dtype, cache_enabled=False), HalfProducts():
            yield
    elif parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu":
        with HalfProducts():
            yield
    else:
        yield


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Have products in the dtype of their operands, all of its bits: no autocast, no TF32."""
    backends: Any = torch.backends
    precision, backend_precisions = "highest", {}
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the backends alone
        products = (backends.cuda.matmul, backends.mkldnn.matmul)
        backend_precisions = {backend: backend.fp32_precision for backend in products}
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for backend, before in backend_precisions.items():
            backend.fp32_precision = before


@dataclass
class BatchSize:
    """How many samples a block sees at a time; with `auto`, halved when memory runs out."""

    samples: int
    auto: bool = False

    def run(self, work: Callable[[int], T], undo: Callable[[], None] = lambda: None) -> T:
        """Return `work(samples)`, begun anew with half as many while memory does not suffice.

        undo: takes back what the work had done until then. Raises `GblmError` where a single
        sample, or the size the user fixed, is too much.
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
            undo()
            self.samples //= 2
            log.info("out of memory; on with micro-batches of %d", self.samples)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn what a lack of memory raises into a `GblmError`, where no smaller micro-batch helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        way = "a smaller --micro-batch, shorter samples, --offload, a higher `ulimit -v`"
        raise GblmError(f"out of memory; use {way}, or another device") from error


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a device, or the machine, has no memory left."""
    texts = (
        "can't allocate memory",
        "cannot allocate memory",
        "not enough memory",
        "out of memory",
    )
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(text in str(error).lower() for text in texts)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, those that torch holds unused among them."""
    if device.type in ("cpu", "mps", "meta"):
        return psutil.virtual_memory().available
    module = torch.get_device_module(device)
    held = module.memory_reserved(device) - module.memory_allocated(device)
    return module.mem_get_info(device)[0] + held


def resident() -> int:
    """Return the bytes of main memory that this process takes now."""
    return psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew: for a GPU, and for the main memory of Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes taken since `reset_peak`: on a GPU by its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if peak := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(peak[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
