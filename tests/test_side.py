"""A side of its own: a folder that classifies sounds goes through the command as it is."""

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gblm import GblmError
from gblm.command import settings as shell
from gblm.command.side import main
from gblm.machine.program import guarded

MODELS = '''
"""Classifiers of sounds: load and save."""
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gblm import GblmError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Ear(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList([Block(), Block()])

    def trunk(self, sounds):
        x = self.stem(sounds)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, sounds):
        return self.head(self.trunk(sounds).mean(dim=1))


def load(folder):
    file = Path(folder) / "ear.safetensors"
    if not file.exists():
        raise GblmError(f"model {folder}: no {file.name} in it; give a folder of one")
    model = Ear()
    model.load_state_dict(load_file(file))
    return model.eval()


def save(model, folder):
    save_file(model.state_dict(), Path(folder) / "ear.safetensors")
'''

DATA = '''
"""Sounds: a file of frames and labels."""
import torch


def read(file, samples=None):
    found = torch.load(file)
    return {name: value[:samples] for name, value in found.items()}
'''

ADAPTER = '''
"""What the core must know of the classifiers."""
from torch.nn import functional as F

from gblm import Adapter


def loss(model, hidden, batch):
    return F.cross_entropy(model.head(hidden.mean(dim=1)), batch["labels"], reduction="none")


def adapter(model):
    return Adapter(
        blocks=lambda model: {f"blocks.{i}": own for i, own in enumerate(model.blocks)},
        trunk=lambda model, batch: model.trunk(batch["sounds"]),
        loss=loss,
    )
'''

EVALUATE = '''
"""Accuracy on sounds."""
import torch


def accuracy(model, batch):
    with torch.no_grad():
        return (model(batch["sounds"]).argmax(dim=-1) == batch["labels"]).float().mean().item()
'''

MAIN = '''
"""Prune a classifier of sounds."""
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated

from gblm.command.job import Opened
from gblm.command.settings import CALIBRATION, COUNT, Settings
from gblm.command.side import Side
from gblm.report import clock
from hearing import adapters, data, evaluate, models


@dataclass(frozen=True, kw_only=True)
class SoundSettings(Settings):
    """The flags of this side."""

    frames: Annotated[int, CALIBRATION(COUNT, "N")] = 0
    """frames of a sound [all]"""


@dataclass(kw_only=True)
class Heard(Opened):
    """A classifier of sounds with its evaluation sounds."""

    sets: dict

    def evaluate(self, bars):
        return {
            name: {"acc": evaluate.accuracy(self.model, batch)} for name, batch in self.sets.items()
        }

    def save(self, folder):
        models.save(self.model, folder)


def load(settings, device, scratch, seconds):
    with clock(seconds, "load"):
        model = models.load(settings.model).to(device)
    with clock(seconds, "data"):
        batch = data.read(settings.calibration, settings.samples)
        frames = settings.frames or batch["sounds"].shape[1]
        batch["sounds"] = batch["sounds"][:, :frames]
        sets = {source: data.read(source) for source in settings.evaluate}
    return Heard(
        replace(settings, frames=frames),
        model,
        batch,
        adapters.adapter(model),
        f"{len(batch['labels'])} sounds from {settings.calibration}",
        notes=["heard once"],
        sets=sets,
    )


@contextmanager
def sketch(settings, device):
    yield load(settings, device, None, {})


SIDE = Side(
    program="python -m hearing",
    about="Prune a classifier of sounds.",
    examples="examples:\\n  python -m hearing --model DIR --calibration FILE.pt",
    kind=SoundSettings,
    load=load,
    sketch=sketch,
    usual={"method": ("gblm",), "sparsity": ("0.5",), "alpha": "auto", "samples": 8},
)
'''


