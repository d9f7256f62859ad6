"""Top-1 and top-5 as timm's validate.py has them."""

import json
import sys
from pathlib import Path

import imagenet
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy

from gblm import GblmError
from gblm.vit import data


def validated(
    model: torch.nn.Module, root: Path, classes: list[str], folder: Path
) -> tuple[float, float]:
    """Return top-1 and top-5 the way of validate.py: timm's data set, loader and meters."""
    names = folder / "classes.txt"
    names.write_text("\n".join(classes))
    config = resolve_data_config({}, model=model, use_test_size=True)
    loader = create_loader(
        create_dataset("", root=str(root), class_map=str(names)),
        input_size=config["input_size"],
        batch_size=32,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        device=torch.device("cpu"),
    )
    top1, top5 = AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, labels in loader:
            one, five = accuracy(model(images), labels, topk=(1, min(5, len(classes))))
            top1.update(one.item(), len(labels))
            top5.update(five.item(), len(labels))
    return top1.avg, top5.avg


def measure(*arguments: str) -> dict:
    return imagenet.measure(imagenet.parser().parse_args([*arguments, "--device", "cpu"]))


def test_a_folder_of_synsets_is_judged_as_timm_judges_it(assets, tmp_path):
    root = tmp_path / "val"
    root.mkdir()
    for folder in sorted((assets / "imagenet-mini" / "val").iterdir())[:16]:
        (root / folder.name).symlink_to(folder)
    weights = assets / "vit_tiny_patch16_224.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(weights)).eval()
    found = measure("vit_tiny_patch16_224", "--checkpoint", str(weights), "--data", str(root))
    top1, top5 = validated(model, root, ImageNetInfo().label_names(), tmp_path)
    assert found["images"] > 16
    assert (found["top1"], found["top5"]) == (round(top1, 4), round(top5, 4))
    assert 50 < found["top1"] < 100
    assert (found["img_size"], found["crop_pct"]) == (224, 0.9)
    assert found["param_count"] == 5.72


@pytest.mark.slow
def test_the_dense_figure_of_the_whole_folder(assets):
    weights = assets / "vit_tiny_patch16_224.safetensors"
    folder = assets / "imagenet-mini" / "val"
    found = measure("vit_tiny_patch16_224", "--checkpoint", str(weights), "--data", str(folder))
    assert (found["images"], found["top1"]) == (500, 89.2)


def test_other_classes_are_those_of_the_folders(vit, tmp_path):
    model = timm.create_model(f"local-dir:{vit[2]}", pretrained=True).eval()
    found = measure(vit[2], "--data", vit[4])
    top1, top5 = validated(model, Path(vit[4]), ["class0", "class1", "class2"], tmp_path)
    assert found["top1"] == pytest.approx(top1, abs=1e-3)
    assert found["top5"] == top5 == 100
    assert found["img_size"] == 32


def test_a_model_is_judged_at_the_size_it_is_tested_at(tmp_path):
    # Trained at 224 pixels, tested at 288.
    model = timm.create_model("resnet18.a1_in1k", num_classes=2).eval()
    assert data.config(model)["input_size"] == (3, 224, 224)
    tested = data.config(model, test_size=True)
    assert (tested["input_size"], tested["crop_pct"]) == ((3, 288, 288), 1.0)
    picture = Image.new("RGB", (400, 300))
    assert data.preprocessing(model, test_size=True)(picture).shape == (3, 288, 288)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        picture.save(tmp_path / "images" / name / "0.png")
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    saved = [str(tmp_path / "saved"), "--data", str(tmp_path / "images")]
    assert measure(*saved)["img_size"] == 288
    trained = measure(*saved, "--use-train-size")
    assert trained["img_size"] == 224
    assert trained["top1"] == 50  # two equal pictures of two classes


def test_a_choice_is_of_so_many_and_no_image_is_an_error(vit, tmp_path):
    assert measure(vit[2], "--data", vit[4], "--limit", "5")["images"] == 5
    with pytest.raises(GblmError, match="no image in it"):
        measure(vit[2], "--data", str(tmp_path))


def test_the_command_writes_page_and_json(vit, tmp_path, monkeypatch):
    page = tmp_path / "imagenet.md"
    arguments = [vit[2], "--data", vit[4], "--device", "cpu", "--write", str(page)]
    monkeypatch.setattr(sys, "argv", ["eval/imagenet.py", *arguments])
    imagenet.main()
    found = json.loads((tmp_path / "imagenet-tiny.json").read_text())
    assert f"| tiny | {found['top1']:.2f} ±" in page.read_text()
    assert "12 images of images, 32 pixels" in page.read_text()
    assert found["top1_err"] == round(100 - found["top1"], 4)
