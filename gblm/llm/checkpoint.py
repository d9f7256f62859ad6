"""A checkpoint of transformers: checked and read, and written in the same shards."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from gblm.base import GblmError, explained
from gblm.llm.heads import auto_class
from gblm.machine.files import INDEX, read_tensors, tensor_shapes, write_shards

SHARD = re.compile(r"[^/\\\x00]{1,200}\.safetensors")  # a file, and no way to one
IMAGES = "ForImageClassification"  # in the name of a class, which `gblm.vit` prunes
ONE_MODEL = "give the config and the weights of one model"
# By a word of what transformers says: what is wrong, its own text for "", and the way out.
ERRORS = {
    "ignore_mismatched_sizes": ("its weights are of other shapes than config.json says", ONE_MODEL),
    "Weights only load failed": (
        "its pickle holds more than weights",
        "convert the weights to safetensors",
    ),
    "safetensors": ("", "convert the weights to safetensors, or trust them with --allow-pickle"),
    "trust_remote_code": ("", "read that code, then trust it with --trust-remote-code"),
    "": ("", "check the folder or the name, and the connection to the hub"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model in a local folder or on the hub, by its name.

    Its own code runs only with `trust_remote_code`, weights other than safetensors are read only
    with `allow_pickle`. Raises `GblmError` for what is missing or damaged as it is asked for.
    """

    name: str
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def check(self) -> None:
        """Raise `GblmError` where a local folder is missing, empty or damaged."""
        name, folder = self.name, Path(self.name).expanduser()
        if not folder.exists():
            # The hub has models without an owner too, such as gpt2.
            if name.count("/") > 1 or name.startswith((".", "/", "~")):
                raise GblmError(f"model {name}: no such folder; give a folder or a hub name")
            return
        if not folder.is_dir():
            raise GblmError(f"model {name} is a file; give the folder that holds config.json")
        if not any(folder.iterdir()):
            raise GblmError(f"model folder {name} is empty; give one that save_pretrained wrote")
        if not (folder / "config.json").is_file():
            raise GblmError(f"model folder {name} has no config.json; give one of save_pretrained")
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise GblmError(f"{file} is damaged ({error}); fetch or write it again") from error

    def config(self) -> PreTrainedConfig:
        """Return its config."""
        self.check()
        with self._explained():
            config = AutoConfig.from_pretrained(self.name, trust_remote_code=self.trust_remote_code)
        named = getattr(config, "architectures", None) or ()
        if config.model_type == "timm_wrapper" or any(IMAGES in name for name in named):
            raise GblmError(
                f"model {self.name} is an image classifier; prune it by python -m gblm.vit"
            )
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return its tokenizer."""
        with self._explained():
            tokenizer = AutoTokenizer.from_pretrained(
                self.name, trust_remote_code=self.trust_remote_code
            )
            tokenizer("a", verbose=False)  # some values of its config are only looked at now
            return tokenizer

    def processor(self) -> Any:
        """Return its processor of pictures and text."""
        with self._explained():
            return AutoProcessor.from_pretrained(
                self.name, trust_remote_code=self.trust_remote_code
            )

    def model(
        self, config: PreTrainedConfig, dtype: torch.dtype | str
    ) -> tuple[Any, dict[str, Any]]:
        """Return the model in main memory, and which of its weights were missing or others."""
        with self._explained():
            return auto_class(config).from_pretrained(
                self.name,
                dtype=dtype,
                use_safetensors=None if self.allow_pickle else True,
                output_loading_info=True,
                trust_remote_code=self.trust_remote_code,
            )

    def empty(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Return the model by its config alone, in evaluation mode."""
        trust = self.trust_remote_code
        with self._explained():
            auto = auto_class(config)
            return auto.from_config(config, dtype=dtype, trust_remote_code=trust).eval()

    def files(self) -> dict[str, Path]:
        """Return the local file of every tensor, empty where there are no safetensors."""
        if shards := self.shards():
            files = {shard: self._file(shard) for shard in set(shards.values())}
            if missing := sorted(shard for shard, file in files.items() if file is None):
                raise GblmError(f"model {self.name} lacks {', '.join(missing[:3])}; fetch it again")
            return {name: file for name, shard in shards.items() if (file := files[shard])}
        single = self._file(SAFE_WEIGHTS_NAME)
        return dict.fromkeys(tensor_shapes(single), single) if single else {}

    def shards(self) -> dict[str, str]:
        """Return the shard of every tensor, empty where there is but one.

        Raises `GblmError` where the index is damaged, or names a file that is not beside it: a path
        such as `../x.safetensors` would lead the result out of its folder as well.
        """
        index = self._file(INDEX)
        if index is None:
            return {}
        with explained(f"{index} is no index of shards", "fetch it again"):
            shards: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
            strange = [name for name in shards.values() if not SHARD.fullmatch(name)]
        if strange or not shards:
            what = f"names {strange[0]!r} as a shard" if strange else "names no shard"
            raise GblmError(f"{index} {what}; a shard is a .safetensors file in the same folder")
        return shards

    def dtype(self) -> torch.dtype | None:
        """Return the dtype of its first floating tensor, None where it has no safetensors."""
        file = self._file(next(iter(self.shards().values()), SAFE_WEIGHTS_NAME))
        tensors = read_tensors(file).values() if file else ()  # mapped, not read
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)

    def _file(self, name: str) -> Path | None:
        """Return a file of it, fetched where need be; None where there is none."""
        file = cached_file(
            self.name,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return Path(file) if file else None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn whatever the files, the hub or the config have against it into a `GblmError`."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            if not isinstance(error, OSError | ValueError | RuntimeError):
                text = f"{type(error).__name__}: {text}"
            what, way = next(ERRORS[word] for word in ERRORS if word in text)
            raise GblmError(
                f"model {self.name} cannot be loaded: {(what or text)[:300]}; {way}"
            ) from error


def reshard(folder: Path, shards: Mapping[str, str]) -> None:
    """Write the tensors of the single file in a folder anew into the given shards."""
    single = folder / SAFE_WEIGHTS_NAME
    parts: dict[str, list[str]] = {shard: [] for shard in sorted(set(shards.values()))}
    names = sorted(tensor_shapes(single))
    if not set(names) <= set(shards):
        return  # transformers writes this family in another form than it came in
    for name in names:
        parts[shards[name]].append(name)
    write_shards(folder, parts, lambda shard: read_tensors(single, parts[shard]))
    single.unlink()
