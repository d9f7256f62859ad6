"""How a model is called with samples, and called again from what its parts have given."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gblm.base import Batch

GRADIENT = "gradient_of_"  # by an embedding, in a batch: see `contrast.coupled`


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return what a model takes of a batch; ids of any whole number, as torch's embedding not.

    Patches of pictures stand one after the other where a model counts them by `image_grid_thw`.
    """
    inputs: dict[str, Any] = {
        name: value.long() if name.endswith("input_ids") else value
        for name, value in batch.items()
        if name != "labels" and not name.startswith(GRADIENT)
    }
    if "image_grid_thw" in batch:
        inputs["pixel_values"] = batch["pixel_values"].flatten(0, 1)
        inputs["image_grid_thw"] = batch["image_grid_thw"].view(-1, 3)
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters or any(own.kind is own.VAR_KEYWORD for own in parameters.values()):
        inputs["use_cache"] = False
    if "lengths" in parameters:  # XLM and FlauBERT: they fill a cache unasked, and count ids
        ids = inputs["input_ids"]
        inputs |= {"cache": _Passing(), "lengths": torch.full_like(ids[:, 0], ids.shape[1])}
    return inputs


class _Passing(DynamicCache):
    """A cache that keeps nothing, so that a block can run again."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *rest: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class _Replayed(dict):
    """The output of a base model: what it has given, and None for caches and attentions."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int | slice):
            return super().__getitem__(index)
        return tuple(self.values())[index]


@contextmanager
def replayed(given: Mapping[Any, dict[str, Tensor]]) -> Iterator[None]:
    """Let modules give these tensors instead of computing them."""
    with ExitStack() as stack:
        for module, tensors in given.items():
            stack.callback(restore, module, vars(module).get("forward"))
            module.forward = partial(_give, tensors)
        yield


def _give(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> _Replayed:
    return _Replayed(tensors)


def restore(module: Any, before: Any) -> None:
    """Give a module the forward back that it had of its own, None for that of its class."""
    del module.forward
    if before is not None:
        module.forward = before
