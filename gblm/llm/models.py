"""Load and save causal language models with their tokenizers, as transformers does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from gblm.base import Batch, GblmError
from gblm.llm import data
from gblm.llm.adapters import blocks
from gblm.llm.checkpoint import (
    ONE_MODEL,
    check_blocks,
    check_shapes,
    check_source,
    checkpoint_dtype,
    read_index,
    reshard,
    tensor_files,
    write_shards,
)
from gblm.machine.device import find_device, find_dtype
from gblm.machine.files import check_depth, written_into
from gblm.machine.offload import (
    Offload,
    find_offload,
    offload_of,
    offloaded,
    read_when_used,
    whole,
)

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# By a word of what transformers says: what is wrong, its own text for "", and the way out.
WAYS = {
    "ignore_mismatched_sizes": (
        "its weights are of other shapes than config.json says",
        ONE_MODEL,
    ),
    "Weights only load failed": (
        "its pickle holds more than weights",
        "convert the weights to safetensors",
    ),
    "safetensors": ("", "convert the weights to safetensors, or trust them with --allow-pickle"),
    "trust_remote_code": ("", "read that code, then trust it with --trust-remote-code"),
    "": ("", "check the folder or the name, and the connection to the hub"),
}


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
    there is one. Code that comes with a model runs only with `trust_remote_code`, weights other
    than safetensors are read only with `allow_pickle`.

    Raises `GblmError` where anything is missing, damaged or does not fit.
    """
    _, tokenizer = load_tokenizer(model, trust_remote_code)
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    return load_model(model, device=find_device(device), dtype=dtype, **trust), tokenizer


def load_tokenizer(
    model: str, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Load the config and the tokenizer of a model, which is all that windows take: see `load`."""
    config = load_config(model, trust_remote_code)
    with _explained(model):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        tokenizer("a", verbose=False)  # some values of its config are only looked at now
        return config, tokenizer


def load_config(model: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Load the config of a model: see `load`."""
    check_source(model)
    with _explained(model):
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)


