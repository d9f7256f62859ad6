"""Vision transformers, and any other image classifier, through the same core."""

from importlib import import_module
from typing import Any

MODULES = ("adapters", "data", "evaluate", "examples", "hf", "models")


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: timm takes seconds."""
    if name in MODULES:
        return import_module(f"{__name__}.{name}")
    if name == "load":
        return import_module(f"{__name__}.models").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
