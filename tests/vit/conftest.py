"""Pictures for the tests of image classifiers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def noisy_pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Make a folder of twelve noisy pictures of a height and a width, in three of its own folders.

    Each of those is a class.
    """

    def make(height: int, width: int) -> Path:
        where = tmp_path_factory.mktemp("images")
        draw = np.random.default_rng(0)
        for index in range(12):
            folder = where / f"class{index % 3}"
            folder.mkdir(exist_ok=True)
            pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
        return where

    return make