def load_model(
    model: str, *, device: torch.device, dtype: str, trust_remote_code: bool, allow_pickle: bool
) -> PreTrainedModel:
    """Load a causal language model without its tokenizer: see `load`."""
    config = load_config(model, trust_remote_code)
    _check_layers(model, config, len(tensor_files(model)))
    chosen = find_dtype(dtype, device, lambda: checkpoint_dtype(model))
    auto: Any = AutoModelForCausalLM
    with _explained(model):
        loaded, info = auto.from_pretrained(
            model,
            dtype=chosen or "auto",
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    wrong = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise GblmError(
            f"model {model}: {len(wrong)} weights are missing or of another shape, such as "
            f"{', '.join(wrong[:3])}; give a whole checkpoint of a causal language model"
        )
    check_blocks(loaded, model, blocks(loaded), info["unexpected_keys"])
    return loaded.to(device).eval()


def load_offloaded(
    model: str,
    offload: str,
    folder: Path,
    *,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> tuple[PreTrainedModel, Offload | None]:
    """Load a causal language model, its weights where `offload` says (see `gblm.machine.offload`).

    From disk the model is made without memory for its weights; each block's are read from the
    checkpoint when it is their turn, changed ones are written into the folder.

    Raises `GblmError`, beside what `load_model` does, where a checkpoint cannot be read block by
    block: without safetensors, or with names other than those of the model.
    """
    check_source(model)
    files = tensor_files(model)
    size = sum(file.stat().st_size for file in set(files.values()))
    kind = find_offload(offload, size, device)
    if kind != "disk":
        home = device if kind == "none" else torch.device("cpu")
        trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
        loaded = load_model(model, device=home, dtype=dtype, **trust)
        return loaded, offloaded(kind, loaded, blocks(loaded), folder, device)
    if not files:
        raise GblmError(
            f"model {model} has no safetensors to be read block by block; --offload cpu"
        )
    config = load_config(model, trust_remote_code)
    _check_layers(model, config, len(files))
    stored = checkpoint_dtype(model)
    chosen = find_dtype(dtype, device, lambda: stored) or stored or torch.float32
    with init_empty_weights(include_buffers=False):
        empty = _empty(model, config, chosen, trust_remote_code)
    empty.tie_weights()
    parameters = dict(empty.named_parameters())
    if missing := sorted(set(parameters) - set(files)):
        raise GblmError(
            f"model {model}: {len(missing)} weights have other names in its checkpoint, such as "
            f"{', '.join(missing[:3])}, so that it cannot be read block by block; use --offload cpu"
        )
    check_blocks(empty, model, blocks(empty), set(files) - set(parameters))
    check_shapes(model, parameters, files)
    return empty, read_when_used(empty, blocks(empty), files, folder, device)


@contextmanager
def sketch(
    model: str, *, device: torch.device, dtype: str, trust_remote_code: bool
) -> Iterator[PreTrainedModel]:
    """Give a model of fake tensors, by its config alone.

    What is run with it, as long as it is there, computes shapes and no values.
    """
    config = load_config(model, trust_remote_code)
    stored = stored_dtype(config)
    chosen = find_dtype(dtype, device, lambda: stored) or stored
    with FakeTensorMode():
        yield _empty(model, config, chosen, trust_remote_code)


def silence() -> None:
    """Let transformers say nothing but errors."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype that a config states for its checkpoint, float32 where it states none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def positions(config: PreTrainedConfig) -> int | None:
    """Return the longest window a model can take, None where its config says nothing."""
    text = config.get_text_config()
    return next((getattr(text, key) for key in POSITIONS if getattr(text, key, None)), None)


def vocabulary(config: PreTrainedConfig) -> int:
    """Return the number of ids a model knows."""
    return config.get_text_config().vocab_size


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
) -> Batch:
    """Return the calibration batch `{"input_ids": [samples, length]}` for a model's config.

    See `gblm.llm.data.calibration` for the sources. length: min(2048, what the model can take)
    where None. Raises `GblmError` where the source has too little, or ids the model does not know.
    """
    ids = data.calibration(source, tokenizer, samples, window_length(config, length), seed)
    data.check_ids(ids, vocabulary(config), source)
    return {"input_ids": ids}


def loading(folder: Path) -> str:
    """Return the Python that loads a saved model."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"
    )


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str, like: str
) -> None:
    """Save a model into a folder, with tokenizer, generation config, dtype and shards of `like`.

    `like` is the folder or the hub name the model was loaded from.
    """
    offload, shards = offload_of(model), read_index(like)
    with written_into(Path(folder)) as beside:
        tokenizer.save_pretrained(beside)
        if offload and offload.kind == "disk":
            model.config.save_pretrained(beside)
            if model.can_generate():
                model.generation_config.save_pretrained(beside)
            _save_units(offload, dict(model.named_parameters()), beside)
            return
        with whole(model, checkpoint_dtype(like)) as stored:
            stored.save_pretrained(beside, max_shard_size="100TB")
        if shards:
            reshard(beside, shards)


def _save_units(offload: Offload, parameters: dict[str, nn.Parameter], folder: Path) -> None:
    """Write a shard for every unit of a model on disk, and one for the rest."""
    units = []
    for unit in offload.units:  # a tied weight goes with the first unit that has it
        if names := [name for name in unit.parameters if parameters.pop(name, None) is not None]:
            units.append(names)
    units += [list(parameters)] if parameters else []
    count = len(units)
    shards = {f"model-{i:05}-of-{count:05}.safetensors": u for i, u in enumerate(units, 1)}
    write_shards(folder, shards, lambda shard: offload.store.read(shards[shard]))


def _check_layers(model: str, config: PreTrainedConfig, tensors: int) -> None:
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int):
        check_depth(model, layers, "layers", tensors)


def _empty(
    model: str, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """Return the model of a config, in evaluation mode, its weights as transformers draws them."""
    auto: Any = AutoModelForCausalLM
    with _explained(model):
        made = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return made.eval()


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn what transformers raises on loading into a `GblmError` that says the way out."""
    try:
        yield
    except Exception as error:  # whatever the files, the hub or the config had against it
        text = " ".join(str(error).split())
        if not isinstance(error, OSError | ValueError | RuntimeError):
            text = f"{type(error).__name__}: {text}"
        what, way = next(WAYS[word] for word in WAYS if word in text)
        raise GblmError(f"model {model} cannot be loaded: {(what or text)[:300]}; {way}") from error
