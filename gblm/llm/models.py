"""Load and save causal language models with their tokenizers, as transformers does."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from gblm.base import Batch, GblmError
from gblm.llm import data
from gblm.llm.adapters import blocks
from gblm.llm.checkpoint import ONE_MODEL, Checkpoint
from gblm.llm.conversion import Places, places
from gblm.llm.heads import CAUSAL, CLASS, head, processed, samples_of
from gblm.machine.carry import copy_files, write_widths
from gblm.machine.device import find_device, find_dtype
from gblm.machine.files import check_depth, write_shards, written_into
from gblm.machine.offload import (
    Offload,
    find_offload,
    in_memory,
    offload_of,
    offloaded,
    read_when_used,
)

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def load(
    model: str,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a local folder or a hub name.

    dtype, device: see `gblm.machine.device`; "auto" is that of the checkpoint, and the GPU where
    there is one. For the rest see `Checkpoint`. Raises `GblmError` where anything is missing,
    damaged or does not fit.
    """
    checkpoint = Checkpoint(model, trust_remote_code, allow_pickle)
    _, tokenizer = load_tokenizer(model, trust_remote_code)
    return load_model(checkpoint, find_device(device), dtype), tokenizer


def load_tokenizer(
    model: str, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Load the config and the tokenizer of a model, which is all that windows take: see `load`."""
    checkpoint = Checkpoint(model, trust_remote_code)
    return checkpoint.config(), checkpoint.tokenizer()


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: str) -> PreTrainedModel:
    """Load a causal language model without its tokenizer: see `load`."""
    config, source = checkpoint.config(), checkpoint.source()
    _check_layers(checkpoint, config, len(source.files))
    stored = source.dtype
    own = find_dtype(dtype, device, lambda: stored) or stored or "auto"
    model, info = checkpoint.model(config, own)
    wrong = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise GblmError(
            f"model {checkpoint.name}: {len(wrong)} weights are missing or of another shape, such "
            f"as {', '.join(wrong[:3])}; give a whole checkpoint of a causal language model"
        )
    unexpected = sorted(info["unexpected_keys"])
    _check_blocks(model, checkpoint.name, unexpected)
    if unexpected and not checkpoint.source(model).holds(model):
        raise GblmError(
            f"model {checkpoint.name}: its checkpoint holds {len(unexpected)} tensors that "
            f"{type(model).__name__} has no place for, such as {', '.join(unexpected[:3])}, and "
            "the result would lack them; save the model without them, in safetensors"
        )
    return model.to(device).eval()


def load_offloaded(
    checkpoint: Checkpoint, offload: str, folder: Path, device: torch.device, dtype: str
) -> tuple[PreTrainedModel, Offload | None]:
    """Load a causal language model, its weights where `offload` says (see `gblm.machine.offload`).

    From disk the model is made without memory for its weights; each block's are read from the
    checkpoint when it is their turn, changed ones are written into the folder.

    Raises `GblmError`, beside what `load_model` does, where a checkpoint cannot be read block by
    block: without safetensors, or with weights that transformers finds no place for in the model.
    """
    checkpoint.check()
    files = checkpoint.source().files
    size = sum(file.stat().st_size for file in set(files.values()))
    kind = find_offload(offload, size, device)
    if kind != "disk":
        home = device if kind == "none" else torch.device("cpu")
        model = load_model(checkpoint, home, dtype)
        return model, offloaded(kind, model, blocks(model), folder, device)
    if not files:
        raise GblmError(
            f"model {checkpoint.name} has no safetensors to be read block by block; --offload cpu"
        )
    stored = checkpoint.dtype()
    dtype_in_memory = find_dtype(dtype, device, lambda: stored) or stored or torch.float32
    config = checkpoint.config()
    _check_layers(checkpoint, config, len(files))
    with init_empty_weights(include_buffers=False):
        model = checkpoint.empty(config, dtype_in_memory)
    model.tie_weights()
    found = places(model, files)
    _check_places(model, checkpoint.name, found)
    return model, read_when_used(model, blocks(model), found.of, folder, device)


@contextmanager
def sketch(checkpoint: Checkpoint, device: torch.device, dtype: str) -> Iterator[PreTrainedModel]:
    """Give a model of fake tensors, by its config alone.

    What is run with it, as long as it is there, computes shapes and no values.
    """
    config = checkpoint.config()
    stored = stored_dtype(config)
    with FakeTensorMode():
        yield checkpoint.empty(config, find_dtype(dtype, device, lambda: stored) or stored)


def silence() -> None:
    """Let transformers say nothing but errors."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def conversions(checkpoint: Checkpoint, dtype: torch.dtype) -> list[str]:
    """Return what else a reader must know: that a result has another form than its source."""
    if not (name := checkpoint.gguf):
        return []
    dtype_name = str(dtype).removeprefix("torch.")
    return [f"{name} was dequantised: the result is a folder of safetensors in {dtype_name}"]


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype that a config states for its checkpoint, float32 where it states none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def positions(config: PreTrainedConfig) -> int | None:
    """Return the longest window a model can take, None where its config says nothing."""
    text = config.get_text_config()
    found = (getattr(text, key, None) for key in POSITIONS)
    return next((most for most in found if most and most > 0), None)  # XLNet says −1 for none


def vocabulary(config: PreTrainedConfig) -> int:
    """Return the number of ids a model knows; raises `GblmError` where its config does not say."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise GblmError("config.json has no vocab_size; add the rows of the embedding as that")
    return size


def window_length(config: PreTrainedConfig, length: int | None) -> int:
    """Return the window: `length`, or min(2048, what the model can take) where None.

    Raises `GblmError` where the model cannot take it.
    """
    most = positions(config)
    if length is None:
        return min(2048, most or 2048)
    if length < 2:
        raise GblmError(f"windows of {length} have no target; use a --length of 2 or more")
    if most is not None and length > most:
        raise GblmError(
            f"--length {length} is beyond the {most} positions of the model; use {most} or less"
        )
    return length


def windows(
    source: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    bos: bool = False,
) -> Batch:
    """Return the calibration batch for a model's config: `input_ids [samples, length]`, ….

    See `heads.samples_of` for what models that are not causal are given beside.

    See `gblm.llm.data.calibration` for the sources. length: min(2048, what the model can take)
    where None. Raises `GblmError` where the source has too little, or ids the model does not know.
    """
    ids = data.calibration(source, tokenizer, samples, window_length(config, length), seed, bos)
    data.check_ids(ids, vocabulary(config), source)
    return samples_of(ids, config, tokenizer, seed)


def check_causal(model: PreTrainedModel, batch: Batch) -> None:
    """Raise `GblmError` where a causal model's logits at a position depend on later ones."""
    if head(model.config) != CAUSAL or "pixel_values" in batch:
        return
    ids = batch["input_ids"][:1, :8].to(model.device).long().repeat(2, 1)
    ids[1, -1] = (ids[0, -1] + 1) % vocabulary(model.config)
    with torch.no_grad():
        one, other = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    apart = float((one - other).abs().max())
    rounding = max(1e-3, 4 * torch.finfo(model.dtype).eps)
    if apart > rounding * float(one.std()) + 1e-6:
        raise GblmError(
            f"{type(model).__name__} is no causal model: what it says of a token depends on later "
            "ones; name the class that it was trained as in `architectures` of config.json"
        )


def length_of(batch: Batch) -> int:
    """Return the tokens of a sample, those of its target among them."""
    names = ("input_ids", "decoder_input_ids")
    return sum(batch[name].shape[1] for name in names if name in batch)


def loading(folder: Path, model: PreTrainedModel, packed: bool = False) -> str:
    """Return the Python that loads a saved model."""
    config = model.config
    auto, other = CLASS[head(config)][0], "processor" if processed(config) else "tokenizer"
    first, more = ("import gblm.llm\n", ', variant="packed"') if packed else ("", "")
    more += ", trust_remote_code=True" if vars(model).get("narrowed") else ""
    return (
        f"{first}from transformers import {auto}, Auto{other.title()}\n\n"
        f"model = {auto}.from_pretrained({str(folder)!r}{more})\n"
        f"{other} = Auto{other.title()}.from_pretrained({str(folder)!r})"
    )


def save(
    model: PreTrainedModel, tokenizer: Any, folder: Path | str, like: str | Checkpoint
) -> None:
    """Save a model into a folder: the files of `like` with the changed weights in them.

    `like` is what the model was loaded from, by name. Where the model has other weights than that,
    in number or shape, they are written as transformers does; so is the tokenizer (or processor)
    where `like` has none.
    """
    checkpoint = like if isinstance(like, Checkpoint) else Checkpoint(like)
    source, own = checkpoint.source(model), dict(model.named_parameters())
    with written_into(Path(folder)) as beside:
        copy_files(source, beside)
        if not any(beside.glob("token*")):
            tokenizer.save_pretrained(beside)
        offload = offload_of(model)
        if source.holds(model) and not _absent(model, set(source.files)):
            source.write(model, blocks(model), beside)
        elif offload and offload.kind == "disk":
            model.config.save_pretrained(beside)
            shards = offload.shards(own)
            write_shards(beside, shards, lambda shard: offload.store.read(shards[shard]))
        else:
            with in_memory(model, source.dtype) as stored:
                stored.save_pretrained(beside, max_shard_size="100TB")
        write_widths(model, beside, CLASS[head(model.config)][0])


def _check_layers(checkpoint: Checkpoint, config: PreTrainedConfig, tensors: int) -> None:
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int):
        check_depth(checkpoint.name, layers, "layers", tensors)


