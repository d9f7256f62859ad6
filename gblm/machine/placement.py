"""Where tensors live: the one owner of what is on the device, in main memory, or in a file.

What is handed to a model's code is on the device. What rests meanwhile lies where there is room.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from gblm.machine.device import free_memory

PART = 4  # what rests takes at most one part in so many of the free memory
CPU = torch.device("cpu")


class Placement:
    """Puts tensors to rest on the device, in main memory (pinned for a GPU) or in a file.

    folder: for the files; None to do without, as where the weights have room on the device.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.device, self.folder = device, folder
        self.place = "device"

    def plan(self, size: int, to_file: bool = False) -> None:
        """Choose where the next tensors rest, `size` bytes in all: as near as there is room.

        to_file: in the folder in any case, where there is one.
        """
        if to_file and self.folder:
            self.place = "file"
        elif size <= free_memory(self.device) / PART:
            self.place = "device"
        elif self.folder and size > free_memory(CPU) / PART:
            self.place = "file"
        else:
            self.place = "memory"

    def rest(self, x: Tensor) -> Tensor:
        if self.place == "device" or (self.place == "memory" and x.device == CPU):
            return x
        if self.place == "file" and self.folder:
            return _in_file(x, self.folder)
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x)

    def wake(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)


def _in_file(x: Tensor, folder: Path) -> Tensor:
    """Return the tensor as a mapping of a file, which goes when nobody holds the tensor."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="rest-") as file:
        file.write(x.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        mapped = torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype)
    return mapped.view(x.shape)
