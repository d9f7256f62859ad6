"""How the core sees a language model of transformers, also one that sees pictures.

Causal models, encoder-decoders, masked models, classifiers, and models of pictures and text.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import moe

from gblm.base import Adapter, Batch, GblmError
from gblm.llm import contrast
from gblm.llm.heads import bare
from gblm.llm.loss import losses
from gblm.llm.replay import inputs_of, replayed, restore
from gblm.walk import products
from gblm.walk.blocks import hooked, joined

# Experts where torch's own grouped product does not run; the module has registered it.
assert moe
products.FORMS[torch.ops.transformers.grouped_mm_fallback] = products.grouped

# The arguments of experts: tokens, the experts that each is sent to, and their weights.
SENDS = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
)


def adapter(model: nn.Module, experts: str = "routed") -> Adapter:
    """Return the adapter of a language model: its blocks are found, not listed.

    Experts are computed by torch's grouped product, or one after the other. experts: "all" where
    the statistics of their inputs are those of all tokens, and not of those sent to them. Raises
    `GblmError` where the model has none that could be sent other tokens.
    """
    if isinstance(model, PreTrainedModel) and model.get_experts_implementation()[""] not in (
        None,
        "eager",
        "grouped_mm",
    ):
        model.set_experts_implementation("eager")  # the others hide which expert a product is of
    if experts == "all" and not any(map(_sends, model.modules())):
        raise GblmError(
            f"{type(model).__name__} has no experts that all tokens could be sent to; leave "
            "--experts all out"
        )
    seeing = everywhere if experts == "all" else nullcontext
    if contrast.contrasts(model):
        given = Adapter(blocks, contrast.trunk, contrast.loss, unpad, seeing, config, batch_of)
        return replace(given, coupled=partial(contrast.coupled, given))
    known = Adapter(blocks, trunk, loss, unpad, seeing, config, batch_of, logits)
    return replace(known, narrows=narrows, untied=untied)


def untied(model: Any) -> Callable[[], None]:
    """Give the head weights of its own where it shares the embedding's; return what undoes it."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    tied: nn.Parameter = model.get_input_embeddings().weight
    if getattr(head, "weight", None) is not tied:
        return lambda: None
    configs = [own for own in (model.config, config) if hasattr(own, "tie_word_embeddings")]
    known = {id(own): own.tie_word_embeddings for own in configs}

    def tie() -> None:
        head.weight = tied
        for own in configs:
            own.tie_word_embeddings = known[id(own)]

    head.weight = nn.Parameter(tied.detach().clone(), requires_grad=False)
    for own in configs:
        own.tie_word_embeddings = False
    return tie


def narrows(model: nn.Module) -> bool:
    """Say whether the class of a model is one of transformers, which can be loaded narrower."""
    return hasattr(transformers, type(model).__name__)


def config(model: nn.Module) -> tuple[dict[str, Any], Any]:
    """Return the settings of a model's config, and what makes a model of changed ones."""
    assert isinstance(model, PreTrainedModel)

    def make(changes: dict[str, Any]) -> nn.Module:
        changed = copy.deepcopy(model.config)
        for name, value in changes.items():
            setattr(changed.get_text_config(), name, value)
        with init_empty_weights(include_buffers=False):
            return type(model)(changed)

    return model.config.get_text_config().to_dict(), make


def batch_of(
    model: Any,
    data: Any,
    tokenizer: Any = None,
    samples: int | None = None,
    length: int | None = None,
) -> Batch:
    """Return the calibration batch that data are, padded to the longest with `attention_mask`.

    data: a batch, or batches such as a DataLoader's; token ids `[n, t]`; texts, or a data set of
    them, with their tokenizer, each cut to `length` tokens. samples: the most that are taken, 128
    of what has no end. Raises `GblmError` for other data.
    """
    if isinstance(data, Mapping):
        return joined([{name: torch.as_tensor(value) for name, value in data.items()}], samples)
    if isinstance(data, Tensor):
        return joined([{"input_ids": data}], samples)
    if hasattr(data, "column_names"):
        from gblm.llm.sources import rows_of

        names = data.column_names
        data = data["input_ids"] if "input_ids" in names else rows_of(data, names, "the data set")
    return joined((_sample(part, tokenizer, length) for part in data), samples or 128)


