"""Causal language models of transformers: load, draw windows, measure perplexity, save."""

from importlib import import_module
from typing import Any

_PLACES = {  # imported when used: transformers takes seconds
    "calibration": "data",
    "evaluation": "data",
    "load": "models",
    "perplexity": "evaluate",
    "save": "models",
    "windows": "models",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
