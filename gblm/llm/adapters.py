"""How the core sees a causal language model of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.integrations import moe

from gblm.base import Adapter, Batch, GblmError
from gblm.maths.stats import wide
from gblm.walk import products
from gblm.walk.products import valueless

# Experts where torch's own grouped product does not run; the module has registered it.
assert moe
products.FORMS[torch.ops.transformers.grouped_mm_fallback] = products.grouped


def adapter(model: nn.Module) -> Adapter:
    """Return the adapter of a causal language model: its blocks are found, not listed."""
    return Adapter(blocks, trunk, loss, unpad)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the list that holds most parameters, by name."""
    lists = [item for item in model.named_modules() if isinstance(item[1], nn.ModuleList)]
    # The outermost of equals: a list of one block holds as much as the lists within it.
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in lists]
    name, largest = lists[sizes.index(max(sizes))] if lists else ("", nn.ModuleList())
    return {f"{name}.{index}": block for index, block in largest.named_children()}


def unpad(batch: Batch) -> list[Batch] | None:
    """Return the windows of a batch one by one, cut to the tokens that `attention_mask` is 1 for.

    None where no token is masked. A window with a gap keeps the places of its tokens. Raises
    `GblmError` where a window holds no token.
    """
    mask = batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        return None
    windows = []
    for i, keep in enumerate(mask.bool()):
        places = keep.nonzero().flatten()
        if not len(places):
            raise GblmError(f"sample {i} of the batch holds no token but padding; remove it")
        window = {
            name: value[i : i + 1, keep] if value.shape[1:2] == keep.shape else value[i : i + 1]
            for name, value in batch.items()
            if name != "attention_mask"
        }
        if int(places[-1] - places[0]) >= len(places):
            window.setdefault("position_ids", places[None] - places[0])
        windows.append(window)
    return windows


def trunk(model: nn.Module, batch: Batch) -> Tensor:
    """Return what the head takes: the base model's last hidden state `[n, t, hidden]`."""
    hidden: Tensor = _base(model)(**_inputs(batch), use_cache=False).last_hidden_state
    return hidden


def loss(model: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
    """Return the mean loss `[n]` of every window over its targets, from the hidden state."""
    with _replay(_base(model), hidden):
        logits = model(**_inputs(batch), use_cache=False).logits
    return window_loss(logits, batch.get("labels", batch["input_ids"]))


def window_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss `[n]` of windows from logits `[n, t, vocabulary]`.

    labels: `[n, t]`, each the target of the position before it; −100 is none.
    """
    targets = labels[:, 1:].long()
    inputs = wide(logits[:, :-1].flatten(0, 1)), targets.flatten()
    losses = cross_entropy(*inputs, ignore_index=-100, reduction="none").view(len(labels), -1)
    counts = (targets != -100).sum(dim=1)
    if valueless(targets) or (counts == targets.shape[1]).all():
        return losses.mean(dim=1)
    return losses.sum(dim=1) / counts


def _inputs(batch: Batch) -> Batch:
    """Return what the model takes of a batch; ids of any whole number, as torch's embedding not."""
    return {
        name: value.long() if name == "input_ids" else value
        for name, value in batch.items()
        if name != "labels"
    }


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
