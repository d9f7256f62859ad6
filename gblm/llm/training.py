"""Fine-tuning of a pruned model by transformers' Trainer."""

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from gblm.walk.zeros import frozen_zeros


class FrozenZeros(TrainerCallback):
    """Keeps the zeros of a pruned model at 0 while a Trainer trains it: see `frozen_zeros`."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the zeros; after every step of the optimizer they are there again."""
        optimizer = kwargs.get("optimizer")
        own = getattr(optimizer, "optimizer", optimizer)  # in the wrapper of accelerate
        self.stack.enter_context(frozen_zeros(kwargs["model"], own))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of them."""
        self.stack.close()
