"""Loads a model whose layers have widths that the config of its family cannot state.

gblm copies this file beside such a model, and it needs nothing of gblm. Under `narrowed`,
config.json names the modules that are not as the library makes them: the shapes of their
parameters, and their settings; a number stands for a module that is gone.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  # a model of transformers
    runpy.run_path("FOLDER/narrowed.py")["load"]()                        # a model of timm
"""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Modules = dict[str, Any]  # by name: shapes and settings, or how many things one that is gone gave


class Gone(nn.Module):
    """Stands where a module was: it gives 0, like the first tensor of what it is called with.

    several: how many things the module gave, the tensor first; 0 for a tensor alone.
    """

    def __init__(self, several: int = 0) -> None:
        super().__init__()
        self.several = several

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return 0."""
        x = next(own for own in (*args, *kwargs.values()) if isinstance(own, Tensor))
        zero = torch.zeros_like(x)
        return (zero, *[None] * (self.several - 1)) if self.several else zero


def narrow(model: nn.Module, modules: Modules) -> None:
    """Give modules parameters of other shapes, cut from those they have, and other settings."""
    for name, own in modules.items():
        if isinstance(own, int):
            model.set_submodule(name, Gone(own))
            continue
        module = model.get_submodule(name)
        for key, value in own.items():
            if isinstance(value, list):
                old = getattr(module, key)
                part = old.detach()[tuple(map(slice, value))].clone()
                value = nn.Parameter(part, old.requires_grad)
            setattr(module, key, value)
    model.narrowed = modules  # type: ignore[assignment]


def __getattr__(name: str) -> Any:
    """Return the class of transformers with that name, whose models are narrow."""
    if name.startswith("_"):
        raise AttributeError(name)
    stock = getattr(importlib.import_module("transformers"), name)

    def make(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        narrow(self, config.narrowed)

    own = {"__init__": make, "__module__": __name__}
    own["is_custom_code"] = classmethod(lambda cls: False)  # its weights are named as the stock's
    return globals().setdefault(name, type(name, (stock,), own))


def load(folder: Any = None) -> Any:
    """Return the model of timm in a folder, that of this file by default."""
    folder = Path(folder or Path(__file__).parent)
    config = json.loads((folder / "config.json").read_text())
    model = importlib.import_module("timm").create_model(f"local-dir:{folder}", pretrained=False)
    narrow(model, config["narrowed"])
    tensors = importlib.import_module("safetensors.torch").load_file(folder / "model.safetensors")
    model.load_state_dict(tensors)
    return model.eval()
