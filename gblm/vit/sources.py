"""What a source of images holds: the demo, a folder, a data set of hub or parquet, or an array."""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils.misc import natural_key
from torch import Tensor

from gblm.base import GblmError
from gblm.vit.tables import Rows

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SYNSET = re.compile(r"n\d{8}")
LABELS = ("label", "labels", "fine_label", "target", "class")
PIXELS = (1 << 28) // 3  # of a picture at most, 256 MiB of RGB: more are a decompression bomb
LONGEST = 256  # times the shorter side: the longer one is resized by the same factor
SPLITS = {"calibration": ("train",), "evaluation": ("validation", "valid", "val", "test", "train")}


@dataclass
class Source:
    """Images by index, with their names and, where it has any, their labels.

    `open(index)` gives a picture yet to be pre-processed, or a ready tensor `[c, h, w]`; it raises
    whatever the format has against a broken image. `notes` are for the report.
    """

    name: str
    length: int
    open: Callable[[int], Image.Image | Tensor]
    called: Callable[[int], str]
    labels: Sequence[int] | None
    notes: tuple[str, ...] = ()


def read(source: str, split: str, classes: int, labelled: bool = True) -> Source:
    """Return what a source holds for a split, `calibration` or `evaluation`.

    `classes` is the number of classes of the model; with `labelled=False` labels are not looked at.
    For the sources see `gblm.vit.data.open_images`. Raises `GblmError` where the source is missing,
    empty or damaged, and where a label is not one of the classes.
    """
    if not source:
        raise GblmError(f"the {split} source is empty; give a folder of images")
    path = Path(source).expanduser()
    where = f"{split} images {source}"
    try:
        if source == "demo":
            found = _demo(split, where, labelled)
        elif path.is_dir() and not _tables(path):
            found = _folder(path, where, classes, labelled)
        elif path.name.lower().endswith((".npz", ".safetensors")) and path.is_file():
            found = _arrays(path, where, labelled)
        elif path.exists() or not _hub_name(source):
            found = _table(_parquet(path, where), where, classes, labelled)
        else:
            found = _table(_hub(source, split), where, classes, labelled)
    except GblmError:
        raise
    except Exception as error:  # every format has exceptions of its own
        raise GblmError(
            f"{where} cannot be read ({type(error).__name__}: "
            f"{(str(error) or 'no reason given').splitlines()[0]}); check its rights, and that it "
            "is whole and what its ending says"
        ) from error
    if not found.length:
        raise GblmError(f"{where}: no image in it; give a source that holds images")
    if found.labels is not None:
        _within(found, classes)
    return found


def class_indices(names: Sequence[str], classes: int, where: str) -> tuple[list[int], list[str]]:
    """Return the class index of every class name, and notes on it.

    Synset names are looked up in timm's list of the ImageNet with that many classes; any other
    names are classes in their natural order, as timm trains on folders.
    """
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset and all(SYNSET.fullmatch(name) for name in names):
        place = {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())}
        if unknown := [name for name in names if name not in place]:
            raise GblmError(
                f"{where}: {unknown[0]} is no synset of {subset}, the {classes} classes of the "
                "model; remove it, or use --unlabelled"
            )
        return [place[name] for name in names], []
    ranks = {name: rank for rank, name in enumerate(sorted(names, key=natural_key))}
    few = f"{where}: {len(names)} classes, by rank the first of the model's {classes}"
    return [ranks[name] for name in names], [few] if len(names) < classes else []


def _within(found: Source, classes: int) -> None:
    assert found.labels is not None
    for index, label in enumerate(found.labels):
        if not 0 <= label < classes:
            raise GblmError(
                f"{found.name}: {found.called(index)} has label {label}, outside the model's "
                f"{classes} classes (0 to {classes - 1}); give a model made for them, or "
                "use --unlabelled"
            )


def _demo(split: str, where: str, labelled: bool) -> Source:
    from gblm.vit.demo import digits

    pictures, labels = digits(split)
    return Source(
        where,
        len(pictures),
        lambda i: _from_pixels(pictures[i]),
        lambda i: f"image {i}",
        labels.tolist() if labelled else None,
    )


