"""Image classifiers of timm or transformers: by name or from a folder, and back into one."""

import argparse
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from gblm import vit
from gblm.base import Batch, GblmError, explained, nearest
from gblm.machine.carry import LOADER, Source, copy_files, write_widths
from gblm.machine.device import find_dtype
from gblm.machine.files import check_depth, tensor_shapes, written_into
from gblm.machine.narrowed import narrow
from gblm.machine.offload import Offload, find_offload, in_memory, offloaded, read_when_used
from gblm.packed import packed_files, unpack
from gblm.vit import demo
from gblm.vit.adapters import blocks, logits
from gblm.walk.blocks import frozen

LOCAL = "local-dir:"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load(name: str, checkpoint: str | Path | None = None, **options: Any) -> nn.Module:
    """Return an image classifier in evaluation mode.

    `name` is a name of timm (`vit_tiny_patch16_224`, with a tag or without), `hf-hub:` and a name
    of the hub, or a folder with `config.json`, written as it is or after `local-dir:`. Its weights
    come from the checkpoint (`.safetensors`, or what torch saved), else from the folder or the hub.
    Its head has as many classes as that of the checkpoint. A checkpoint of timm's train.py is a
    name too, for it names its architecture. `options` go to `timm.create_model`. A model of
    transformers (a folder of it, or `owner/name` of the hub) has its weights beside its config: see
    `gblm.vit.hf`. A packed folder is unpacked.

    Raises `GblmError` where the model is unknown, its weights cannot be had or do not fit, or it
    has no head.
    """
    if packed_files(folder := _folder(name)):
        with TemporaryDirectory() as passing:
            unpack(folder, Path(passing) / "model")
            return load(str(Path(passing) / "model"), checkpoint, **options)
    if own := of_transformers(name):
        if checkpoint is not None:
            raise GblmError(f"--checkpoint is for models of timm; put the weights into {own}")
        return vit.hf.load(own)
    name, checkpoint = _source(name, checkpoint)
    model = _create(name, pretrained=checkpoint is None, **options)
    if checkpoint is not None:
        _fill(model, checkpoint, name)
    return model.eval()


def source(model: nn.Module, name: str, checkpoint: str | Path | None = None) -> Source:
    """Return the checkpoint on disk that `load` has made a model of; nothing where it is a pickle.

    Its folder is that of the model, or of the hub's cache; that of a checkpoint apart is none.
    """
    if own := of_transformers(name):
        return vit.hf.source(own)
    name, file = _source(name, checkpoint)
    folder = file.parent if file and _own(name, file) else None
    if file is None:
        config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
        hub, _, revision = (config.get("hf_hub_id") or "").partition("@")
        held = config.get("hf_hub_filename") or WEIGHTS[0]
        cached = hub and try_to_load_from_cache(hub, held, revision=revision or None)
        file = Path(cached) if isinstance(cached, str) else None
        folder = file.parent if file else None
    return Source(dict.fromkeys(tensor_shapes(file), file) if file else {}, folder)


def load_offloaded(
    name: str,
    checkpoint: str | Path | None,
    offload: str,
    folder: Path,
    *,
    device: torch.device,
    dtype: str,
    **options: Any,
) -> tuple[nn.Module, Offload | None, Source]:
    """Load an image classifier whose weights live where `offload` says: see `gblm.machine.offload`.

    From disk, the model is made without memory for its weights where they are in a `.safetensors`
    file by the names they have in the model, and read block by block; else it is loaded whole
    first. Returns also the checkpoint on disk. Raises `GblmError` where `load` does.
    """
    if packed_files(_folder(name)):
        way = "python -m gblm.packed unpack writes its ordinary form; prune that"
        raise GblmError(f"model {name} is packed; {way}")
    made_by, file = (name, None) if of_transformers(name) else _source(name, checkpoint)
    shapes = tensor_shapes(file) if file else {}
    if file and shapes and find_offload(offload, file.stat().st_size, device) == "disk":
        with init_empty_weights(include_buffers=False):
            model = _create(made_by, pretrained=False, **options)
            _fit_head(model, shapes, made_by, file)
        if _shapes(model.state_dict()) == shapes:
            like = source(model, name, checkpoint)
            model.to(_dtype(model, like, dtype, device))
            files = dict.fromkeys(shapes, file)
            return model.eval(), read_when_used(model, blocks(model), files, folder, device), like
    model = load(name, checkpoint, **options)
    like = source(model, name, checkpoint)
    model.to(_dtype(model, like, dtype, device))
    return model, offloaded(offload, model, blocks(model), folder, device), like