@pytest.fixture
def hearing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The command of a side that is a folder outside of gblm, with a model and sounds."""
    folder = tmp_path / "hearing"
    folder.mkdir()
    files = {"models": MODELS, "data": DATA, "adapters": ADAPTER, "evaluate": EVALUATE}
    for name, text in {"__init__": '"""Sounds."""', **files, "__main__": MAIN}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    side = importlib.import_module("hearing.__main__").SIDE
    models = importlib.import_module("hearing.models")
    torch.manual_seed(0)
    (tmp_path / "ear").mkdir()
    models.save(models.Ear(), tmp_path / "ear")
    sounds = {"sounds": torch.randn(12, 6, 8), "labels": torch.arange(12) % 3}
    torch.save(sounds, tmp_path / "sounds.pt")

    def run(*argv: str, given: Sequence[str] = GIVEN) -> int:
        return main(side, [*given, *argv])

    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "hearing"]:
        del sys.modules[name]


GIVEN = ("--model", "ear", "--calibration", "sounds.pt", "--evaluate", "sounds.pt")


def test_help_has_the_flags_of_both(hearing, capsys):
    assert hearing("--help", given=()) == 0
    said = capsys.readouterr().out
    assert "python -m hearing --model DIR --calibration FILE.pt" in said
    assert "--frames N" in said
    assert "frames of a sound [all]" in said
    assert "--sparsity PATTERNS" in said
    assert hearing("--completion", "bash", given=()) == 0
    assert "--frames" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(hearing, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*.*"))
    assert hearing("--dry-run", "--output", "pruned", "--exclude", "*.1.down") == 0
    said = capsys.readouterr().out
    assert "ear: 2 blocks, blocks.0 … blocks.1" in said
    assert "in 3 linear layers" in said
    assert "1 × down: excluded" in said
    assert sorted(tmp_path.rglob("*.*")) == before


def test_a_model_is_pruned_reported_and_the_run_repeated(hearing, tmp_path, capsys):
    more = ["--method", "wanda,gblm", "--compute-dtype", "float32", "--report", "shown"]
    assert hearing(*more, "--output", "pruned") == 0
    said = capsys.readouterr().out
    assert "ear: acc, pruned with 8 sounds from sounds.pt" in said
    assert "heard once" in said
    assert "written to pruned" in said
    folder = tmp_path / "pruned" / "gblm-0.5"
    weights = load_file(folder / "ear.safetensors")
    for name, value in weights.items():
        dropped = name.startswith("blocks") and name.endswith("weight")
        assert (value == 0).float().mean() == (0.5 if dropped else 0)
    report = json.loads((folder / "report.json").read_text())
    assert report["evaluation"]["sounds.pt"]["metric"] == "acc"
    assert report["compute_dtype"] == "float32"
    assert report["calibration"] == "8 sounds from sounds.pt"
    assert {"load", "data", "gradients", "prune", "evaluate"} <= set(report["seconds"])
    assert "gblm" in (tmp_path / "shown" / "gblm-0.5" / "report.html").read_text()
    text = (folder / shell.NAME).read_text()
    assert "frames = 6" in text
    assert 'compute-dtype = "float32"' in text
    assert 'model = "ear"' in text
    assert hearing("--output", "again", given=("--config", str(folder / shell.NAME))) == 0
    again = tmp_path / "again"
    assert (again / shell.NAME).read_text() == text
    files = (place / "ear.safetensors" for place in (folder, again))
    assert next(files).read_bytes() == next(files).read_bytes()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "sounds.pt"], "no ear.safetensors in it"),
        (["--frame", "3"], "did you mean --frames"),
        (["--frames", "0"], "frames '0' is not a whole number of 1 or more"),
        (["--sparsity", "2:5"], "blocks.0.up [32, 16]"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(argv, said, hearing, tmp_path, capsys):
    assert hearing(*argv, "--output", "pruned") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no model to prune; name one by --model"),
        (["--model", "ear"], "nothing to calibrate on; give"),
        (["--model", ""], "model '' is not a string; see --help"),
    ],
)
def test_what_is_missing_is_said(argv, said, hearing, capsys):
    assert hearing(*argv, given=()) == 2
    assert said in capsys.readouterr().err


def swallowed() -> None:
    """Press Ctrl-C in code that makes an error of its own of it, as some of torch's does."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_an_interrupt_is_one_whatever_native_code_makes_of_it(capsys: pytest.CaptureFixture[str]):
    before = signal.getsignal(signal.SIGINT)
    assert guarded(swallowed) == 130
    assert guarded(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.count("interrupted:") == 2
    assert guarded(failing(GblmError("no model"))) == 2
    assert guarded(lambda: None) == 0
    with pytest.raises(ValueError, match="a bug"):
        guarded(failing(ValueError("a bug")))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_has_read_enough_is_no_error():
    command = f"{sys.executable} -m gblm.llm --list methods | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