def _folder(path: Path, where: str, classes: int, labelled: bool) -> Source:
    """List the images of a folder; the folders directly in it are the classes."""
    files: list[Path] = []
    for folder, inner, names in os.walk(path, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        inside = Path(folder).relative_to(path)
        files += [inside / n for n in names if n.lower().endswith(ENDINGS) and n[0] != "."]
    files.sort()
    if not files:
        raise GblmError(f"{where}: no image in it ({', '.join(ENDINGS)}); give a folder of images")
    labels, notes = None, list[str]()
    if labelled:
        if bare := [file for file in files if len(file.parts) == 1]:
            raise GblmError(
                f"{where}: {bare[0]} lies in no class folder; sort the images into one folder "
                "for each class, or use --unlabelled"
            )
        names = sorted(
            entry.name
            for entry in path.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        indices, notes = class_indices(names, classes, where)
        index = dict(zip(names, indices, strict=True))
        labels = [index[file.parts[0]] for file in files]
    return Source(
        where,
        len(files),
        lambda i: _picture(path / files[i]),
        lambda i: str(files[i]),
        labels,
        tuple(notes),
    )


def _picture(file: Path | io.BytesIO) -> Image.Image:
    with Image.open(file) as picture:
        width, height = picture.size  # as the file claims; nothing is decoded yet
        if width * height > PIXELS or max(width, height) > LONGEST * min(width, height):
            raise ValueError(f"{width}×{height} pixels are no picture to classify")
        picture.load()
        return picture


def _arrays(path: Path, where: str, labelled: bool) -> Source:
    """Read `images` and `labels` of a `.npz` or `.safetensors` file.

    Images of integers 0 to 255 are pictures `[n, h, w]`, `[n, h, w, c]` or `[n, c, h, w]`; those of
    floats are ready `[n, c, h, w]`.
    """
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    else:
        from safetensors.torch import load_file

        arrays = load_file(path)  # mapped, not read
    wanted = ("images", "labels") if labelled else ("images",)
    for name in wanted:
        if name not in arrays:
            raise GblmError(f"{where} has no `{name}`, only {', '.join(arrays)}; rename one")
    images = arrays["images"]
    ready = images.is_floating_point()
    if images.ndim not in ((4,) if ready else (3, 4)) or not (ready or images.dtype == torch.uint8):
        raise GblmError(
            f"{where}: `images` is {str(images.dtype).removeprefix('torch.')} "
            f"{list(images.shape)}; give ready floats [n, c, h, w] or pictures uint8 [n, h, w, c]"
        )
    labels = arrays["labels"].flatten().tolist() if labelled else None
    if labels is not None and (
        len(labels) != len(images) or any(label != int(label) for label in labels)
    ):
        raise GblmError(
            f"{where}: `labels` is {arrays['labels'].dtype} {list(arrays['labels'].shape)} for "
            f"{len(images)} images; give one integer for each"
        )

    def open_one(index: int) -> Image.Image | Tensor:
        return images[index].float() if ready else _from_pixels(images[index])

    whole = [int(label) for label in labels] if labels is not None else None
    return Source(where, len(images), open_one, lambda i: f"image {i}", whole)


def _from_pixels(pixels: Tensor) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4):
        pixels = pixels.movedim(0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels.contiguous().numpy())


def _hub_name(source: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+)?", source)) and not source.endswith(
        (*ENDINGS, ".npz", ".safetensors", ".parquet")
    )


def _hub(source: str, split: str) -> Any:
    """Load `name` or `name:split` from the hub."""
    import datasets

    name, _, named = source.partition(":")
    if not named:
        there = datasets.get_dataset_split_names(name)
        named = next((known for known in SPLITS[split] if known in there), there[0])
    return datasets.load_dataset(name, split=named)


def _parquet(path: Path, where: str) -> Any:
    """Open a parquet file, or all of a folder."""
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean {path.parent / near[0]}? " if near else ""
        raise GblmError(
            f"{where}: no such file or folder; {hint}give a folder of images, a data set of the "
            "hub, or a .parquet, .npz or .safetensors file"
        )
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise GblmError(
            f"{where} is no source of images; give a folder, or a .parquet, .npz or .safetensors "
            "file"
        )
    return Rows(_tables(path) if path.is_dir() else [path])


def _tables(folder: Path) -> list[Path]:
    """Return the parquet files of a folder; those of the hub lie in `data`."""
    return sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])


def _table(rows: Any, where: str, classes: int, labelled: bool) -> Source:
    """See a table of `datasets` or of parquet, with a column of images and one of labels."""
    import datasets

    features = rows.features
    image = next((n for n, kind in features.items() if isinstance(kind, datasets.Image)), None)
    image = image or next(
        (n for n, kind in features.items() if isinstance(kind, dict) and "bytes" in kind), None
    )
    if image is None:
        raise GblmError(f"{where} has no column of images, only {', '.join(features)}; rename one")
    if not isinstance(rows, Rows):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    labels, notes = None, list[str]()
    if labelled:
        name = next((n for n, k in features.items() if isinstance(k, datasets.ClassLabel)), None)
        name = name or next((n for n in LABELS if n in features), None)
        if name is None:
            raise GblmError(
                f"{where} has no column of labels ({', '.join(LABELS)}), only "
                f"{', '.join(features)}; rename one, or use --unlabelled"
            )
        labels = list(rows[name])
        kind = features[name]
        known = kind.names if isinstance(kind, datasets.ClassLabel) else None
        if known is None and labels and isinstance(labels[0], str):
            known = sorted(set(labels))
            labels = [known.index(label) for label in labels]
        if known and (kind.dtype == "string" or all(SYNSET.fullmatch(n) for n in known)):
            indices, notes = class_indices(known, classes, where)
            labels = [indices[label] if 0 <= label < len(indices) else -1 for label in labels]

    def open_one(index: int) -> Image.Image:
        cell = rows[index][image]
        return _picture(io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"]))

    return Source(where, len(rows), open_one, lambda i: f"row {i}", labels, tuple(notes))