def _sample(part: Any, tokenizer: Any, length: int | None) -> Batch:
    """Return one of the data: a batch, token ids or a text, as a batch."""
    if isinstance(part, Mapping):
        return {name: torch.as_tensor(value) for name, value in part.items()}
    texts = isinstance(part, str) or (isinstance(part, list) and isinstance(part[0], dict))
    if texts and tokenizer is None:
        raise GblmError("texts need their tokenizer; pass tokenizer=")
    if texts:
        from gblm.llm.data import tokens

        part = tokens(tokenizer, part)
    if isinstance(part, tuple):  # of a DataLoader, with or without labels
        part = part[0]
    ids = torch.as_tensor(part)
    ids = (ids[None] if ids.ndim == 1 else ids)[:, :length]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _sends(module: nn.Module) -> bool:
    """Say whether a module takes tokens, the experts they are sent to, and the weights of those."""
    names = inspect.signature(module.forward).parameters
    return hasattr(module, "num_experts") and tuple(names) in SENDS


@contextmanager
def everywhere(block: nn.Module) -> Iterator[None]:
    """Let every expert see all tokens for a time; what the block gives is of those sent to it."""
    with ExitStack() as stack:
        for module in filter(_sends, block.modules()):
            stack.callback(restore, module, vars(module).get("forward"))
            module.forward = partial(_sent_everywhere, module.forward, vars(module)["num_experts"])
        yield


def _sent_everywhere(forward: Any, count: int, *args: Any, **named: Any) -> Any:
    tokens, index, weights = (*args, *named.values())
    every = torch.arange(count, device=index.device).expand(*index.shape[:-1], count)
    forward(tokens, every, torch.ones_like(every, dtype=weights.dtype))
    with products.unseen():
        return forward(tokens, index, weights)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks by name: the members of the outermost lists that hold layers.

    Those of the encoder and the decoder, of the tower that sees and the model that speaks. Where
    there are several lists, one that holds less than a hundredth of the largest's parameters is
    none. What a model that sees has between its tower and its text model is one block.
    """
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for own in found.values() for block in own)
        if isinstance(module, nn.ModuleList) and not inside:
            layers = {f"{name}.{key}": own for key, own in module.named_children() if _layer(own)}
            found |= {name: layers} if layers else {}
    sizes = {name: sum(map(_size, own.values())) for name, own in found.items()}
    lists = {name: own for name, own in found.items() if sizes[name] >= max(sizes.values()) / 100}
    layers = {name: block for own in lists.values() for name, block in own.items()}
    return layers | _connectors(model, layers)


def _layer(module: nn.Module) -> bool:
    """Say whether a member of a list is a layer: a module of several with a matrix."""
    whole = not isinstance(module, nn.ModuleList) and any(module.children())
    return whole and any(own.squeeze().ndim > 1 for own in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _connectors(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return what a model that sees has beside its tower and its text model, by name."""
    base = getattr(model, "base_model", model)
    if not hasattr(getattr(model, "config", None), "vision_config") or base is model:
        return {}
    prefix = next(name for name, module in model.named_modules() if module is base)
    named = {f"{prefix}.{name}": module for name, module in base.named_children()}
    return {
        name: module
        for name, module in named.items()
        if any(isinstance(own, nn.Linear) for own in module.modules())
        and not any(layer.startswith(f"{name}.") for layer in layers)
        and any(module.children())
    }


def unpad(batch: Batch) -> list[Batch] | None:
    """Return the windows of a batch one by one, cut to the tokens that `attention_mask` is 1 for.

    None where no token is masked and no picture is smaller than others. A window with a gap keeps
    the places of its tokens; a target of its own (`decoder_…`, `labels` beside it) is cut by
    `decoder_attention_mask`. Raises `GblmError` where a window holds no token.
    """
    mask = batch.get("attention_mask")
    patches = batch.get("image_grid_thw")
    even = patches is None or bool((patches == patches[:1]).all())
    if mask is None or (bool(mask.all()) and even and "decoder_attention_mask" not in batch):
        return None
    windows = []
    for i, keep in enumerate(mask.bool()):
        places = keep.nonzero().flatten()
        if not len(places):
            raise GblmError(f"sample {i} of the batch holds no token but padding; remove it")
        window = {
            name: _cut(name, value[i : i + 1], keep, batch, i)
            for name, value in batch.items()
            if name not in ("attention_mask", "decoder_attention_mask")
        }
        if int(places[-1] - places[0]) >= len(places):
            window.setdefault("position_ids", places[None] - places[0])
        windows.append(window)
    return windows


