"""What a source of images holds: the demo, a folder, a data set of hub or parquet, or an array."""

import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils.misc import natural_key
from torch import Tensor

from gblm.base import GblmError, explained, nearest
from gblm.machine.tables import NONE, Rows, check_there, dtype_and_shape, read_arrays

ENDINGS = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".avif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
ARRAYS = (".npz", ".safetensors")
FILES = (*ENDINGS, *ARRAYS, ".parquet", ".tar")
SYNSET = re.compile(r"n\d{8}")
HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+)?")
LABELS = ("label", "labels", "fine_label", "target", "class", "cls")
PIXELS = (1 << 28) // 3  # of a picture at most, 256 MiB of RGB: more are a decompression bomb
LONGEST = 256  # times the shorter side: the longer one is resized by the same factor
UNLABELLED = ", or use --unlabelled"
SPLITS = {"calibration": ("train",), "evaluation": ("validation", "valid", "val", "test", "train")}


@dataclass
class Source:
    """Images by index, with their names and, where it has any, their labels.

    `open(index)` gives a picture yet to be pre-processed, or a ready tensor `[c, h, w]`; it raises
    whatever the format has against a broken image. `notes` and `classes` are for the report.
    """

    name: str
    length: int
    open: Callable[[int], Image.Image | Tensor]
    called: Callable[[int], str]
    labels: Sequence[int] | None
    notes: Sequence[str] = ()
    classes: Mapping[int, str] = field(default_factory=dict)  # names of some, by their index


@dataclass
class Classes:
    """The classes of a model: their number, their names where it has any, and a map of the user's.

    index: the class of each name by `--class-map`, empty for none.
    """

    count: int
    names: Sequence[str] = ()
    index: Mapping[str, int] = field(default_factory=dict)

    def indices(self, names: Sequence[str], where: str) -> list[int]:
        """Return the class index of every name.

        That is, in this order: what the map says; the place of a synset in timm's list of the
        ImageNet with as many classes; the place of the name among the model's; the whole number
        that it is; its rank in natural order, where there are as many names as classes.

        Raises `GblmError` where a name is not one of them.
        """
        if self.index:
            return self._named(names, self.index, where, "the class map")
        subset = infer_imagenet_subset({"num_classes": self.count})
        if subset and all(map(SYNSET.fullmatch, names)):
            synsets = {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())}
            return self._named(names, synsets, where, f"the synsets of {subset}")
        own, given = {plain(name): i for i, name in enumerate(self.names)}, [*map(plain, names)]
        if own.keys() & {*given} or (own and len(names) != self.count and not given[0].isdecimal()):
            return self._named(given, own, where, "the model")
        if all(name.isdecimal() for name in names):
            return [*map(int, names)]
        if len(names) != self.count:
            raise GblmError(
                f"{where}: {len(names)} class folders ({', '.join(sorted(names)[:3])}, …) and a "
                f"model of {self.count} classes without these names; say which is which by "
                "--class-map FILE, lines of names in the order of the classes"
            )
        ranks = {name: rank for rank, name in enumerate(sorted(names, key=natural_key))}
        return [ranks[name] for name in names]

    def _named(
        self, names: Sequence[str], known: Mapping[str, int], where: str, what: str
    ) -> list[int]:
        """Return the index of every name; raises `GblmError` for the first that is not known."""
        if unknown := [name for name in names if name not in known]:
            hint = nearest(unknown[0], known)
            raise GblmError(
                f"{where}: {unknown[0]} is no class of {what}; {hint}rename or remove it, or give "
                "--class-map FILE, lines of names in the order of the classes"
            )
        return [known[name] for name in names]


