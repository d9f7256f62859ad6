"""How quick a whole model is before and after pruning, and what it takes on disk and in memory."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gblm.base import GblmError
from gblm.machine.device import free_memory
from gblm.machine.speed import take_turns
from gblm.report.wording import size

SECONDS = 0.3  # of each model at each use


def dense_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model as it is, to be measured beside the pruned one.

    Raises `GblmError` where the device has no room for it.
    """
    device, taken = next(model.parameters()).device, weight_bytes(model)
    if taken > free_memory(device):
        raise GblmError(
            f"--measure speed needs {size(taken)} for the dense model beside the pruned one, and "
            f"{size(free_memory(device))} are free on {device}; do without it"
        )
    return copy.deepcopy(model)


def weight_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of parameters and buffers, those that are floating as if in a dtype."""
    tensors = {id(own): own for own in (*model.parameters(), *model.buffers())}.values()
    return sum(
        part.numel() * (dtype if dtype and part.is_floating_point() else part.dtype).itemsize
        for own in tensors
        for part in parts(own)
    )


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that hold one of another layout, such as semi-structured; else itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


@torch.no_grad()
def speed(
    dense: nn.Module,
    pruned: nn.Module,
    uses: Callable[[nn.Module], dict[str, Callable[[], Any]]],
    dtype: torch.dtype,
) -> dict[str, dict[str, Any]]:
    """Return the seconds of every use of the dense and the pruned model, which take turns.

    Beside them stand the bytes of the file, in the dtype of the checkpoint, and those of memory:
    the weights, and the most that any of the uses holds beside them.
    """
    device = next(dense.parameters()).device
    models = {"dense": dense, "pruned": pruned}
    by_model = [uses(model) for model in models.values()]
    entries: dict[str, dict[str, Any]] = {}
    held = dict.fromkeys(models, 0)
    for name in by_model[0]:
        taken = take_turns([own[name] for own in by_model], device, SECONDS)
        entries[name] = {"unit": "s"}
        for model, own in zip(models, taken, strict=True):
            entries[name][model] = own.seconds
            held[model] = max(held[model], own.memory)
    entries["memory"] = {"unit": "B"} | {
        name: weight_bytes(model) + held[name] for name, model in models.items()
    }
    entries["file"] = {"unit": "B"} | {
        name: weight_bytes(model, dtype) for name, model in models.items()
    }
    return entries
