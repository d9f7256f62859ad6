"""Small models and batches that the tests share."""

import gc
import json
import os
import pickle
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The tests run beside each other, and threads of one would wait for those of the others. Where a
# test wants two, they wait asleep.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import torch

if not torch.cuda.is_available():  # before anything imports Triton, which asks it once
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import timm
from hypothesis import HealthCheck, settings
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gblm import Method, Report, Statistics
from gblm.walk.gradients import first, sweep
from gblm.walk.journal import Journal
from gblm.walk.prune import Pruning, method_pattern
from gblm.walk.walk import Walk

VOCABULARY = 64

# Other work may slow the machine down: no example has a limit in time.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is there before the first test: the libraries."""
    gc.collect()
    gc.freeze()


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a random LLaMA of three blocks with grouped-query attention, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that the samples differ in more than rounding
    )
    model = LlamaForCausalLM(config).eval()
    if dtype == torch.float64:  # the norm of transformers computes in fp32 whatever the model is
        for name, module in list(model.named_modules()):
            if isinstance(module, LlamaRMSNorm):
                model.set_submodule(name, nn.RMSNorm(32, eps=module.variance_epsilon))
    return model.to(dtype)


def random_batch(samples: int = 7, length: int = 12) -> dict[str, Tensor]:
    """Return random windows `input_ids [samples, length]`, the same every time."""
    ids = torch.randint(
        VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(samples)
    )
    return {"input_ids": ids}


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., nn.Module]:
    return tiny_llama


def prune_by(
    model: nn.Module,
    batch: dict[str, Tensor],
    method: Method,
    pattern: str = "0.5",
    *,
    gradients: Mapping[str, Statistics] | None = None,
    journal: Journal | None = None,
    backward: str = "auto",
    folder: Path | None = None,
    **walk: Any,
) -> Report:
    """Prune with a journal, a folder or gradients of the test's own, as a command does."""
    way = Walk.of(model, batch, folder=folder, **walk)
    pruning = Pruning(way, method, method_pattern(method, pattern), gradients or {}, journal)
    if pruning.needs and gradients is None:
        share = first(model, batch, way.adapter, method.share)
        pruning.gradients = sweep(
            Walk.of(model, share, folder=folder, **walk), pruning.needs, backward
        )[0]
    return pruning.run()


@pytest.fixture(scope="session")
def prune() -> Callable[..., Report]:
    return prune_by


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, Tensor]]:
    return random_batch


@pytest.fixture
def llama() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def llama64() -> nn.Module:
    return tiny_llama(torch.float64)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return random_batch()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads instead of one, for what could depend on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def assets() -> Path:
    """Return the folder of real models and data, which the environment names."""
    folder = os.environ.get("GBLM_ASSETS")
    if not folder:
        pytest.skip("GBLM_ASSETS is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The arguments of a LLaMA of two blocks with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("llm")
    tokenizer.save_pretrained(folder / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that pruning shows in the perplexity
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    text = folder / "notes.txt"
    text.write_text("".join(f"line {i} of the notes, {i * i}\n" for i in range(400)))
    sources = ["--calibration", str(text), "--evaluate", str(text)]
    sizes = ["--samples", "6", "--length", "16", "--windows", "8", "--device", "cpu"]
    return ["llm", "--model", str(folder / "tiny"), *sources, *sizes]


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a ViT of two blocks and three classes with twelve noisy pictures."""
    folder = tmp_path_factory.mktemp("vit")
    draw = np.random.default_rng(0)
    for index in range(12):
        (folder / "images" / f"class{index % 3}").mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"class{index % 3}" / f"{index}.png")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    timm.models.save_for_hf(model, folder / "tiny", model_args=sizes, safe_serialization=True)
    sources = ["--calibration", str(folder / "images"), "--evaluate", str(folder / "images")]
    return ["vit", "--model", str(folder / "tiny"), *sources, "--samples", "8", "--device", "cpu"]


@dataclass
class Sealed:
    """A place to run a command in, whose files, home and temporary folder are watched.

    `run` returns the exit code and what was said on stderr. It fails where the command raises,
    says something other than one error with a way out, or changes anything but `allowed`.
    """

    root: Path
    capsys: pytest.CaptureFixture[str]

    def tree(self, *allowed: Path) -> dict[str, object]:
        found: dict[str, object] = {}
        for path in sorted(self.root.rglob("*")):
            if any(path == one or one in path.parents for one in allowed):
                continue
            state = path.lstat()
            what = state.st_mtime_ns if stat.S_ISREG(state.st_mode) else None
            found[str(path.relative_to(self.root))] = (state.st_mode, what)
        return found

    def run(
        self, main: Callable[[Sequence[str]], int], argv: Sequence[str], *allowed: Path
    ) -> tuple[int, str]:
        before = self.tree(*allowed)
        self.capsys.readouterr()
        code = main(argv)
        error = self.capsys.readouterr().err
        assert self.tree(*allowed) == before, "something was written elsewhere"
        assert "Traceback" not in error
        assert code in (0, 2)
        if code == 2:
            _, found, said = error.rpartition("error: ")
            assert found
            assert "; " in said, "what is wrong; the way out"
        return code, error

    def result(self, output: Path) -> dict[str, object]:
        """Return every bit of the weights in a folder of results, and what was measured."""
        found: dict[str, object] = {}
        for file in sorted(output.rglob("*.safetensors")):
            found[str(file.relative_to(output))] = file.read_bytes()
        for file in sorted(output.rglob("report.json")):
            report = json.loads(file.read_text())
            errors = [linear["relative_error"] for linear in report["linears"]]
            found[str(file.relative_to(output))] = (report["evaluation"], errors)
        return found


@pytest.fixture
def sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Sealed:
    """An empty place with a home, a temporary folder and a working directory of its own."""
    for name in ("home", "tmp", "here/deep"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "here" / "deep")
    return Sealed(tmp_path, capsys)


class Hostile:
    """What writes a file when its pickle is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.mark, "loaded")


@pytest.fixture
def hostile(sealed: Sealed) -> Hostile:
    """An object whose pickle writes `mark`, shown to do so."""
    mark = sealed.root / "mark"
    pickle.loads(pickle.dumps(Hostile(mark)))
    mark.unlink()
    return Hostile(mark)
