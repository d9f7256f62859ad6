"""Evaluation, and models from and into files."""

import json
import math
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gblm.base import GblmError
from gblm.vit.data import evaluation, open_images
from gblm.vit.evaluate import evaluate
from gblm.vit.models import load, predicted, save

ASSETS = Path(os.environ.get("GBLM_ASSETS", "missing"))
NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "depth": 1, "embed_dim": 8, "num_heads": 1, "num_classes": 7}


class Fixed(nn.Module):
    """Gives logits that are the images."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return self.scale * images


def test_evaluate() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [3, 2, 1, 0, -1, -2], [0, 0, 0, 0, 0, 9]])
    labels = torch.tensor([0, 5, 4])
    batches = [
        {"images": logits[:2], "labels": labels[:2]},
        {"images": logits[2:], "labels": labels[2:]},
    ]
    seen: list[tuple[int, int]] = []
    model = Fixed().train()
    found = evaluate(model, batches, lambda done, total: seen.append((done, total)))
    assert model.training
    assert found["top1"] == pytest.approx(100 / 3)
    assert found["top5"] == pytest.approx(200 / 3)
    expected = nn.functional.cross_entropy(logits, labels).item()
    assert found["cross_entropy"] == pytest.approx(expected)
    assert seen == [(1, 2), (2, 2)]
    two = evaluate(model, [{"images": torch.eye(2), "labels": torch.tensor([0, 0])}])
    assert (two["top1"], two["top5"]) == (50, 100)
    assert two["cross_entropy"] == pytest.approx(math.log(1 + math.e) - 0.5)
    with pytest.raises(GblmError, match="no labels"):
        evaluate(model, [{"images": logits}])
    with pytest.raises(GblmError, match="no image"):
        evaluate(model, [])


def test_predicted_labels() -> None:
    batch = predicted(Fixed(), {"images": torch.eye(5)}, step=2)
    assert batch["labels"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", [NAME, "convnext_atto", "deit_tiny_distilled_patch16_224"])
def test_a_saved_model_is_loaded_by_timm(tmp_path: Path, name: str) -> None:
    options = SMALL if name != "convnext_atto" else {"depths": (1,) * 4, "dims": (8,) * 4}
    model = timm.create_model(name, **options).eval()
    images = torch.randn(2, 3, 32, 32)
    save(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    file = tmp_path / "model.safetensors"
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name
    for again in (
        timm.create_model(name, checkpoint_path=str(file), **options),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
        load(str(tmp_path)),
        load(f"local-dir:{tmp_path}"),
        load(name, file, **options),
    ):
        assert torch.equal(again.eval()(images), model(images))


def test_bad_models(tmp_path: Path) -> None:
    with pytest.raises(
        GblmError, match="unknown model 'vit_tiny_patch16_22'; did you mean vit_tiny"
    ):
        load("vit_tiny_patch16_22")
    with pytest.raises(GblmError, match=r"no config.json"):
        load(str(tmp_path))
    with pytest.raises(GblmError, match=r"no config.json"):
        load(f"local-dir:{tmp_path}/none")
    with pytest.raises(GblmError, match="no such file"):
        load(NAME, tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"none")
    with pytest.raises(GblmError, match="cannot be read"):
        load(NAME, broken)
    model = timm.create_model(NAME, **SMALL)
    file = tmp_path / "weights.safetensors"
    save_file({"other": torch.zeros(1), **model.state_dict()}, file)
    with pytest.raises(GblmError, match=r"does not fit .*other is not of the model; give"):
        load(NAME, file, **SMALL)
    state = {key: value for key, value in model.state_dict().items() if key != "cls_token"}
    save_file(state, file)
    with pytest.raises(GblmError) as caught:
        load(NAME, file, **SMALL | {"num_classes": 9, "embed_dim": 16})
    message = str(caught.value)
    assert "cls_token is missing; pos_embed is [1, 5, 8], not [1, 5, 16]" in message
    assert " more;" in message
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME}))
    with pytest.raises(GblmError, match=r"no model.safetensors in it; give --checkpoint"):
        load(str(tmp_path))
    headless = timm.create_model(NAME, **SMALL | {"num_classes": 0})
    save_file(headless.state_dict(), file)
    with pytest.raises(GblmError, match="has no head"):
        load(NAME, file, **SMALL | {"num_classes": 0})


@pytest.mark.slow
@pytest.mark.skipif(not ASSETS.is_dir(), reason="GBLM_ASSETS is no folder")
def test_dense_accuracy_of_vit_tiny() -> None:
    model = load(NAME, ASSETS / f"{NAME}.safetensors")
    images = open_images(str(ASSETS / "imagenet-mini" / "val"), model, "evaluation")
    found = evaluate(model, evaluation(images))
    assert found["top1"] == 89.2
    assert found["cross_entropy"] == pytest.approx(0.454, abs=5e-4)


@pytest.mark.skipif(not ASSETS.is_dir(), reason="GBLM_ASSETS is no folder")
def test_a_choice_of_imagenet_mini() -> None:
    model = load(NAME, ASSETS / f"{NAME}.safetensors")
    assert set(model.state_dict()) == set(load_file(ASSETS / f"{NAME}.safetensors"))
    images = open_images(str(ASSETS / "imagenet-mini" / "val"), model, "evaluation")
    assert evaluate(model, evaluation(images, limit=24))["top1"] > 75