def plain(name: str) -> str:
    """Return the name of a class without case, dashes and underscores."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def class_map(file: Path) -> dict[str, int]:
    """Return the class index of every name: lines in the order of the classes, or JSON.

    JSON is a list of names, or an object of names and indices, or of indices and names. Raises
    `GblmError` where the file is none of these.
    """
    with explained(f"class map {file} cannot be read", "give a name a line, or JSON"):
        text = file.read_text("utf-8")
        held: Any = text.splitlines() if file.suffix != ".json" else json.loads(text)
        if isinstance(held, dict):
            byname = {str(k): v for k, v in held.items()}
            if all(key.isdecimal() and isinstance(v, str) for key, v in byname.items()):
                byname = {v: int(key) for key, v in byname.items()}
            return {key: int(v) for key, v in byname.items()}
        return {str(name).strip(): i for i, name in enumerate(held) if str(name).strip()}


def read(source: str, split: str, classes: Classes, labelled: bool = True) -> Source:
    """Return what a source holds for a split, `calibration` or `evaluation`.

    `classes` are those of the model; with `labelled=False` labels are not looked at.
    For the sources see `gblm.vit.data.open_images`. Raises `GblmError` where the source is missing,
    empty or damaged, and where a label is not one of the classes.
    """
    if not source:
        raise GblmError(f"the {split} source is empty; give a folder of images")
    where = f"{split} images {source}"
    way = "check its rights, and that it is whole and what its ending says"
    with explained(f"{where} cannot be read", way):
        images = _open(source, split, where, classes, labelled)
    if not images.length:
        raise GblmError(f"{where}: no image in it; give a source that holds images")
    for index, label in enumerate(images.labels or ()):
        if not 0 <= label < classes.count:
            raise GblmError(
                f"{where}: {images.called(index)} has label {label}, outside the model's "
                f"{classes.count} classes (0 to {classes.count - 1}); give a model made for them"
                + (", or use --unlabelled" if split == "calibration" else "")
            )
    return images


def _open(source: str, split: str, where: str, classes: Classes, labelled: bool) -> Source:
    path = Path(source).expanduser()
    kind, way = path.suffix.lower(), "give a folder, or a .parquet, .tar, .npz or .safetensors file"
    if source == "demo":
        from gblm.vit.demo import digits

        pictures, digit = digits(split)
        return _pixels(where, pictures, digit.tolist() if labelled else None)
    if source == NONE:  # one picture of noise
        noise = torch.randint(256, (1, 224, 224, 3), generator=torch.Generator().manual_seed(0))
        return _pixels(where, noise.byte(), [0] if labelled else None)
    if not path.exists() and HUB.fullmatch(source) and not source.endswith(FILES):
        return _table(_hub(source, split), where, classes, labelled)
    check_there(path, where, f"{way}, or a data set of the hub")
    if path.is_dir():  # of the hub's tables lie in `data`
        tables = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
        if tables:
            return _table(Rows(tables), where, classes, labelled)
        if shards := sorted(path.glob("*.tar")):
            return _table(_shards(shards), where, classes, labelled)
        return _folder(path, where, classes, labelled)
    if kind == ".tar":
        return _table(_shards([path]), where, classes, labelled)
    if kind in ARRAYS:
        return _arrays(path, where, labelled)
    if kind != ".parquet":
        raise GblmError(f"{where} is no source of images; {way}")
    return _table(Rows([path]), where, classes, labelled)


def _folder(path: Path, where: str, classes: Classes, labelled: bool) -> Source:
    """List the images of a folder; the folders directly in it are the classes."""
    files: list[Path] = []
    for folder, inner, names in os.walk(path, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        inside = Path(folder).relative_to(path)
        files += [inside / n for n in names if n.lower().endswith(ENDINGS) and n[0] != "."]
    files.sort()
    if not files:
        raise GblmError(f"{where}: no image in it ({', '.join(ENDINGS)}); give a folder of images")
    labels, index = None, dict[str, int]()
    if labelled:
        names = sorted({file.parts[0] for file in files if len(file.parts) > 1})
        if bare := next((file for file in files if len(file.parts) == 1), None):
            raise GblmError(
                f"{where}: {bare} lies in no class folder; sort the images into one folder "
                f"for each class{UNLABELLED if where.startswith('calibration') else ''}"
            )
        splits = {"train", "val", "valid", "validation", "test"} & {*map(str.lower, names)}
        if len(splits) > 1 or (splits and len(names) == 1):
            raise GblmError(
                f"{where} holds {', '.join(names)}, which are splits and no classes; give one of "
                f"them, such as {path / names[-1]}"
            )
        index = dict(zip(names, classes.indices(names, where), strict=True))
        labels = [index[file.parts[0]] for file in files]
    classes_by_index = {number: name for name, number in index.items()}
    return Source(
        where,
        len(files),
        lambda i: _picture(path / files[i]),
        lambda i: str(files[i]),
        labels,
        classes=classes_by_index,
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
    images, *more = read_arrays(path, ["images", "labels"] if labelled else ["images"], where)
    ready = images.is_floating_point()
    if images.ndim not in ((4,) if ready else (3, 4)) or not (ready or images.dtype == torch.uint8):
        raise GblmError(
            f"{where}: `images` is {dtype_and_shape(images)}; give ready floats [n, c, h, w] or "
            "pictures uint8 [n, h, w, c]"
        )
    labels = [label for labels in more for label in labels.flatten().tolist()]
    if labelled and (len(labels) != len(images) or any(label != int(label) for label in labels)):
        raise GblmError(
            f"{where}: `labels` is {dtype_and_shape(more[0])} for {len(images)} images; give one "
            "integer for each"
        )
    return _pixels(where, images, list(map(int, labels)) if labelled else None)


def _pixels(where: str, images: Tensor, labels: list[int] | None) -> Source:
    """See pictures or ready images `[n, …]`."""

    def open_one(index: int) -> Image.Image | Tensor:
        pixels = images[index]
        if pixels.is_floating_point():
            return pixels.float()
        if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4):
            pixels = pixels.movedim(0, -1)
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        return Image.fromarray(pixels.contiguous().numpy())

    return Source(where, len(images), open_one, lambda i: f"image {i}", labels)


def _hub(source: str, split: str) -> Any:
    """Load `name` or `name:split` from the hub."""
    import datasets

    name, _, part = source.partition(":")
    if not part:
        parts = datasets.get_dataset_split_names(name)
        part = next((name for name in SPLITS[split] if name in parts), parts[0])
    return datasets.load_dataset(name, split=part)


def _shards(files: list[Path]) -> Any:
    """Load shards of WebDataset: pictures, with a class index in `cls` each."""
    import datasets

    datasets.disable_progress_bars()
    names = [str(file.resolve()) for file in files]
    return datasets.load_dataset("webdataset", data_files=names, split="train")


def _table(rows: Any, where: str, classes: Classes, labelled: bool) -> Source:
    """See a table of `datasets` or of parquet, with a column of images and one of labels."""
    import datasets

    hub = isinstance(rows, datasets.Dataset)
    features = rows.features if hub else datasets.Features.from_arrow_schema(rows.schema)
    structures = [n for n, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    image = next(iter([*_of_kind(features, datasets.Image), *structures]), None)
    if image is None:
        raise GblmError(f"{where} has no column of images, only {', '.join(features)}; rename one")
    if hub:
        rows = rows.cast_column(image, datasets.Image(decode=False))
    labels, known = None, dict[int, str]()
    if labelled:
        columns = [name for name in LABELS if name in features]
        column = next(iter([*_of_kind(features, datasets.ClassLabel), *columns]), None)
        if column is None:
            raise GblmError(
                f"{where} has no column of labels ({', '.join(LABELS)}), only "
                f"{', '.join(features)}; rename one, or use --unlabelled"
            )
        cells, words = list(rows[column]), getattr(features[column], "names", None)
        labels = _labels(cells, features[column], classes, where)
        names = ((i, words[cell] if words else cell) for cell, i in zip(cells, labels, strict=True))
        known = {i: name for i, name in names if isinstance(name, str)}

    def open_one(index: int) -> Image.Image:
        cell = rows[index][image]
        return _picture(io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"]))

    return Source(where, len(rows), open_one, lambda i: f"row {i}", labels, classes=known)


def _of_kind(features: Any, kind: type) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, kind)]


def _labels(cells: list[Any], kind: Any, classes: Classes, where: str) -> list[int]:
    """Return the class index of every cell of a column of labels, by name where it has names."""
    names = getattr(kind, "names", None) or []
    words = bool(cells) and isinstance(cells[0], str)
    if words:
        names = sorted(set(cells))
        cells = [names.index(cell) for cell in cells]
    own = {*map(plain, classes.names)}
    by_name = classes.index or all(map(SYNSET.fullmatch, names)) or {*map(plain, names)} <= own
    if not names or not (words or by_name):
        return cells
    indices = classes.indices(names, where)
    return [indices[cell] if 0 <= cell < len(indices) else -1 for cell in cells]
