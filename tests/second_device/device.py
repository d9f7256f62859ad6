"""The second device, as torch knows it: `load()` builds it, once per machine, and names it.

    load()
    model.to("second")                  # RuntimeError where tensors meet that lie elsewhere
    torch.second.mem_get_info()         # and what else torch.cuda tells of memory
    torch.second.set_limit(2**20)       # torch.OutOfMemoryError beyond so many bytes
    torch.second.plant(7)               # and once in the seventh allocation from now
    torch.second.report_free(1000)      # what mem_get_info says is free, whatever is

Every operator works, by the kernels of the CPU, and so does autograd. The name is torch's for the
whole process, and backward must not have run before in it: see conftest.py.
"""

import contextlib
import fcntl
import hashlib
import os
import sys
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "second"
SOURCE = Path(__file__).with_name("device.cpp")
AMPLE = 2**36  # bytes: more than any test takes


class Memory:
    """The memory of the device: what torch.cuda tells of one, and ways to let it run out."""

    def __init__(self) -> None:
        self.ops = torch.ops.second_device
        self.reset()

    def reset(self) -> None:
        """Have ample memory again."""
        self.set_limit(AMPLE)
        self.plant(0, 0)
        self.free: int | None = None
        self.ops.reset_peak()

    def set_limit(self, size: int) -> None:
        """Let the device have `size` bytes in all."""
        self.ops.set_limit(size)

    def plant(self, number: int, count: int = 1) -> None:
        """Count allocations from here; let `count` of them fail, from that number (1, 2, …) on."""
        self.ops.plant(number, count)

    def report_free(self, size: int) -> None:
        """Let `mem_get_info` say that `size` bytes are free, whatever is taken."""
        self.free = size

    def allocations(self) -> int:
        """Return the number of allocations since the last `plant`."""
        return self.ops.allocations()

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        """Return the free and all bytes."""
        total = self.ops.limit()
        return total - self.ops.allocated() if self.free is None else self.free, total

    def memory_allocated(self, device: object = None) -> int:
        return self.ops.allocated()

    memory_reserved = memory_allocated  # nothing is held that is free

    def max_memory_allocated(self, device: object = None) -> int:
        return self.ops.peak()

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: object = None) -> None:
        self.ops.reset_peak()

    def empty_cache(self) -> None:
        """Do nothing: see `memory_reserved`."""


def load() -> None:
    """Give torch the device `second`; the first time on a machine it is built, in half a minute.

    Raises what the compiler says where there is none, or it fails.
    """
    if hasattr(torch, NAME):
        return
    _build()
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    memory = Memory()
    for name in dir(memory):
        if not name.startswith("_"):
            setattr(module, name, getattr(memory, name))
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.device = lambda device: contextlib.nullcontext()  # the only one is always current
    module.is_available = module.is_initialized = lambda: True
    module.is_bf16_supported = lambda including_emulation=True: including_emulation
    module.synchronize = lambda device=None: None
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module._is_in_bad_fork = lambda: False
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.Tensor.data = property(torch._C.TensorBase.data.__get__, _set_data)


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Let `tensor.data = value` take a value from another device, as torch does with a GPU's."""
    if tensor.device != value.device:
        # torch asks whether the tensors are of one kind, and counts CPU and CUDA alone as one.
        other = value.detach().requires_grad_(tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter):
            other = torch.nn.Parameter(other, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, other)
    else:
        torch._C.TensorBase.data.__set__(tensor, value)


def _build() -> None:
    """Build the extension in a cache folder of this torch and this source, and load it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gblm-tests"
    key = hashlib.sha256(f"{torch.__version__} {sys.version}".encode() + SOURCE.read_bytes())
    folder = cache / f"second-device-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    # ninja stands beside the interpreter, which need not be on the path.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with (folder / "ours").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)  # torch's, left by a build that was killed
        cpp_extension.load(
            "second_device",
            [str(SOURCE)],
            extra_cflags=["-O1"],
            build_directory=str(folder),
            is_python_module=False,
        )
