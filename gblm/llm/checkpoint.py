"""The files of a checkpoint of transformers: checked, and written in the same shards."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from gblm.base import GblmError, explained
from gblm.machine.files import read_tensors, tensor_shapes, write_json, write_tensors

SHARD = re.compile(r"[^/\\\x00]{1,200}\.safetensors")  # a file, and no way to one
ONE_MODEL = "give the config and the weights of one model"


def check_source(model: str) -> None:
    """Raise `GblmError` where a local model folder is missing, empty or damaged."""
    folder = Path(model).expanduser()
    if not folder.exists():
        # The hub has models without an owner too, such as gpt2.
        if model.count("/") > 1 or model.startswith((".", "/", "~")):
            raise GblmError(f"model {model}: no such folder; give a folder or a hub name")
        return
    if not folder.is_dir():
        raise GblmError(f"model {model} is a file; give the folder that holds config.json")
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


def tensor_files(model: str) -> dict[str, Path]:
    """Return the local file of every tensor of a checkpoint, empty where it has no safetensors."""
    if shards := read_index(model):
        files = {shard: local_file(model, shard) for shard in set(shards.values())}
        if missing := sorted(shard for shard, file in files.items() if file is None):
            raise GblmError(f"model {model} lacks {', '.join(missing[:3])}; fetch it again")
        return {name: file for name, shard in shards.items() if (file := files[shard])}
    file = local_file(model, SAFE_WEIGHTS_NAME)
    return dict.fromkeys(tensor_shapes(file), file) if file else {}


def read_index(model: str) -> dict[str, str]:
    """Return the shard of every tensor of a checkpoint, empty where it has but one.

    Raises `GblmError` where the index is damaged, or names a file that is not beside it: a path
    such as `../x.safetensors` would lead the result out of its folder as well.
    """
    index = local_file(model, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return {}
    with explained(f"{index} is no index of shards", "fetch it again"):
        shards: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        strange = [name for name in shards.values() if not SHARD.fullmatch(name)]
    if strange or not shards:
        what = f"names {strange[0]!r} as a shard" if strange else "names no shard"
        raise GblmError(f"{index} {what}; a shard is a .safetensors file in the same folder")
    return shards


def local_file(model: str, name: str) -> Path | None:
    """Return a file of a folder or of the hub, fetched where need be; None where there is none."""
    file = cached_file(
        model,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(file) if file else None


def checkpoint_dtype(model: str) -> torch.dtype | None:
    """Return the dtype of the first floating tensor of a checkpoint, None where it has no file."""
    file = local_file(model, next(iter(read_index(model).values()), SAFE_WEIGHTS_NAME))
    tensors = read_tensors(file).values() if file else ()  # mapped, not read
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def check_blocks(
    model: PreTrainedModel, name: str, blocks: Collection[str], unexpected: Collection[str]
) -> None:
    """Raise `GblmError` where unexpected tensors of a checkpoint are of blocks the model lacks."""
    lists = {re.escape(block.rpartition(".")[0]) for block in blocks}
    block = re.compile(rf"((?:{'|'.join(lists)})\.\d+)\.")
    ignored = [re.compile(text) for text in model._keys_to_ignore_on_load_unexpected or ()]
    keys = (key for key in unexpected if not any(pattern.search(key) for pattern in ignored))
    absent = {match[1] for key in keys if (match := block.match(key))} - set(blocks)
    if absent:
        raise GblmError(
            f"model {name}: its checkpoint holds {', '.join(sorted(absent)[:3])}, which "
            f"config.json leaves out; {ONE_MODEL}"
        )


def check_shapes(
    model: str, parameters: Mapping[str, nn.Parameter], files: Mapping[str, Path]
) -> None:
    """Raise `GblmError` where a tensor of a checkpoint has another shape than its parameter."""
    for file in set(files.values()):
        shapes = tensor_shapes(file)
        for name in parameters.keys() & shapes.keys():
            if shapes[name] != (expected := list(parameters[name].shape)):
                raise GblmError(
                    f"model {model}: {name} is {shapes[name]} and should be {expected} by "
                    f"config.json; {ONE_MODEL}"
                )


def reshard(folder: Path, shards: Mapping[str, str]) -> None:
    """Write the tensors of the single file in a folder anew into the given shards."""
    single = folder / SAFE_WEIGHTS_NAME
    names = sorted(tensor_shapes(single))
    if not set(names) <= set(shards):
        return  # transformers writes this family in another form than it came in
    parts: dict[str, list[str]] = {shard: [] for shard in sorted(set(shards.values()))}
    for name in names:
        parts[shards[name]].append(name)
    write_shards(folder, parts, lambda shard: read_tensors(single, parts[shard]))
    single.unlink()


def write_shards(
    folder: Path, shards: Collection[str], read: Callable[[str], Mapping[str, Tensor]]
) -> None:
    """Write shards, whose tensors `read(shard)` gives, and their index."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        tensors = read(shard)
        write_tensors(folder / shard, tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
