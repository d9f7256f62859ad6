"""The loss of every sample from a language model's logits."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, pad

from gblm.base import Batch, GblmError
from gblm.llm.heads import REGRESSION, SEVERAL, problem
from gblm.maths import logits as maths
from gblm.maths.logits import NONE
from gblm.maths.stats import wide
from gblm.walk.products import valueless

# Heads whose label stands at the position of its logits; that of others is one before.
IN_PLACE = ("ForMaskedLM", "ForTokenClassification", "ForPreTraining")


def losses(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean loss `[n]` of every sample from a model's logits: see `loss`."""
    labels = batch.get("labels")
    if logits.ndim == 2:
        return class_loss(model, wide(logits), labels)
    if not in_place(model):
        labels = batch["input_ids"] if labels is None else labels
        if logits.shape[1] > labels.shape[1]:  # a slice of all would cost a copy backward
            logits = logits[:, -labels.shape[1] :]
        return window_loss(logits, labels)
    if labels is None:
        if not type(model).__name__.endswith("ForTokenClassification"):
            raise GblmError(f"a batch for {type(model).__name__} needs labels [n, t]; −100 is none")
        labels = logits.argmax(dim=-1)
    return _mean_loss(logits, labels.long())


def class_loss(model: Any, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return the loss `[n]` of logits `[n, classes]` by what config.json says they are.

    One class of several, several at once (binary cross-entropy) or numbers (squared error); without
    labels the classes that the model itself gives. Raises `GblmError` for numbers without labels.
    """
    kind = problem(model.config)
    if kind == SEVERAL:
        targets = (logits.detach() > 0 if labels is None else labels).to(logits.dtype)
        losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses.mean(dim=1)
    if kind == REGRESSION:
        if labels is None:
            raise GblmError(
                f"{type(model).__name__} gives numbers, not classes, and needs labels; give them, "
                "or a method without gradients"
            )
        return (logits - labels.to(logits.dtype).view_as(logits)).square().mean(dim=1)
    labels = logits.argmax(dim=-1) if labels is None else labels
    return cross_entropy(logits, labels.long(), reduction="none")


def in_place(model: nn.Module) -> bool:
    """Say whether a label stands at the position of its logits, and not one behind."""
    decodes: bool = getattr(model.config, "is_encoder_decoder", False)
    fills = getattr(model.config, "causal", None) is False  # an XLM or a FlauBERT
    return decodes or fills or type(model).__name__.endswith(IN_PLACE)


def window_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss `[n]` of windows from logits `[n, t, vocabulary]`.

    labels: `[n, t]`, each the target of the position before it; −100 is none.
    """
    return _mean_loss(logits, pad(labels[:, 1:].long(), (0, 1), value=NONE))


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss `[n]` over the targets `[n, t]` of logits `[n, t, vocabulary]`."""
    known = targets.numel() and not valueless(targets)
    if known and (most := int(targets.max())) >= logits.shape[-1]:
        raise GblmError(
            f"a target is {most} and the head gives {logits.shape[-1]} logits; check the ids of "
            "the calibration samples, or choose a method without gradients, such as wanda"
        )
    return maths.cross_entropy(logits, targets).sum(dim=1) / (targets != NONE).sum(dim=1)
