"""The command `python -m gblm.vit`: its flags, its results, and what it says of bad input."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from gblm import METHODS, GblmError
from gblm.command.settings import flags
from gblm.llm.__main__ import SIDE as LLM
from gblm.vit import data, models
from gblm.vit.__main__ import SIDE, main

OWN = [
    "--class-map",
    "--img-size",
    "--num-classes",
    "--checkpoint",
    "--evaluate-images",
    "--workers",
]
OF_LANGUAGE = [
    "--allow-pickle",
    "--evaluate-windows",
    "--also",
    "--bos",
    "--exact-match",
    "--experts",
    "--length",
    "--trust-remote-code",
    "--task-data",
    "--task-limit",
    "--tasks",
    "--template",
]


def test_flags_are_those_of_language_but_for_each_sides_own():
    here, there = ({f"--{key}" for key in flags(side.app())} for side in (SIDE, LLM))
    assert here - there == set(OWN)
    assert there - here == set(OF_LANGUAGE)


@pytest.fixture(scope="module")
def images(noisy_pictures: Callable[[int, int], Path]) -> Path:
    return noisy_pictures(40, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ViT of three classes, as timm saves it."""
    where = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    timm.models.save_for_hf(model, where, model_args=sizes, safe_serialization=True)
    return where


def command(folder: Path, images: Path, *more: str) -> list[str]:
    sizes = ["--samples", "8", "--workers", "1"]
    return ["--model", str(folder), "--calibration", str(images), *sizes, *more]