def _folder(name: str) -> Path:
    """Return the folder that a name would be; that of `demo` is in the package."""
    own = name.removeprefix(LOCAL)
    return demo.FOLDER if own == demo.NAME else Path(own).expanduser()


def _dtype(model: nn.Module, like: Source, dtype: str, device: torch.device) -> torch.dtype:
    """Return what a model is computed in: by "auto" that of its checkpoint, see `find_dtype`."""
    stored = like.dtype or next(model.parameters()).dtype
    return find_dtype(dtype, device, lambda: stored) or stored


def sketch(name: str, checkpoint: str | Path | None = None, **options: Any) -> nn.Module:
    """Return the image classifier of a name without values, on the meta device: see `load`."""
    if own := of_transformers(name):
        return vit.hf.sketch(own)
    made_by, file = _source(name, checkpoint)
    with torch.device("meta"):
        model = _create(made_by, pretrained=False, **options)
        if file is not None:
            _fit_head(model, tensor_shapes(file) or _shapes(_state(file)), made_by, file)
    return model.eval()


def of_transformers(name: str) -> str | None:
    """Return the folder or hub name (`owner/name`) of a model of transformers, None for timm's."""
    folder = _folder(name)
    if not folder.exists():
        return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else None
    if folder.is_file():
        return None
    try:
        config = json.loads((folder / "config.json").read_text())
        return str(folder) if "model_type" in config else None
    except (OSError, ValueError, TypeError):  # which is explained as one of timm's
        return None


def loading(model: nn.Module, folder: Path, packed: bool = False) -> str:
    """Return the Python that loads a saved model."""
    if packed:
        return f"from gblm import vit\n\nmodel = vit.load({str(folder)!r})"
    if hasattr(model, "image_processor"):
        return vit.hf.loading(folder, model)
    if vars(model).get("narrowed"):
        return f"import runpy\n\nmodel = runpy.run_path({str(folder / LOADER.name)!r})['load']()"
    name = f"{LOCAL}{folder}"
    return f"import timm\n\nmodel = timm.create_model({name!r}, pretrained=True).eval()"


def save(model: nn.Module, folder: str | Path, like: Source | None = None) -> None:
    """Write a model into a folder: `model.safetensors`, `config.json` and what lies beside them.

    `timm.create_model(name, checkpoint_path=…/model.safetensors)` loads the first, and
    `timm.create_model("local-dir:…", pretrained=True)` the folder. The files are those of `like`,
    with the changed weights in them; where it has other weights than the model, or is None, the
    model's library writes them.
    """
    like = like or Source()
    with written_into(Path(folder)) as beside:
        copy_files(like, beside)
        if like.holds(model):
            like.write(model, blocks(model), beside)
            if not (beside / "config.json").exists():
                save_config_for_hf(model, str(beside / "config.json"))
            return
        with in_memory(model, like.dtype) as stored:
            if hasattr(model, "image_processor"):
                vit.hf.save(stored, beside)
            else:
                timm.models.save_for_hf(stored, str(beside), safe_serialization=True)
                write_widths(model, beside)


def predicted(model: nn.Module, batch: Batch, step: int = 32) -> Batch:
    """Return the batch with the model's own predictions as its labels `[n]`."""
    with frozen(model), torch.no_grad():
        labels = [logits(model, part).argmax(dim=1) for part in batch["images"].split(step)]
    return {**batch, "labels": torch.cat(labels)}


def _source(name: str, checkpoint: str | Path | None) -> tuple[str, Path | None]:
    """Return the name timm makes the model by, and the file of its weights, None for its own."""
    folder = _folder(name)
    file = None if checkpoint is None else Path(checkpoint).expanduser()
    if folder.is_file():
        return _architecture(folder), folder
    if name.startswith(LOCAL) or folder.is_dir():
        if not (folder / "config.json").is_file():
            raise GblmError(f"model {folder}: no config.json in it; give a folder timm saved")
        files = (folder / weights for weights in WEIGHTS)
        file = file or next((weights for weights in files if weights.is_file()), None)
        if file is None:
            raise GblmError(f"model {folder}: no {WEIGHTS[0]} in it; give --checkpoint")
        check_depth(folder, _depth(folder / "config.json"), "blocks", len(tensor_shapes(file)))
        name = f"{LOCAL}{folder}"
    elif ":" not in name and not timm.is_model(family := name.partition(".")[0]):
        hint = nearest(family, timm.list_models(), count=3, cutoff=0.5, form=str)
        raise GblmError(
            f"unknown model {name!r}; {hint}give a name of timm (timm.list_models()) or a folder "
            "with config.json"
        )
    return name, file


