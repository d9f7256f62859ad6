"""How the core sees a causal language model of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gblm.base import LINEAR, Adapter, Batch, GblmError, Kind
from gblm.maths.stats import wide

CONV1D = Kind(lambda module: module.get_parameter("weight").T)


def adapter(model: nn.Module) -> Adapter:
    """Return the adapter of a causal language model: its blocks are found, not listed."""
    return Adapter(blocks, trunk, loss, kind)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the list that holds most parameters, by name."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    if not lists:
        return {}
    # The outermost of equals: a list of one block holds as much as the lists within it.
    name = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return {f"{name}.{index}": block for index, block in enumerate(lists[name])}


def kind(module: nn.Module) -> Kind | None:
    """See `nn.Linear` as it is and the Conv1D of GPT-2 by its transpose."""
    if isinstance(module, nn.Linear):
        return LINEAR
    return CONV1D if isinstance(module, Conv1D) else None


def trunk(model: nn.Module, batch: Batch) -> Tensor:
    """Return what the head takes: the base model's last hidden state `[n, t, hidden]`."""
    hidden: Tensor = _base(model)(**batch, use_cache=False).last_hidden_state
    return hidden


def loss(model: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
    """Return the mean loss `[n]` of every window over its t − 1 targets, from the hidden state."""
    with _replay(_base(model), hidden):
        logits = model(**batch, use_cache=False).logits
    return window_loss(logits, batch["input_ids"])


def window_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Return the mean loss `[n]` of windows `input_ids [n, t]` from logits `[n, t, vocabulary]`."""
    losses = cross_entropy(
        wide(logits[:, :-1].flatten(0, 1)), input_ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(input_ids), -1).mean(dim=1)


def _base(model: nn.Module) -> nn.Module:
    assert isinstance(model, PreTrainedModel)
    if model.base_model is model:
        raise GblmError(f"{type(model).__name__} has no head; load a causal language model")
    # What the head calls: that of OPT passes its base model by and calls the decoder within.
    decoder: nn.Module = model.get_decoder()
    return decoder


@contextmanager
def _replay(base: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let the base model give this hidden state instead of computing it."""

    class Replayed(dict):
        last_hidden_state = hidden

        def __getattr__(self, name: str) -> None:  # no cache, no attentions
            return None

        def __getitem__(self, index: Any) -> Any:
            return hidden if index == 0 else super().__getitem__(index)

    before = vars(base).get("forward")
    base.forward = lambda *args, **kwargs: Replayed()
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before
