"""Image classifiers of timm: by name or from a folder, and back into one."""

import copy
import difflib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gblm.base import Batch, GblmError
from gblm.machine.device import find_dtype
from gblm.machine.files import read_tensors, written_into
from gblm.machine.offload import (
    Offload,
    find_offload,
    offload_of,
    offloaded,
    read_when_used,
)
from gblm.vit.adapters import adapter
from gblm.walk.blocks import frozen

LOCAL = "local-dir:"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load(name: str, checkpoint: str | Path | None = None, **options: Any) -> nn.Module:
    """Return an image classifier in evaluation mode.

    `name` is a name of timm (`vit_tiny_patch16_224`, with a tag or without), `hf-hub:` and a name
    of the hub, or a folder with `config.json`, written as it is or after `local-dir:`. Its weights
    come from the checkpoint (`.safetensors`, or what torch saved), else from the folder or the hub.
    `options` go to `timm.create_model`.

    Raises `GblmError` where the model is unknown, its weights cannot be had or do not fit, or it
    has no head.
    """
    name, checkpoint = _source(name, checkpoint)
    model = _made(name, pretrained=checkpoint is None, **options)
    if checkpoint is not None:
        _fill(model, checkpoint, name)
    return model.eval()


def load_offloaded(
    name: str,
    checkpoint: str | Path | None,
    offload: str,
    folder: Path,
    *,
    device: torch.device,
    dtype: str,
) -> tuple[nn.Module, Offload | None, torch.dtype]:
    """Load an image classifier whose weights live where `offload` says: see `gblm.machine.offload`.

    From disk, the model is made without memory for its weights where they are in a `.safetensors`
    file by the names they have in the model, and read block by block; else it is loaded whole
    first. Returns also the dtype of the checkpoint. Raises `GblmError` where `load` does.
    """
    named, file = _source(name, checkpoint)
    shapes = _shapes(file) if file else {}
    if file and shapes and find_offload(offload, file.stat().st_size, device) == "disk":
        with init_empty_weights(include_buffers=False):
            empty = _made(named, pretrained=False)
        if {key: tuple(value.shape) for key, value in empty.state_dict().items()} == shapes:
            first = next(key for key, _ in empty.named_parameters())
            stored = read_tensors(file, [first])[first].dtype
            empty.to(find_dtype(dtype, device, lambda: stored) or stored)
            blocks, files = adapter(empty).blocks(empty), dict.fromkeys(shapes, file)
            return empty.eval(), read_when_used(empty, blocks, files, folder, device), stored
    model = load(name, checkpoint)
    stored = next(model.parameters()).dtype
    model.to(find_dtype(dtype, device, lambda: stored) or stored)
    return model, offloaded(offload, model, adapter(model).blocks(model), folder, device), stored


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file, empty where it is none."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return {}


def _source(name: str, checkpoint: str | Path | None) -> tuple[str, Path | None]:
    """Return the name timm makes the model by, and the file of its weights, None for its own."""
    folder = Path(name.removeprefix(LOCAL)).expanduser()
    if name.startswith(LOCAL) or folder.is_dir():
        if not (folder / "config.json").is_file():
            raise GblmError(f"model {folder}: no config.json in it; give a folder timm saved")
        checkpoint = checkpoint or next(
            (folder / file for file in WEIGHTS if (folder / file).is_file()), None
        )
        if checkpoint is None:
            raise GblmError(f"model {folder}: no {WEIGHTS[0]} in it; give --checkpoint")
        _check_depth(folder / "config.json", Path(checkpoint).expanduser())
        name = f"{LOCAL}{folder}"
    elif ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise GblmError(f"unknown model {name!r}{_near(name)}")
    return name, None if checkpoint is None else Path(checkpoint).expanduser()


def _made(name: str, pretrained: bool, **options: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # of the hub, the network, the cache, or the options
        raise GblmError(
            f"model {name} cannot be made ({type(error).__name__}: "
            f"{(str(error) or 'no reason given').splitlines()[0]}); check its name and the "
            "connection, or give its weights by --checkpoint"
        ) from error
    if not getattr(model, "num_classes", 0):
        raise GblmError(f"model {name} has no head of classes; choose an image classifier")
    return model


def loading(folder: Path) -> str:
    """Return the Python that loads a saved model."""
    name = f"{LOCAL}{folder}"
    return f"import timm\n\nmodel = timm.create_model({name!r}, pretrained=True).eval()"


def sketch(name: str) -> nn.Module:
    """Return the image classifier of a name without values, on the meta device: see `load`."""
    folder = Path(name.removeprefix(LOCAL)).expanduser()
    with torch.device("meta"):
        model = timm.create_model(f"{LOCAL}{folder}" if folder.is_dir() else name, pretrained=False)
    return model.eval()


def save(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `model.safetensors` and `config.json`, in a dtype, into a folder.

    `timm.create_model(name, checkpoint_path=…/model.safetensors)` loads the first, and
    `timm.create_model("local-dir:…", pretrained=True)` the folder.
    """
    offload = offload_of(model)
    with written_into(Path(folder)) as beside, offload.home() if offload else nullcontext():
        if dtype not in (None, next(model.parameters()).dtype):
            model = copy.deepcopy(model).to(dtype)
        timm.models.save_for_hf(model, str(beside), safe_serialization=True)


def predicted(model: nn.Module, batch: Batch, step: int = 32) -> Batch:
    """Return the batch with the model's own predictions as its labels `[n]`."""
    with frozen(model), torch.no_grad():
        labels = [model(part).argmax(dim=1) for part in batch["images"].split(step)]
    return {**batch, "labels": torch.cat(labels)}


def _near(name: str) -> str:
    base = name.partition(".")[0]
    near = difflib.get_close_matches(base, timm.list_models(), 3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"{hint}; give a name of timm (timm.list_models()) or a folder with config.json"


def _check_depth(config: Path, file: Path) -> None:
    """Raise `GblmError` where a config names more blocks than its checkpoint has tensors.

    It is checked before timm makes millions of them. What else is wrong with either is said later.
    """
    try:
        args = json.loads(config.read_text())["model_args"]
        depths = np.ravel([args[key] for key in ("depth", "depths") if key in args])
        with safe_open(file, framework="pt") as tensors:
            held = len(tensors.keys())
        deep = bool(depths.sum() > held)
    except Exception:
        return
    if deep:
        raise GblmError(
            f"model {config.parent}: config.json names {depths.sum()} blocks and {file.name} holds "
            f"{held} tensors; give the config and the weights of one model"
        )


def _fill(model: nn.Module, file: Path, name: str) -> None:
    """Load a checkpoint strictly; raises `GblmError` that names the first three misfits."""
    if not file.is_file():
        raise GblmError(f"checkpoint {file}: no such file; give a .safetensors file")
    try:
        # Of a pickle only tensors are read: what else it would run is refused.
        state: dict[str, Tensor] = timm.models.load_state_dict(
            str(file), use_ema=False, weights_only=True
        )
    except Exception as error:  # every format has exceptions of its own
        raise GblmError(
            f"checkpoint {file} cannot be read ({type(error).__name__}: "
            f"{(str(error) or 'no reason given').splitlines()[0].partition('. ')[0]}); "
            "check that it is whole, and prefer .safetensors"
        ) from error
    own = model.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is not of the model" for key in state if key not in own]
    wrong += [
        f"{key} is {list(state[key].shape)}, not {list(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise GblmError(
            f"checkpoint {file} does not fit {name}: {'; '.join(wrong[:3])}{more}; "
            "give the checkpoint of this model, or the model of this checkpoint"
        )
    model.load_state_dict(state)
