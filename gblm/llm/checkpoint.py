"""A checkpoint of transformers: checked and read, in a local folder or on the hub."""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from gblm.base import GblmError, explained
from gblm.llm import demo
from gblm.llm.heads import auto_class
from gblm.machine.carry import WEIGHTS, Source
from gblm.machine.files import INDEX, read_tensors, tensor_shapes
from gblm.packed import packed_files

SCALE = re.compile(
    r"(.*weight)_scale(_inv)?|(.*)\.(qweight|weight_packed|SCB)"
)  # of quantised weights
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
    """A model in a local folder or on the hub, by its name, there with `@revision` or without.

    A name that ends in `/FILE.gguf` is that file of it, which transformers dequantises. Its own
    code runs only with `trust_remote_code`, weights other than safetensors are read only with
    `allow_pickle`. Raises `GblmError` for what is missing or damaged as it is asked for.
    """

    name: str
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def gguf(self) -> str:
        """The GGUF file that the name ends in, empty for none."""
        return Path(self.name).name if self.name.endswith(".gguf") else ""

    @property
    def local(self) -> Path:
        """The folder that the name would be locally; that of `demo` is in the package."""
        path = demo.FOLDER if self.name == demo.NAME else Path(self.name).expanduser()
        return path.parent if self.gguf else path

    @property
    def options(self) -> dict[str, Any]:
        """What every `from_pretrained` is given."""
        if self.local.exists():
            place: dict[str, Any] = {"pretrained_model_name_or_path": str(self.local)}
        else:
            name, _, revision = self.name.removesuffix(f"/{self.gguf}").partition("@")
            place = {"pretrained_model_name_or_path": name, "revision": revision or "main"}
        if self.gguf:
            place["gguf_file"] = self.gguf
        return place | {"trust_remote_code": self.trust_remote_code}

    def check(self) -> None:
        """Raise `GblmError` where a local folder is missing, empty or damaged."""
        name, folder = self.name, self.local
        if self.gguf and not (find_spec("gguf") and hasattr(transformers, "GgufConfig")):
            way = "pip install 'gblm[gguf]', or give a folder of safetensors"
            raise GblmError(f"model {name} is read with gguf, which is not installed; {way}")
        if not folder.exists():
            # The hub has models without an owner too, such as gpt2.
            if name.count("/") > 1 + bool(self.gguf) or name.startswith((".", "/", "~")):
                raise GblmError(f"model {name}: no such folder; give a folder or a hub name")
            return
        if self.gguf:
            if not (folder / self.gguf).is_file():
                raise GblmError(f"model {name}: no such file; give a GGUF file, or a folder")
            return
        if not folder.is_dir():
            raise GblmError(f"model {name} is a file; give the folder that holds config.json")
        if not any(folder.iterdir()):
            raise GblmError(f"model folder {name} is empty; give one that save_pretrained wrote")
        if not (folder / "config.json").is_file():
            own = next(folder.glob("*.gguf"), None)
            way = f"name {own}" if own else "give one of save_pretrained"
            raise GblmError(f"model folder {name} has no config.json; {way}")
        if packed_files(folder):
            way = "python -m gblm.packed unpack writes its ordinary form; prune that"
            raise GblmError(f"model folder {name} is packed; {way}")
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
            own, _ = PreTrainedConfig.get_config_dict(**self.options)
            if "architecture" in own and "model_type" not in own:
                raise GblmError(f"model {self.name} is one of timm; prune it by gblm vit")
            config = AutoConfig.from_pretrained(**self.options)
        if getattr(config, "quantization_config", None):
            raise GblmError(self._quantised("config.json has a quantization_config"))
        named = getattr(config, "architectures", None) or ()
        if config.model_type == "timm_wrapper" or any(IMAGES in name for name in named):
            raise GblmError(f"model {self.name} is an image classifier; prune it by gblm vit")
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return its tokenizer."""
        with self._explained():
            tokenizer = AutoTokenizer.from_pretrained(**self.options)
            tokenizer("a", verbose=False)  # some values of its config are only looked at now
            return tokenizer

    def processor(self) -> Any:
        """Return its processor of pictures and text."""
        with self._explained():
            return AutoProcessor.from_pretrained(**self.options)

    def model(
        self, config: PreTrainedConfig, dtype: torch.dtype | str
    ) -> tuple[Any, dict[str, Any]]:
        """Return the model in main memory, and which of its weights were missing or others."""
        options = self.options
        if self.gguf:
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with self._explained():
            return auto_class(config).from_pretrained(
                **options,
                dtype=dtype,
                use_safetensors=None if self.allow_pickle else True,
                output_loading_info=True,
            )

    def empty(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Return the model by its config alone, in evaluation mode."""
        trust = self.trust_remote_code
        with self._explained(), no_init_weights():
            auto = auto_class(config)
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trust).eval()
            model.tie_weights()  # a part of what is left out
            return model

    def folder(self) -> Path:
        """Return the folder of its files beside the weights, fetched where need be."""
        if self.local.exists():
            return self.local
        name, revision = self.options["pretrained_model_name_or_path"], self.options["revision"]
        others = [f"*{ending}" for ending in WEIGHTS]
        with self._explained():
            return Path(snapshot_download(name, revision=revision, ignore_patterns=others))

    def source(self, model: PreTrainedModel | None = None) -> Source:
        """Return its tensors on disk, by the names of a model of it; none without safetensors.

        Raises `GblmError` where some are quantised, or are those of an adapter.
        """
        if self.gguf:
            return Source()
        files = self.files()
        kept = {name for file in set(files.values()) for name in _narrow(file)}
        scales = {
            name for name in files if (match := SCALE.fullmatch(name)) and _beside(match, files)
        }
        if quantised := sorted(kept | scales):
            raise GblmError(self._quantised(f"its weights hold {quantised[0]}"))
        if self._file("adapter_config.json"):
            raise GblmError(
                f"model {self.name} is an adapter, or holds one; merge it first "
                "(merge_and_unload of peft) and save the whole model in a folder of its own"
            )
        if model is None:
            return Source(files)
        source = Source(files, self.folder())
        if source.holds(model):
            return source
        return replace(source, named=partial(revert_weight_conversion, model))

    def files(self) -> dict[str, Path]:
        """Return the local file of every tensor, empty where there are no safetensors.

        Of a single file and an index the file is read, as transformers does; raises `GblmError`
        where they lie side by side in a local folder and name other files.
        """
        if self.gguf:
            return {}
        single = self._file(SAFE_WEIGHTS_NAME)
        shards = {} if single and not self.local.exists() else self.shards()
        if single and set(shards.values()) - {SAFE_WEIGHTS_NAME}:
            raise GblmError(
                f"model {self.name} holds both {SAFE_WEIGHTS_NAME} and an index of shards; remove "
                f"{INDEX} or that file, whichever is stale"
            )
        if single:
            return dict.fromkeys(tensor_shapes(single), single)
        files = {shard: self._file(shard) for shard in set(shards.values())}
        if missing := sorted(shard for shard, file in files.items() if file is None):
            raise GblmError(f"model {self.name} lacks {', '.join(missing[:3])}; fetch it again")
        held = {name: file for file in files.values() if file for name in tensor_shapes(file)}
        if wrong := sorted(
            name for name, shard in shards.items() if held.get(name) != files[shard]
        ):
            raise GblmError(
                f"model {self.name}: {INDEX} is stale: it names {shards[wrong[0]]} for {wrong[0]}, "
                "which is not in that file; fetch or write the model again"
            )
        return held

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
        """Return the floating dtype of most of its bytes, None where it has no safetensors."""
        return Source(self.files()).dtype

    def _quantised(self, what: str) -> str:
        return (
            f"model {self.name} is quantised ({what}); load it dequantised in transformers "
            "(a quantization_config with dequantize=True), save_pretrained that, and prune it"
        )

    def _file(self, name: str) -> Path | None:
        """Return a file of it, fetched where need be; None where there is none."""
        options = {**self.options, "path_or_repo_id": self.options["pretrained_model_name_or_path"]}
        file = cached_file(
            options["path_or_repo_id"],
            name,
            revision=options.get("revision"),
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
        except GblmError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            if not isinstance(error, OSError | ValueError | RuntimeError):
                text = f"{type(error).__name__}: {text}"
            what, way = next(ERRORS[word] for word in ERRORS if word in text)
            raise GblmError(
                f"model {self.name} cannot be loaded: {(what or text)[:300]}; {way}"
            ) from error


def _narrow(file: Path) -> list[str]:
    """Return the weights in a file that are no numbers of 16 bits or more."""
    return [
        name
        for name, own in read_tensors(file).items()
        if name.endswith("weight") and (own.itemsize < 2 or not own.is_floating_point())
    ]


def _beside(match: re.Match[str], files: Collection[str]) -> bool:
    """Say whether a scale stands beside its weight; packed weights stand for themselves."""
    return match[1] is None or match[1] in files
