"""The command `python -m gblm.vit`: its flags, its results, and what it says of bad input."""

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

from gblm import METHODS
from gblm.command.settings import flags
from gblm.llm.__main__ import SIDE as LLM
from gblm.vit import data
from gblm.vit.__main__ import SIDE, main

OWN = ["--checkpoint", "--evaluate-images", "--unlabelled", "--workers"]
OF_LANGUAGE = [
    "--allow-pickle",
    "--evaluate-windows",
    "--also",
    "--exact-match",
    "--length",
    "--trust-remote-code",
    "--task-data",
    "--task-limit",
    "--tasks",
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
    assert main(command(folder, images, "--output", str(output), "--evaluate", str(images))) == 0
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
        where = tmp_path / "images" / f"class{index % 2}"
        where.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / f"{index:03}.png")
    (tmp_path / "images" / "class0" / "000.png").write_bytes(b"no image")
    output = tmp_path / "pruned"
    more = ["--evaluate", str(tmp_path / "images"), "--output", str(output), "--method", "wanda"]
    assert main(command(folder, tmp_path / "images", *more)) == 0
    notes = json.loads((output / "report.json").read_text())["notes"]
    assert sum("2 classes, by rank the first of the model's 3" in note for note in notes) == 2
    (broken,) = [note for note in notes if "broken" in note]  # none of the 8 of calibration is
    assert broken.startswith("evaluation images")
    assert "1 broken and skipped: class0/000.png (UnidentifiedImageError" in broken


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
    "alpha": (["--alpha", "much"], "neither auto nor a number"),
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
