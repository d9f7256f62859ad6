"""Causal language models of transformers: load, draw windows, measure perplexity, save."""

from importlib import import_module
from typing import Any

import gblm.llm.packed  # noqa: F401  (transformers then loads packed checkpoints)

MODULES = (
    "adapters",
    "data",
    "evaluate",
    "examples",
    "heads",
    "int8",
    "models",
    "pairs",
    "zero_shot",
)
PLACES = {
    "calibration": "data",
    "evaluation": "data",
    "load": "models",
    "perplexity": "evaluate",
    "save": "models",
    "windows": "models",
}
__all__ = list(PLACES)


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: transformers takes seconds."""
    if name in MODULES:
        return import_module(f"{__name__}.{name}")
    if name in PLACES:
        return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
