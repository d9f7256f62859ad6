"""The files of a checkpoint of transformers: found and checked, and written in the same shards."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from gblm.base import GblmError
from gblm.machine.files import write_json, write_tensors

SHARD = re.compile(r"[^/\\\x00]{1,200}\.safetensors")  # a file, and no way to one


def check_source(model: str) -> None:
    """Raise `GblmError` where a local model folder is missing, empty or damaged."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise GblmError(f"model {model} is a file; give the folder that holds config.json")
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            if "/" not in model and not model.startswith("."):
                return  # the hub has models without an owner, such as gpt2
            raise GblmError(f"model {model}: no such folder; give a folder or a hub name")
        return
    if not any(folder.iterdir()):
        raise GblmError(f"model folder {model} is empty; give one that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise GblmError(f"model folder {model} has no config.json; give one of save_pretrained")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise GblmError(f"{file} is damaged ({error}); fetch or write it again") from error


def tensor_files(like: str) -> dict[str, Path]:
    """Return the local file of every tensor of a checkpoint, empty where it has no safetensors."""
    if shards := read_index(like):
        local = {shard: local_file(like, shard) for shard in set(shards.values())}
        if missing := sorted(shard for shard, path in local.items() if path is None):
            raise GblmError(f"model {like} lacks {', '.join(missing[:3])}; fetch it again")
        return {name: path for name, shard in shards.items() if (path := local[shard])}
    if (file := local_file(like, SAFE_WEIGHTS_NAME)) is None:
        return {}
    with safe_open(file, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def read_index(like: str) -> dict[str, str]:
    """Return the shard of every tensor of a checkpoint, empty where it has but one.

    Raises `GblmError` where the index is damaged, or names a file that is not beside it: a path
    such as `../x.safetensors` would lead the result out of its folder as well.
    """
    index = local_file(like, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return {}
    try:
        shards: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        strange = [name for name in shards.values() if not SHARD.fullmatch(name)]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise GblmError(
            f"{index} is no index of shards ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if strange or not shards:
        what = f"names {strange[0]!r} as a shard" if strange else "names no shard"
        raise GblmError(f"{index} {what}; a shard is a .safetensors file in the same folder")
    return shards


def local_file(like: str, name: str) -> Path | None:
    """Return a file of a folder or of the hub, fetched where need be; None where there is none."""
    found = cached_file(
        like,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None


def checkpoint_dtype(like: str) -> torch.dtype | None:
    """Return the dtype of the first floating tensor of a checkpoint, None where it has no file."""
    file = local_file(like, next(iter(read_index(like).values()), SAFE_WEIGHTS_NAME))
    if file is None:
        return None
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if (tensor := tensors.get_tensor(name)).is_floating_point():
                return tensor.dtype
    return None


def check_layers(model: str, config: PreTrainedConfig, tensors: Collection[str]) -> None:
    """Raise `GblmError` where a config names more layers than a checkpoint can hold.

    transformers would make millions of them for hours, before it finds their weights missing.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if tensors and isinstance(layers, int) and layers > len(tensors):
        raise GblmError(
            f"model {model}: config.json names {layers} layers and the checkpoint holds "
            f"{len(tensors)} tensors; give the config and the weights of one model"
        )


def check_blocks(
    model: PreTrainedModel, name: str, blocks: Collection[str], left: set[str]
) -> None:
    """Raise `GblmError` where tensors `left` of a checkpoint belong to blocks the model lacks."""
    places = {re.escape(block.rpartition(".")[0]) for block in blocks}
    layer = re.compile(rf"((?:{'|'.join(places)})\.\d+)\.")
    known = [re.compile(text) for text in model._keys_to_ignore_on_load_unexpected or ()]
    extra = {
        m[1] for key in left if (m := layer.match(key)) and not any(k.search(key) for k in known)
    }
    if extra := extra - set(blocks):
        raise GblmError(
            f"model {name}: its checkpoint holds {', '.join(sorted(extra)[:3])}, which config.json "
            "leaves out; give the config and the weights of one model"
        )


def check_shapes(
    model: str, parameters: Mapping[str, nn.Parameter], files: Mapping[str, Path]
) -> None:
    """Raise `GblmError` where a tensor of a checkpoint has another shape than its parameter."""
    for file in set(files.values()):
        with safe_open(file, framework="pt") as tensors:
            for name in parameters.keys() & tensors.keys():
                shape, own = tensors.get_slice(name).get_shape(), list(parameters[name].shape)
                if shape != own:
                    raise GblmError(
                        f"model {model}: {name} is {shape} and should be {own} by config.json; "
                        "give the config and the weights of one model"
                    )


def reshard(folder: Path, shards: dict[str, str]) -> None:
    """Write the tensors of the single file in a folder anew into the given shards."""
    whole = folder / SAFE_WEIGHTS_NAME
    with safe_open(whole, framework="pt") as tensors:
        names = set(tensors.keys())
        if not names <= set(shards):
            return  # transformers writes this family in another form than it came in
        total = 0
        for shard in sorted(set(shards.values())):
            part = {
                name: tensors.get_tensor(name) for name in sorted(names) if shards[name] == shard
            }
            total += sum(tensor.nbytes for tensor in part.values())
            write_tensors(folder / shard, part)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: shards[name] for name in sorted(names)},
    }
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    whole.unlink()
