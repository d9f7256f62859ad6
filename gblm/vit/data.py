"""Images for calibration and evaluation, as a model of timm wants them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gblm.base import Batch, GblmError
from gblm.machine import processes
from gblm.machine.device import free_memory
from gblm.vit.sources import Source, read
from gblm.walk.blocks import frozen

BROKEN = 0.01  # the share of broken images above which a run stops
TOGETHER = 64  # images of a batch of the evaluation
KEPT = 0.25  # the share of the free memory that decoded images may take
WORKERS = min(8, os.cpu_count() or 1)

Transform = Callable[[Image.Image], Tensor]


@dataclass
class Images:
    """Images of a source, pre-processed as they are asked for.

    `broken` fills as images turn out not to be readable, by name with the reason; `notes` say what
    else a reader of the report must know. Every error names the source.
    """

    source: Source
    transform: Transform
    workers: int = WORKERS
    broken: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.source.length

    @property
    def notes(self) -> list[str]:
        if not self.broken:
            return [*self.source.notes]
        named = ", ".join(f"{name} ({why})" for name, why in self.broken.items())
        skipped = f"{self.source.name}: {len(self.broken)} broken and skipped: {named}"
        return [*self.source.notes, skipped]

    def chosen(self, samples: int | None, seed: int = 0) -> list[int]:
        """Return the indices of all images in the order they are chosen, at least `samples`.

        Where there are labels, an image of every class is taken before a second of any; within
        that the order is that of `random.Random(seed)`: fewer samples are the first of more.
        """
        if samples is not None and samples < 1:
            raise GblmError(f"samples is {samples}; give 1 or more")
        if samples is not None and samples > len(self):
            raise GblmError(
                f"{self.source.name}: {len(self)} images there, {samples} asked for; "
                f"use --samples {len(self)} or less"
            )
        draw = random.Random(seed)
        order = list(range(len(self)))
        draw.shuffle(order)
        if self.source.labels is None:
            return order
        held: dict[int, int] = {}
        rounds = []
        for index in order:
            label = self.source.labels[index]
            rounds.append(held.get(label, 0))
            held[label] = rounds[-1] + 1
        return [index for _, _, index in sorted(zip(rounds, range(len(order)), order, strict=True))]

    def batches(self, indices: Sequence[int], size: int, of: int | None = None) -> Iterator[Batch]:
        """Yield the images of these indices as batches `images [n, c, h, w]`, `labels [n]`.

        A broken image is left out of its batch and noted. Raises `GblmError` when more than 1 % of
        the `of` images asked for in all are broken, and where images of a batch differ in shape.
        """
        asked = of or len(indices)
        loader = DataLoader(
            _Decoded(self.source, self.transform, indices),
            batch_size=size,
            num_workers=0 if len(indices) <= size else min(self.workers, -(-len(indices) // size)),
            collate_fn=list,
            generator=torch.Generator(),  # of its own, that the global one stays as it is
        )
        for items in loader:
            self.broken.update({item.name: item.broken for item in items if item.broken})
            if len(self.broken) > BROKEN * asked:
                name, why = next(iter(self.broken.items()))
                raise GblmError(
                    f"{self.source.name}: {len(self.broken)} of {asked} images are broken, more "
                    f"than 1 %, first {name} ({why}); repair or remove them"
                )
            if whole := [item for item in items if not item.broken]:
                yield _batch(whole, self.source)


@dataclass
class Loader:
    """Batches of images, which are decoded once where memory allows it.

    Where all batches, each as large as the first, take at most a quarter of the free memory, those
    of the first whole pass stay for the passes after it; else each pass decodes anew. of: how many
    images the loaders of all processes have.
    """

    images: Images
    indices: list[int]
    size: int
    of: int
    decoded: list[Batch] = field(default_factory=list)  # all of them, or none

    def __len__(self) -> int:
        return -(-len(self.indices) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        if self.decoded:
            yield from self.decoded
            return
        held: list[Batch] = []
        keep = True
        for done, batch in enumerate(self.images.batches(self.indices, self.size, self.of), 1):
            if done == 1:
                whole = len(self) * sum(value.nbytes for value in batch.values())
                keep = whole <= free_memory(torch.device("cpu")) * KEPT
            if keep:
                held.append(batch)
            yield batch
        self.decoded = held


def config(model: nn.Module, test_size: bool = False) -> dict[str, Any]:
    """Return size, mean, std, crop and interpolation of a model's images.

    test_size: those a model is tested with, where timm knows other ones than those of training.
    """
    # Of the model as it was made, where timm knows that: not as its weights were trained.
    resolve = getattr(timm.data, "resolve_input_data_config", None)
    if resolve:
        return resolve(model, use_test_size=test_size)
    return resolve_data_config({}, model=model, use_test_size=test_size)


def preprocessing(model: nn.Module, test_size: bool = False) -> Transform:
    """Return the model's own evaluation transform: resize, crop, mean and std, as timm has it.

    Raises `GblmError` where the model's config is of no use for that.
    """
    found = config(model, test_size)
    try:
        mode = "L" if found["input_size"][0] == 1 else "RGB"
        return partial(_transformed, create_transform(**found, is_training=False), mode)
    except Exception as error:  # whatever the model's config holds in their place
        raise GblmError(
            f"the images of the model cannot be pre-processed ({type(error).__name__}: {error}); "
            "mend size, mean, std, crop and interpolation in its pretrained_cfg"
        ) from error


def open_images(
    source: str,
    model: nn.Module,
    split: str,
    *,
    labelled: bool = True,
    workers: int = WORKERS,
) -> Images:
    """Open a source of images for a model; no image is read yet.

    `source` is `demo`, the digits the packaged model was trained on; a folder with a folder for
    each class (`root/<class>/…`); a data set of the hub, `name` or `name:split`; a `.parquet` file
    or a folder of those, with a column of images and one of labels; or `.npz`/`.safetensors` with
    `images` and `labels`: floats `[n, c, h, w]` are taken as ready, uint8 `[n, h, w, c]` as
    pictures. The class of a folder named by a synset is that of timm's list of ImageNet, where the
    model has as many classes as an ImageNet; else it is the folder's rank, in natural order.
    `split` is `calibration` (the training split of a data set) or `evaluation` (its validation
    split, or the test split). With `labelled=False` labels are not looked at.

    Raises `GblmError` where the source is missing or holds no image, and where a label is not one
    of the model's classes.
    """
    classes = int(model.num_classes)  # type: ignore[arg-type]
    return Images(read(source, split, classes, labelled), preprocessing(model), workers)


def calibration(images: Images, samples: int = 1024, seed: int = 0) -> Batch:
    """Return the calibration batch: `images [samples, c, h, w]` and, where known, `labels`.

    The images are those `Images.chosen` gives, the same for every method. In the place of a broken
    one the next is taken, as long as there is one. Raises `GblmError` where there are too few.
    """
    order = images.chosen(samples, seed)
    parts: list[Batch] = []
    held = taken = 0
    while held < samples and taken < len(order):
        asked = order[taken : taken + samples - held]
        parts += images.batches(asked, 32, of=samples)
        held = sum(len(part["images"]) for part in parts)
        taken += len(asked)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def evaluation(images: Images, size: int = TOGETHER, limit: int | None = None) -> Loader:
    """Return the images as batches of `size`, in their order; with `limit`, a choice of them.

    Of several processes each gets its share of them.
    """
    indices = list(range(len(images)))
    if limit is not None and limit < len(images):
        indices = sorted(images.chosen(limit)[:limit])
    return Loader(images, indices[processes.part(len(indices))], size, of=len(indices))


def fitting(model: nn.Module, batch: Batch, source: str) -> None:
    """Raise `GblmError` where the model does not take images of the shape of this batch."""
    own = input_size(model)
    shape = tuple(batch["images"].shape[1:])
    if shape == own:
        return
    try:
        with frozen(model), torch.no_grad():
            model(batch["images"][:1].to(next(model.parameters())))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise GblmError(
            f"{source}: its images are {_by(shape)} and the model takes {_by(own)} "
            f"({str(error).splitlines()[0]}); give images of that size"
        ) from error


@dataclass
class _Item:
    """One image after its decoding: pixels `[c, h, w]`, or why there are none."""

    name: str
    pixels: np.ndarray | None = None  # an array, which a worker sends without shared memory
    label: int | None = None
    broken: str = ""


@dataclass
class _Decoded(Dataset):
    source: Source
    transform: Transform
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Item:
        index = self.indices[position]
        name = self.source.called(index)
        try:
            found = self.source.open(index)
            pixels = found if isinstance(found, Tensor) else self.transform(found)
        except Exception as error:  # a broken file has many faces
            return _Item(name, broken=f"{type(error).__name__}: {error}".split("\n")[0])
        label = None if self.source.labels is None else self.source.labels[index]
        return _Item(name, pixels.numpy(), label)


def _batch(items: Sequence[_Item], source: Source) -> Batch:
    first = items[0]
    arrays = [item.pixels for item in items if item.pixels is not None]
    for item, pixels in zip(items, arrays, strict=True):
        if pixels.shape != arrays[0].shape:
            raise GblmError(
                f"{source.name}: {item.name} is {_by(pixels.shape)} after pre-processing and "
                f"{first.name} {_by(arrays[0].shape)}; give images of one size"
            )
    batch = {"images": torch.from_numpy(np.stack(arrays))}
    labels = [item.label for item in items if item.label is not None]
    return {**batch, "labels": torch.tensor(labels)} if labels else batch


def input_size(model: nn.Module) -> tuple[int, ...]:
    """Return the shape `[c, h, w]` of the images that a model was made for."""
    return tuple(config(model)["input_size"])


def scaling(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation `[c, 1, 1]` by which a model's images are scaled."""
    found = config(model)
    mean, std = (torch.tensor(found[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return mean, std


def _transformed(transform: Transform, mode: str, picture: Image.Image) -> Tensor:
    if picture.mode.startswith("I;16"):  # which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return transform(picture.convert(mode))


def _by(shape: Sequence[int]) -> str:
    return "×".join(str(size) for size in shape)
