"""What a model of transformers is for: its class, its samples, and how well it does."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto as auto

from gblm.base import Batch, GblmError

CAUSAL, PICTURES, TARGET, SPEECH, MASKED, CLASSES, TOKENS, BARE = (
    "causal",
    "pictures",
    "target",
    "speech",
    "masked",
    "classes",
    "tokens",
    "bare",
)
SINGLE, SEVERAL, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
MASKED_SHARE = 0.15  # of the tokens of a window, as published (arXiv 1810.04805)

# The Auto class of each head, and the classes of the families that have it.
CLASS: dict[str, tuple[str, Any]] = {
    CAUSAL: ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    PICTURES: ("AutoModelForImageTextToText", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    TARGET: ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    SPEECH: ("AutoModelForSpeechSeq2Seq", {"whisper": "WhisperForConditionalGeneration"}),
    MASKED: ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    CLASSES: (
        "AutoModelForSequenceClassification",
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    TOKENS: ("AutoModelForTokenClassification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    BARE: ("AutoModel", auto.MODEL_MAPPING_NAMES),  # no head: a sentence encoder, CLIP, SigLIP
}


def head(config: PreTrainedConfig) -> str:
    """Return what a model is for, by the class that its config names; causal where none does.

    Raises `GblmError` for a class of transformers that is for something else.
    """
    named = (getattr(config, "architectures", None) or [""])[0]
    sees = hasattr(config, "vision_config")
    fills = getattr(config, "causal", None) is False  # an XLM or a FlauBERT
    first = (PICTURES, CAUSAL) if sees else (MASKED,) if fills else ()
    for kind in (*first, *CLASS):
        classes = CLASS[kind][1].values()
        if any(named in (own if isinstance(own, tuple) else (own,)) for own in classes):
            return kind
    if hasattr(transformers, named or "none"):
        raise GblmError(
            f"python -m gblm.llm does not know what a {named} is asked and says; prune it in "
            "Python, where gblm.prune takes a batch of what it takes, labels among them"
        )
    return CAUSAL


def bare(model: Any) -> bool:
    """Say whether a model is one without a head, such as a sentence encoder, CLIP or SigLIP."""
    name = type(model).__name__
    return name.endswith("Model") and name in CLASS[BARE][1].values()


def classifies(config: PreTrainedConfig) -> bool:
    """Say whether a model of this config gives classes, or numbers, of texts or of tokens."""
    return head(config) in (CLASSES, TOKENS)


def problem(config: PreTrainedConfig) -> str:
    """Return the `problem_type` of a classifier, regression where it has a single output."""
    named: str | None = getattr(config, "problem_type", None)
    return named or (REGRESSION if config.num_labels == 1 else SINGLE)


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class of transformers that loads a model of this config."""
    return getattr(transformers, CLASS[head(config)][0])


def processed(config: PreTrainedConfig) -> bool:
    """Say whether a model takes what a processor makes of pictures, or of recordings."""
    return hasattr(config, "vision_config") or head(config) == SPEECH


def shifted(labels: Tensor, config: PreTrainedConfig) -> Tensor:
    """Return what a decoder is given for targets `[n, t]`: its first token, then those before.

    Raises `GblmError` where the config has no first token.
    """
    start = getattr(config, "decoder_start_token_id", None)
    first = start if start is not None else config.pad_token_id
    if first is None:
        raise GblmError("config.json has no decoder_start_token_id; add it")
    return torch.cat([torch.full_like(labels[:, :1], first), labels[:, :-1]], dim=1)


def samples_of(ids: Tensor, config: PreTrainedConfig, tokenizer: Any, seed: int = 0) -> Batch:
    """Return windows `[n, t]` as a model of this config takes them, with `labels`.

    An encoder-decoder is given the first half of a window, its target is the second. Of a masked
    model 15 % of the tokens are masked, drawn by the seed, and are its targets. A causal model's
    targets are the windows themselves, a classifier's what it says of them.

    Raises `GblmError` where the model has no token for that.
    """
    kind = head(config)
    if kind == TARGET:
        half = ids.shape[1] // 2
        labels = ids[:, half:]
        given = shifted(labels, config)
        return {"input_ids": ids[:, :half], "decoder_input_ids": given, "labels": labels}
    if kind == MASKED:
        if tokenizer.mask_token_id is None:
            raise GblmError("the tokenizer has no mask token, which a masked model needs; add one")
        draw = torch.Generator().manual_seed(seed)
        masked = torch.rand(ids.shape, generator=draw) < MASKED_SHARE
        masked[:, ids.shape[1] // 2] |= ~masked.any(dim=1)
        return {
            "input_ids": ids.masked_fill(masked, tokenizer.mask_token_id),
            "labels": ids.masked_fill(~masked, -100),
        }
    return {"input_ids": ids}
