"""How the core sees an image classifier of timm or transformers."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import timm
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gblm.base import Adapter, Batch, GblmError
from gblm.walk.blocks import frozen, hooked, joined
from gblm.walk.products import depthwise

HEADS = ("cls_logits", "distillation_logits")  # of a distilled model of transformers
LISTS = (nn.ModuleList, nn.Sequential)
LAYERS = ("layer", "layers")
STEMS = ("patch_embed", "stem")  # before the blocks, though some are built of lists


def adapter(model: nn.Module) -> Adapter:
    """Return the adapter of an image classifier: its blocks are found, not listed."""
    if hasattr(model, "forward_features"):
        own = Adapter(blocks, trunk, loss, config=timm_config, batch=batch_of, logits=head)
    else:
        own = Adapter(blocks, heads, heads_loss, config=config, batch=batch_of, logits=mean_head)
    return replace(own, narrows=lambda model: True)


def timm_config(model: nn.Module) -> tuple[dict[str, Any], Any]:
    """Return what timm has made a model of, and what makes a model of changed arguments."""
    known: Any = model
    usual = {
        name: own.default
        for kind in reversed(type(model).__mro__[:-1])
        for name, own in inspect.signature(kind).parameters.items()
        if own.default is not own.empty
    }
    given = timm.models.get_model_args(model)
    name = known.pretrained_cfg["architecture"]

    def make(changes: dict[str, Any]) -> nn.Module:
        try:
            with init_empty_weights(include_buffers=False):
                return timm.create_model(name, pretrained=False, **{**given, **changes})
        except NotImplementedError:  # one that computes with its parameters as it is made
            return timm.create_model(name, pretrained=False, **{**given, **changes})

    return {**usual, **given}, make


def config(model: nn.Module) -> tuple[dict[str, Any], Any]:
    """Return the settings of a model's config, and what makes a model of changed ones."""
    known: Any = model

    def make(changes: dict[str, Any]) -> nn.Module:
        changed = copy.deepcopy(known.config)
        for name, value in changes.items():
            setattr(changed, name, value)
        with init_empty_weights(include_buffers=False):
            return type(model)(changed)

    return known.config.to_dict(), make


def batch_of(model: nn.Module, data: Any, samples: int = 1024) -> Batch:
    """Return the calibration batch that data are; images without labels get the model's own.

    data: a batch with `images` or `pixel_values` `[n, c, h, w]`, with or without `labels`; a pair
    of images and labels; images alone; some of these, such as a DataLoader's. samples: the most
    that are taken. Raises `GblmError` for other data.
    """
    pair = isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor)
    one = isinstance(data, Mapping | Tensor) or (pair and data[0].ndim == 4)
    batch = joined(map(_images, [data] if one else data), samples)
    if "labels" in batch:
        return batch
    parameter = next(model.parameters())
    with frozen(model), torch.no_grad():
        parts = batch["images"].split(32)
        labels = [logits(model, part.to(parameter)).argmax(dim=1).cpu() for part in parts]
    return {**batch, "labels": torch.cat(labels)}