def test_result_loads_in_timm_and_says_what_happened(folder: Path, images: Path, tmp_path: Path):
    output = tmp_path / "pruned"
    given = ["--method", "gblm", "--output", str(output), "--evaluate", str(images)]
    assert main(command(folder, images, *given)) == 0
    model = timm.create_model(f"local-dir:{output}", pretrained=True)
    file = output / "model.safetensors"
    for name, weight in timm.models.load_state_dict(str(file)).items():
        assert torch.equal(weight, model.state_dict()[name])
    dense = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    for name, weight in model.state_dict().items():
        linear = ".attn." in name or ".mlp." in name
        if linear and name.endswith("weight"):
            assert (weight == 0).float().mean() == 0.5
            assert torch.equal(weight, torch.where(weight == 0, 0, dense[name]))
        else:
            assert torch.equal(weight, dense[name])
    report = json.loads((output / "report.json").read_text())
    metrics = {value["metric"]: value for value in report["evaluation"].values()}
    assert set(metrics) == {"top1", "top5", "cross_entropy"}
    assert report["method"] == "gblm(alpha=auto, norm=l1)"
    assert len(report["linears"]) == 8
    assert report["notes"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_every_method_runs_and_unlabelled_says_so(
    folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = ["--method", ",".join(METHODS), "--sparsity", "0.5,2:4", "--unlabelled"]
    assert main(command(folder, images, *more, "--output", str(tmp_path / "all"))) == 0
    said = capsys.readouterr().out
    assert "the model's own predictions" in said
    assert said.count("sparsegpt") == 2
    reports = list(tmp_path.glob("all/*/report.json"))
    assert len(reports) == 2 * len(METHODS)
    for file in reports:
        assert "the model's own predictions" in json.loads(file.read_text())["notes"][-1]


def test_speed_is_measured(folder: Path, images: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("gblm.command.measure.SECONDS", 0)
    monkeypatch.setattr(sys.modules["gblm.gains"], "SECONDS", 0)
    more = ["--measure", "speed", "--method", "magnitude", "--output", str(tmp_path / "pruned")]
    assert main(command(folder, images, *more)) == 0
    speed = json.loads((tmp_path / "pruned" / "report.json").read_text())["speed"]
    assert list(speed) == ["forward of 1", "forward of 16", "memory", "file"]
    assert all(entry["dense"] > 0 for entry in speed.values())


def test_weights_are_those_of_the_checkpoint(folder: Path, images: Path, tmp_path: Path):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.nn.init.constant_(model.norm.weight, 3)
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    more = ["--checkpoint", str(tmp_path / "other.safetensors"), "--method", "wanda"]
    assert main(command(folder, images, *more, "--output", str(tmp_path / "pruned"))) == 0
    pruned = timm.create_model(f"local-dir:{tmp_path / 'pruned'}", pretrained=True)
    assert (pruned.norm.weight == 3).all()


def test_the_report_names_what_was_broken(folder: Path, tmp_path: Path):
    draw = np.random.default_rng(0)
    for index in range(201):
        where = tmp_path / "images" / str(index % 2)
        where.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / f"{index:03}.png")
    (tmp_path / "images" / "0" / "000.png").write_bytes(b"no image")
    output = tmp_path / "pruned"
    more = ["--evaluate", str(tmp_path / "images"), "--output", str(output), "--method", "wanda"]
    assert main(command(folder, tmp_path / "images", *more)) == 0
    notes = json.loads((output / "report.json").read_text())["notes"]
    (broken,) = [note for note in notes if "broken" in note]  # none of the 8 of calibration is
    assert broken.startswith("evaluation images")
    assert "1 broken and skipped: 0/000.png (UnidentifiedImageError" in broken


def ready(folder: Path, size: int, label: int) -> str:
    """Return a file of four ready images."""
    file = folder / "ready.npz"
    images = np.zeros((4, 3, size, size), dtype=np.float32)
    np.savez(file, images=images, labels=np.full(4, label))
    return str(file)


@pytest.mark.parametrize("flag", ["--calibration", "--evaluate"])
@pytest.mark.parametrize(
    ("size", "label", "said"),
    [
        (40, 0, "its images are 3×40×40 and the model takes 3×32×32"),
        (32, 3, "image 0 has label 3, outside the model's 3 classes"),
    ],
)
def test_images_that_do_not_go_with_the_model_are_refused(
    flag: str,
    size: int,
    label: int,
    said: str,
    folder: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    source = ready(tmp_path, size, label)
    assert main([*command(folder, images), "--samples", "4", flag, source]) == 2
    assert said in capsys.readouterr().err


BAD = {
    "unknown model": (["--model", "vit_tiny_patch16_223"], "did you mean vit_tiny_patch16_224"),
    "missing checkpoint": (["--checkpoint", "no/file.safetensors"], "no such file"),
    "missing images": (["--calibration", "no/such/folder"], "no/such/folder"),
    "too few images": (["--samples", "13"], "12 images"),
    "unknown method": (["--method", "sparsegtp"], "did you mean 'sparsegpt'"),
    "m not dividing": (["--sparsity", "2:5"], "blocks.0.attn.qkv [96, 32]"),
    "alpha": (["--method", "gblm", "--alpha", "much"], "neither auto nor a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_end_before_work(
    case: str, folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given, message = BAD[case]
    output = tmp_path / "pruned"
    assert main([*command(folder, images, "--output", str(output)), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_before_an_image_is_decoded(
    folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    usage, decoded = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(data.Images, "batches", lambda *args, **named: decoded.append(args))
    output = ["--evaluate", str(images), "--output", str(tmp_path / "pruned")]
    assert main(command(folder, images, *output)) == 2
    assert "are free" in capsys.readouterr().err
    assert not decoded
    assert not list(tmp_path.iterdir())


def test_a_folder_without_images_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(command(folder, tmp_path)) == 2
    assert "image" in capsys.readouterr().err


def test_a_report_compares_the_runs(folder: Path, images: Path, tmp_path: Path):
    report = tmp_path / "shown"
    more = ["--method", "wanda,magnitude", "--evaluate", str(images), "--report", str(report)]
    assert main(command(folder, images, *more)) == 0
    page = (report / "report.html").read_text()
    assert "2 runs of tiny" in page
    assert "against sparsity" in page
    found = json.loads((report / "wanda-0.5" / "report.json").read_text())
    assert f"of the first 12 images of {images.name}" in found["examples_note"]
    assert found["calibration"] == f"8 images from {images}"
    assert (report / "magnitude-0.5" / "report.html").exists()


def wrapped(kind: str, state: dict, file: Path) -> None:
    """Save weights as people have them."""
    if kind.endswith("safetensors"):
        return save_file(state, file)
    forms = {
        "state_dict": state,
        "DDP": {f"module.{name}": own for name, own in state.items()},
        "compiled": {f"_orig_mod.{name}": own for name, own in state.items()},
        "train.py": {
            "epoch": 3,
            "arch": "vit_tiny_patch16_224",
            "state_dict": state,
            "args": argparse.Namespace(lr=0.1),
            "metric": 91.2,
        },
    }
    torch.save(forms[kind], file)


@pytest.mark.parametrize("kind", ["state_dict", "DDP", "compiled", "train.py", "safetensors"])
def test_a_fine_tuned_checkpoint_has_its_own_classes(kind, images: Path, tmp_path: Path, capsys):
    sizes = {"num_classes": 3, "img_size": 32, "depth": 1}
    torch.manual_seed(0)
    tuned = timm.create_model("vit_tiny_patch16_224", **sizes)
    file = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    wrapped(kind, tuned.state_dict(), file)
    given = command(Path("vit_tiny_patch16_224"), images, "--checkpoint", str(file))
    assert main(given) == 2  # of another image size and depth
    assert "does not fit vit_tiny_patch16_224" in capsys.readouterr().err
    model = models.load("vit_tiny_patch16_224", file, img_size=32, depth=1)
    assert model.num_classes == 3
    assert all(torch.equal(own, model.state_dict()[k]) for k, own in tuned.state_dict().items())
    if kind == "train.py":  # which names its architecture
        again = models.load(str(file), img_size=32, depth=1)
        assert torch.equal(again.head.weight, tuned.head.weight)
    else:
        with pytest.raises(GblmError, match="names no architecture; give that by --model"):
            models.load(str(file))


def test_a_pickle_of_a_whole_model_is_refused_by_name(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(GblmError, match=r"whole.pth .*holds more than weights.*save state_dict"):
        models.load("vit_tiny_patch16_224", tmp_path / "whole.pth")


def test_another_head_needs_its_weights(images: Path, capsys):
    given = ["--num-classes", "3", "--dry-run"]
    assert main(command(Path("vit_tiny_patch16_224"), images, *given)) == 0
    assert "3 × 192" not in capsys.readouterr().out  # the head stays dense
    with pytest.raises(GblmError, match="--num-classes goes with --checkpoint"):
        models.load("vit_tiny_patch16_224", num_classes=3)
