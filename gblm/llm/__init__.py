"""Language models of transformers: load, draw samples, measure how good they are, save."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any


class _AfterTransformers(MetaPathFinder):
    """Lets transformers load packed checkpoints once it is imported, which takes seconds."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec: Any = find_spec(fullname)
        execute = spec.loader.exec_module

        def then_register(module: Any) -> None:
            execute(module)
            import_module("gblm.llm.packed")

        spec.loader.exec_module = then_register
        return spec


if "transformers" in sys.modules:
    import_module("gblm.llm.packed")
else:
    sys.meta_path.insert(0, _AfterTransformers())

MODULES = (
    "adapters",
    "contrast",
    "data",
    "evaluate",
    "examples",
    "heads",
    "int8",
    "labelled",
    "models",
    "pairs",
    "replay",
    "sources",
    "speech",
    "zero_shot",
    "training",
)
PLACES = {
    "FrozenZeros": "training",
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