def _images(part: Any) -> Batch:
    """Return images, with labels where they have some, as a batch."""
    if isinstance(part, Tensor):
        part = (part,)
    if isinstance(part, tuple | list):
        part = dict(zip(("images", "labels"), part, strict=False))
    names = {"pixel_values": "images", "image": "images", "label": "labels"}
    given: dict[str, Any] = dict(part)
    found = {names.get(name, name): torch.as_tensor(own) for name, own in given.items()}
    if "images" not in found or found["images"].ndim != 4:
        raise GblmError(
            f"the calibration data hold {', '.join(found) or 'nothing'} and no images "
            "[n, c, h, w]; give those as `images`, or as the first of a pair with labels"
        )
    return {name: found[name] for name in ("images", "labels") if name in found}


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits `[n, classes]` of images `[n, c, h, w]`."""
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


class Logits(nn.Module):
    """An image classifier whose output is the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[n, classes]`."""
        return logits(self.model, images)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a model by name: the modules of its lists that hold linears.

    The lists are those with "blocks" in their name, as timm calls them (`blocks`,
    `stages.N.blocks`, `cls_attn_blocks`, …), wherever they stand outside the stem; those called
    `layer` or `layers`, as transformers does, where none has that name; else all lists. A list
    within a list is entered, unless linears stand in it bare: then it is a block itself. A block
    within a block is none.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, LISTS) and not any(stem in name for stem in STEMS)
    }
    called = {name: lists[name] for name in lists if "blocks" in name.rpartition(".")[2]}
    layers = {name: lists[name] for name in lists if name.rpartition(".")[2] in LAYERS}
    outermost: dict[str, nn.Module] = {}
    for name, module in (called or layers or lists).items():  # the outer ones first
        if not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost |= _within(name, module)
    return outermost


def trunk(model: nn.Module, batch: Batch) -> Any:
    """Return what the head takes: timm's `forward_features` of the images `[n, c, h, w]`."""
    with hooked(_contiguous(model) if len(batch["images"]) == 1 else ()):
        return model.forward_features(batch["images"])  # type: ignore[operator]


def loss(model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
    """Return the cross-entropy `[n]` of every image's label, from what the head takes.

    A model with several heads (DeiT, PiT, LeViT, EfficientFormer, RepViT, distilled) gives all
    their logits in training, and their average in evaluation. The rule of training is taken: the
    mean of the heads' cross-entropies.
    """
    with _all_heads(model):
        logits = model.forward_head(hidden)  # type: ignore[operator]
    return heads_loss(model, logits if isinstance(logits, tuple) else (logits,), batch)


def head(model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
    """Return the logits `[n, classes]` of timm's head in evaluation, from what it takes."""
    found: Tensor = model.forward_head(hidden)  # type: ignore[operator]
    return found


def mean_head(model: nn.Module, logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """Return the mean logits `[n, classes]` of a model's heads."""
    return torch.stack(logits).mean(dim=0)


def heads(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Return the logits `[n, classes]` of every head of a model of transformers: see `loss`.

    It has no place between its last block and its head that all families share.
    """
    with hooked(_contiguous(model) if len(batch["images"]) == 1 else ()):
        output = model(batch["images"])
    return tuple(output[name] for name in HEADS if name in output) or (output.logits,)


def heads_loss(model: nn.Module, logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """Return the cross-entropy `[n]` of every image's label, the mean over the heads."""
    losses = [cross_entropy(head.float(), batch["labels"], reduction="none") for head in logits]
    return torch.stack(losses).mean(dim=0)


def _multiplies(module: nn.Module) -> bool:
    """Say whether a module is a linear layer, or a convolution that is not depthwise."""
    convolution = isinstance(module, nn.Conv2d) and not depthwise(module.weight)
    return convolution or isinstance(module, nn.Linear)


def _within(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks in a list, or in the lists within it."""
    if any(map(_multiplies, module.children())):
        return {name: module}
    inside: dict[str, nn.Module] = {}
    for inner, child in module.named_children():
        if isinstance(child, LISTS):
            inside |= _within(f"{name}.{inner}", child)
        elif any(map(_multiplies, child.modules())):
            inside[f"{name}.{inner}"] = child
    return inside


def _contiguous(model: nn.Module) -> list[Any]:
    """Let every batch norm of images, and its gradient, see contiguous tensors.

    On a CPU torch 2.15 gives a batch norm in evaluation a wrong gradient of a single sample, where
    one of its input and its output's gradient is transposed and the other is not.
    """

    def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].contiguous(),)

    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.contiguous())

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [norm.register_forward_pre_hook(before) for norm in norms] + [
        norm.register_forward_hook(after) for norm in norms
    ]


@contextmanager
def _all_heads(model: nn.Module) -> Iterator[None]:
    """Let a distilled model give the logits of all its heads, its dropout and norms as they are."""
    heads: list[Any] = [m for m in model.modules() if hasattr(m, "distilled_training")]
    before = [(module, module.training, module.distilled_training) for module in heads]
    try:
        for module in heads:
            module.training = True  # of this module alone: its children stay in evaluation
            module.distilled_training = True
        yield
    finally:
        for module, training, distilled in before:
            module.training = training
            module.distilled_training = distilled
