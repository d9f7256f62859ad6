"""Text that a language model writes before and after pruning."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gblm.llm.models import positions
from gblm.report import Example

PROMPTS = 3
PROMPT = 24  # tokens of a prompt
WRITTEN = 40  # tokens that follow it


class Continuations:
    """Greedy continuations of the starts of a few windows `[n, t]`, drawn evenly."""

    def __init__(self, tokenizer: Any, windows: Tensor, source: str) -> None:
        picks = torch.linspace(0, len(windows) - 1, min(PROMPTS, len(windows))).round().long()
        length = max(1, min(PROMPT, windows.shape[1] // 2))
        self.tokenizer, self.source = tokenizer, source
        self.prompts = torch.stack([self._prompt(window, length) for window in windows[picks]])
        self.dense: list[str] = []

    def before(self, model: nn.Module) -> None:
        """Note what the dense model writes."""
        self.dense = self.written(model)

    def after(self, model: nn.Module) -> tuple[str, list[Example]]:
        """Return what the examples are, and the prompts with what both models write."""
        pruned = self.written(model)
        prompts = [self._text(prompt) for prompt in self.prompts]
        written = ([whole(text) for text in texts] for texts in (self.dense, pruned))
        examples = [Example(*texts) for texts in zip(prompts, *written, strict=True)]
        return f"How each model goes on, token by most likely token, from {self.source}.", examples

    def written(self, model: Any) -> list[str]:
        """Return the most likely next token over and over, as text, for each prompt.

        The whole window runs each time where a family gives no cache of keys and values.
        """
        ids = self.prompts.to(model.device)
        limit = positions(model.config) or ids.shape[1] + WRITTEN
        taken = inspect.signature(model.forward).parameters
        name = "cache" if "cache" in taken else "past_key_values"  # as transformers had it first
        new, cache = ids, dict[str, Any]()
        with torch.no_grad():
            for _ in range(min(WRITTEN, limit - ids.shape[1])):
                found = model(input_ids=new if cache else ids, use_cache=True, **cache)
                new = found.logits[:, -1:].argmax(dim=-1)
                ids = torch.cat([ids, new], dim=1)
                past = getattr(found, name, None)
                cache = {name: past} if past is not None else {}
        return [self._text(row[self.prompts.shape[1] :]) for row in ids]

    def _prompt(self, window: Tensor, length: int) -> Tensor:
        """Return the first part of a window that begins and ends between words, else the first."""

        def begins(i: int) -> bool:
            before, text = (self.tokenizer.decode(window[:n].tolist()) for n in (i, i + 1))
            return text[len(before) :][:1] in (" ", "\n")

        places = range(1, len(window) - length)
        starts = (i for i in places if begins(i) and begins(i + length))
        start = next(starts, 0)
        return window[start : start + length]

    def _text(self, ids: Tensor) -> str:
        """Return the text of ids up to the end of the sequence."""
        numbers = ids.tolist()
        if (end := self.tokenizer.eos_token_id) in numbers:
            numbers = numbers[: numbers.index(end)]
        return self.tokenizer.decode(numbers, skip_special_tokens=True)


def whole(text: str) -> str:
    """Return a text without the word at its end that may be cut."""
    start = text.rstrip()
    return f"{start.rpartition(' ')[0]} …" if start[-1:].isalnum() and " " in start else text
