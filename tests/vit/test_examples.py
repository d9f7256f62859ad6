"""The images whose prediction changes: which, in what order, with what names, as pictures."""

import base64
import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from gblm.vit.examples import COMPARED, SHOWN, Changed, class_names


class Answers(nn.Module):
    """A classifier whose answers are given: the class of image i is answers[i]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.num_classes = classes
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers: list[int] = []
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}

    def forward(self, images):
        answers = torch.tensor(self.answers)[images[:, 0, 0, 0].round().long()]
        return nn.functional.one_hot(answers, self.num_classes).float()


def batches(labels: list[int], size: int = 5) -> list[dict]:
    images = torch.arange(len(labels)).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    parts = zip(images.split(size), torch.tensor(labels).split(size), strict=True)
    return [{"images": image, "labels": label} for image, label in parts]


def test_lost_images_come_first():
    model = Answers()
    labels = [0, 1, 2, 3, 4, 5, 6]
    examples = Changed(model, batches(labels), "val")
    model.answers = [0, 9, 2, 3, 4, 5, 6]
    examples.before(model)
    model.answers = [0, 1, 7, 3, 4, 8, 6]
    note, found = examples.after(model)
    assert note == ("3 of the first 7 images of val changed class; 2 were correct before:")
    names = [(e.given, e.dense, e.pruned) for e in found]
    assert names == [
        ("class 2", "class 2", "class 7"),
        ("class 5", "class 5", "class 8"),
        ("class 1", "class 9", "class 1"),
    ]


def test_nothing_changed_and_too_much_changed():
    model = Answers()
    examples = Changed(model, batches([0] * (COMPARED + 40), size=64), "val")
    model.answers = [0] * (COMPARED + 40)
    examples.before(model)
    assert len(examples.dense) == COMPARED
    note, found = examples.after(model)
    assert note == f"None of the first {COMPARED} images of val changed class."
    assert found == []
    model.answers = [1] * (COMPARED + 40)
    note, found = examples.after(model)
    assert len(found) == SHOWN
    assert note.endswith(f"; {COMPARED} were correct before; the first {SHOWN}:")


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_what_was_seen(channels: int):
    examples = Changed(Answers(), [], "val")
    examples.mean, examples.std = torch.full((channels, 1, 1), 0.5), torch.full((channels, 1, 1), 2)
    pixels = torch.zeros(channels, 8, 8)
    pixels[:, 4:] = 0.25
    found = Image.open(io.BytesIO(base64.b64decode(examples.picture(pixels))))
    array = np.asarray(found)
    assert array.shape == (160, 160, 3)
    assert abs(int(array[10, 10, 0]) - 128) < 3
    assert array[150, 10, 0] > 252


def test_imagenet_classes_have_names():
    names = class_names(Answers(1000))
    assert len(names) == 1000
    assert names[1] == "goldfish"
    assert class_names(Answers(10)) == {}


def test_classes_have_the_names_of_the_model_or_of_their_folders():
    model = Answers(3)
    found = Changed(model, [], "val", {0: "daisy", 1: "n01440764", 2: "7"})
    assert [found.name(i) for i in range(3)] == ["daisy", "class 1", "class 2"]
    model.pretrained_cfg["label_names"] = ["a", "b", "c"]
    assert class_names(model) == {0: "a", 1: "b", 2: "c"}


def test_the_scaling_is_the_models():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2)
    examples = Changed(model, [], "val")
    assert examples.mean.shape == (3, 1, 1)
    assert torch.allclose(examples.mean, torch.tensor(model.pretrained_cfg["mean"]).view(3, 1, 1))