def _check_places(model: PreTrainedModel, name: str, found: Places) -> None:
    """Raise `GblmError` where a checkpoint lacks parameters, or has them in other shapes."""
    parameters = dict(model.named_parameters())
    if missing := sorted(set(parameters) - set(found.of)):
        raise GblmError(
            f"model {name}: {len(missing)} weights have other names in its checkpoint, such as "
            f"{', '.join(missing[:3])}, so that it cannot be read block by block; use --offload cpu"
        )
    _check_blocks(model, name, found.others)
    for key, parameter in parameters.items():
        if found.shapes[key] != list(parameter.shape):
            raise GblmError(
                f"model {name}: {key} is {found.shapes[key]} and should be {list(parameter.shape)} "
                f"by config.json; {ONE_MODEL}"
            )


def _check_blocks(model: PreTrainedModel, name: str, unexpected: Collection[str]) -> None:
    """Raise `GblmError` where unexpected tensors of a checkpoint are of blocks the model lacks."""
    if absent := sorted(_absent(model, unexpected)):
        raise GblmError(
            f"model {name}: its checkpoint holds {', '.join(absent[:3])}, which config.json leaves "
            f"out; {ONE_MODEL}"
        )


def _absent(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Return the blocks that tensors are of and the model lacks.

    Those that a family leaves out by itself are none: layers that predict further tokens.
    """
    own = blocks(model)
    lists = {re.escape(block.rpartition(".")[0]) for block in own}
    block = re.compile(rf"((?:{'|'.join(lists)})\.(\d+))\.")
    text = model.config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0)
    further = range(layers, layers + (getattr(text, "num_nextn_predict_layers", None) or 0))
    ignored = [re.compile(text) for text in model._keys_to_ignore_on_load_unexpected or ()]
    keys = (key for key in names if not any(pattern.search(key) for pattern in ignored))
    found = {
        match[1] for key in keys if (match := block.match(key)) and int(match[2]) not in further
    }
    return found - set(own)