def _depth(config: Path) -> int:
    """Return how many blocks a config names, 0 where it does not: what is wrong is said later."""
    try:
        args = _config(config.parent)["model_args"]
        return int(np.ravel([args[key] for key in ("depth", "depths") if key in args]).sum())
    except Exception:
        return 0


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _architecture(file: Path) -> str:
    """Return the architecture that a checkpoint of timm's train.py names."""
    found = {} if file.suffix == ".safetensors" else _unpickled(file)
    name = found.get("arch") if isinstance(found, dict) else None
    if not isinstance(name, str):
        raise GblmError(
            f"model {file} is a file of weights that names no architecture; give that by --model, "
            f"and --checkpoint {file}"
        )
    return name


def _create(name: str, pretrained: bool, **options: Any) -> nn.Module:
    if pretrained and options.get("num_classes"):
        raise GblmError("--num-classes goes with --checkpoint: another head has no weights yet")
    way = "check its name and the connection, or give its weights by --checkpoint"
    with explained(f"model {name} cannot be made", way):
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        if name.startswith(LOCAL):
            narrow(model, _config(Path(name.removeprefix(LOCAL))).get("narrowed", {}))
    if not getattr(model, "num_classes", 0):
        raise GblmError(f"model {name} has no head of classes; choose an image classifier")
    return model


def _fill(model: nn.Module, file: Path, name: str) -> None:
    """Load a checkpoint strictly; raises `GblmError` that names the first three misfits."""
    state = _state(file)
    held = _shapes(state)
    _fit_head(model, held, name, file)
    expected = _shapes(model.state_dict())
    misfits = [f"{key} is missing" for key in expected if key not in held]
    misfits += [f"{key} is not of the model" for key in held if key not in expected]
    misfits += [
        f"{key} is {held[key]}, not {shape}"
        for key, shape in expected.items()
        if held.get(key, shape) != shape
    ]
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise GblmError(
            f"checkpoint {file} does not fit {name}: {'; '.join(misfits[:3])}{more}; "
            "give the checkpoint of this model, or the model of this checkpoint"
        )
    model.load_state_dict(state)
    halves = {own.dtype for own in state.values() if own.is_floating_point()}
    if len(halves) == 1:
        model.to(halves.pop())


def _own(name: str, file: Path) -> bool:
    """Say whether a file of weights lies beside the config of its model."""
    return name.startswith(LOCAL) and file.parent == _folder(name)


def _fit_head(model: Any, shapes: dict[str, list[int]], name: str, file: Path) -> None:
    """Give a model as many classes as the head in a checkpoint has, but for its own config."""
    if _own(name, file):
        return
    heads = model.pretrained_cfg.get("classifier") or ()
    names = [heads] if isinstance(heads, str) else heads
    found = [shapes[key] for name in names if (key := f"{name}.weight") in shapes]
    if found and found[0][0] != model.num_classes:
        model.reset_classifier(found[0][0])


def _state(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, without the prefixes that wrappers give their names."""
    if not file.is_file():
        raise GblmError(f"checkpoint {file}: no such file; give a .safetensors file")
    if file.suffix != ".safetensors":
        _unpickled(file)
    with explained(f"checkpoint {file} cannot be read", "check that it is whole"):
        return timm.models.load_state_dict(str(file), use_ema=False, weights_only=True)


def _unpickled(file: Path) -> Any:
    """Return what torch has saved; of a pickle only tensors are read, all else is refused."""
    way = "check that it is whole; of a whole model save state_dict(), best as .safetensors"
    with (
        explained(f"checkpoint {file} cannot be read, or holds more than weights", way),
        torch.serialization.safe_globals([argparse.Namespace]),
    ):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


def _shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in state.items()}
