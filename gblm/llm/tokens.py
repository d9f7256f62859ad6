"""Token ids of a long text: the tokenizer's own, on all cores where it can be cut safely."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART = 1 << 17  # characters; shorter texts are not worth a cut
CUT = re.compile(r"(?<=\w) (?=\w)")  # before a space between two words
# The expressions of LLaMA-3 and of Qwen 2 and 3; that of GPT-2 is ByteLevel's own.
WORDS = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + number + r"|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for number in (r"\p{N}{1,3}", r"\p{N}")
)


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the ids `[t]` of `tokenizer(text)`, special tokens as it adds them by default.

    A long text is cut before single spaces into parts that are tokenised side by side, where the
    tokenizer splits there in any case (see `cuttable`): the ids are the same.
    """
    if len(text) <= PART or not cuttable(tokenizer):
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    from tokenizers import Encoding

    tokenizer(" ", verbose=False)  # sets truncation and the like of the backend as any call does
    backend: Any = tokenizer.backend_tokenizer
    encodings = backend.encode_batch_fast(parts(text), add_special_tokens=False)
    whole = backend.post_process(Encoding.merge(encodings))
    return torch.tensor(whole.ids, dtype=torch.int64)


def parts(text: str) -> list[str]:
    """Cut a text before spaces between words into parts of `PART` characters or a little more."""
    cuts = [0]
    while found := CUT.search(text, cuts[-1] + PART):
        cuts.append(found.start())
    return [text[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def cuttable(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer of a text is that of its parts, wherever it is cut before ` word`.

    So it is where three things hold: added tokens are found by their characters alone, none of
    them a space; the normalizer leaves the characters or composes them (NFC), which a space stops;
    and the words come from a known expression, none of whose alternatives matches a space after
    anything but white space. Each word is then tokenised by itself.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return False
    for token in backend.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or re.search(r"\s", token.content):
            return False
    return _state(backend.normalizer) in ({}, {"type": "NFC"}) and _known_words(backend)


def _known_words(backend: Any) -> bool:
    """Whether the words of a tokenizer come from the expression of GPT-2 or one of `WORDS`."""
    state = _state(backend.pre_tokenizer)
    steps = state.get("pretokenizers", [state])
    if any(step.get("add_prefix_space") for step in steps):
        return False
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return bool(steps[0].get("use_regex"))
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"] or steps[1].get("use_regex"):
        return False
    split = steps[0]
    return (
        split["pattern"].get("Regex") in WORDS
        and split["behavior"] == "Isolated"
        and not split["invert"]
    )


def _state(step: Any) -> dict[str, Any]:
    return json.loads(step.__getstate__()) if step is not None else {}