def _cut(name: str, value: Tensor, keep: Tensor, batch: Batch, index: int) -> Tensor:
    """Return a sample's tensor without its padding."""
    if name == "pixel_values" and "image_grid_thw" in batch:
        return value[:, : int(batch["image_grid_thw"][index].prod(dim=-1).sum())]
    if "decoder_input_ids" in batch and (name == "labels" or name.startswith("decoder_")):
        target = batch.get("decoder_attention_mask")
        return value if target is None else value[:, target[index].bool()]
    if value.is_floating_point() and name != "inputs_embeds":  # pictures, labels of classes
        return value
    return value[:, keep] if value.shape[1:2] == keep.shape else value


class _Reached(BaseException):
    """Ends a run of a model at what its head takes."""

    def __init__(self, hidden: dict[str, Tensor]) -> None:
        self.hidden = hidden


def trunk(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return what the head takes of the model below it: `last_hidden_state [n, t, hidden]`, ….

    The model runs its own forward, which ends there; to its end where it has no head.
    """
    ends, entered = _ends(model), list[nn.Module]()
    if not ends or bare(model):
        return _hidden(model(**inputs_of(model, batch)))

    def enter(module: nn.Module, args: tuple) -> None:
        entered.append(module)

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        if module is entered[0]:
            raise _Reached(_hidden(output))

    hooks = [end.register_forward_pre_hook(enter) for end in ends]
    hooks += [end.register_forward_hook(leave) for end in ends]
    with hooked(hooks):
        try:
            model(**inputs_of(model, batch))
        except _Reached as reached:
            return reached.hidden
    raise GblmError(f"{type(model).__name__} does not run its base model; pass an Adapter")


def loss(model: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return the mean loss `[n]` of every sample over its targets, from what the head takes.

    The targets are `labels`: of a causal model the next tokens, of a masked one and of an
    encoder-decoder those in their place, of a classifier one for each sample or token. Without them
    they are the window itself for a causal model, and for a classifier what it says.
    """
    return losses(model, logits(model, hidden, batch), batch)


def logits(model: nn.Module, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return the logits `[n, …, classes]` of a model's own head, from what it takes."""
    if not _ends(model) or bare(model):
        raise GblmError(
            f"{type(model).__name__} has no head, and so no loss to take gradients of; choose a "
            "method without gradients, such as wanda or sparsegpt"
        )
    encoder = model.get_encoder()  # type: ignore[operator]
    below = _ends(model) + [encoder] * (encoder is not model)
    with replayed(dict.fromkeys(below, hidden)):
        output = model(**inputs_of(model, batch))
    found: Tensor = output.logits if hasattr(output, "logits") else output.prediction_logits
    return found


class Logits(nn.Module):
    """A model of text from ids `[n, t]` to logits alone, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits."""
        output: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return output


def _ends(model: nn.Module) -> list[nn.Module]:
    """Return the modules of which one gives what the head takes: whichever is entered first.

    The head of OPT passes its base model by and calls the decoder within. Llama 4's text model has
    none of the name that its family gives to it: then it is the only model inside.
    """
    assert isinstance(model, PreTrainedModel)
    named = [end for end in (model.base_model, model.get_decoder()) if end is not model]
    inside = [own for own in model.children() if isinstance(own, PreTrainedModel)]
    ends = named or inside * (len(inside) == 1)
    # A `decoder` may be the head.
    return [end for end in dict.fromkeys(ends) if isinstance(end, PreTrainedModel)]


def _hidden(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor | tuple | list):
        return {"last_hidden_state": output if isinstance(output, Tensor) else output[0]}
    names = ("last_hidden_state", "last_hidden_state_ngram", "logits", "pooler_output")
    return {name: x for name in names if isinstance(x := getattr(output, name, None), Tensor)}
