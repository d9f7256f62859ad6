"""The demo: a tiny ViT that ships with the package, and the handwritten digits it was trained on.

The images are the 1,797 digits of 8×8 pixels that scikit-learn carries in its package. A third of
every class is held out for evaluation, the others are for training and calibration. The model
beside this file was trained by `eval/train_demo_vit.py`.
"""

import random
from pathlib import Path

import torch
from torch import Tensor

from gblm.base import GblmError, one_of

FOLDER = Path(__file__).parent  # config and weights lie beside this file
NAME = "demo"  # by which the commands know it
HELD_OUT = 3  # one of so many images of every class


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the pictures of a split, uint8 `[n, 8, 8]` with ink at 255, and their labels `[n]`.

    The split is "calibration" or "evaluation", and its images stand in one mixed order. Raises
    `GblmError` where scikit-learn is not installed.
    """
    one_of(split, ("calibration", "evaluation"), "split")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise GblmError(
            "the demo's images are the digits of scikit-learn, which is not installed; "
            "pip install 'gblm[demo]', or name a model and a source of images"
        ) from error
    data = load_digits()
    labels = torch.from_numpy(data.target).long()
    order = list(range(len(labels)))
    random.Random(0).shuffle(order)
    classes = [[index for index in order if labels[index] == label] for label in range(10)]
    held_out = {index for indices in classes for index in indices[::HELD_OUT]}
    indices = [index for index in order if (index in held_out) == (split == "evaluation")]
    pictures = torch.from_numpy(data.images[indices]) * (255 / 16)  # ink is 0 to 16 there
    return pictures.round().to(torch.uint8), labels[indices]
