"""Images for calibration and evaluation, as a model wants them."""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from gblm.base import Batch, GblmError, explained, reason
from gblm.machine import processes
from gblm.machine.device import free_memory
from gblm.vit.sources import Classes, Source, class_map, read
from gblm.walk.blocks import frozen

BROKEN, SMALL = 0.01, 20  # the share of broken images above which a run stops; one of so many may
TOGETHER = 64  # images of a batch of the evaluation
KEPT = 0.25  # the share of the free memory that decoded images may take
WORKERS = min(8, os.cpu_count() or 1)

Transform = Callable[[Image.Image], Tensor]


@dataclass
class Decoded:
    """One image after its decoding: pixels `[c, h, w]`, or why it is broken."""

    name: str
    pixels: np.ndarray  # an array, which a worker sends without shared memory
    label: int | None = None
    broken: str = ""


@dataclass
class Images(Dataset):
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

    def __getitem__(self, index: int) -> Decoded:
        name, labels = self.source.called(index), self.source.labels
        try:
            image = self.source.open(index)
            pixels = image if isinstance(image, Tensor) else self.transform(image)
        except Exception as error:  # a broken file has many faces
            return Decoded(name, np.empty(0), broken=reason(error))
        return Decoded(name, pixels.numpy(), labels[index] if labels is not None else None)

    @property
    def notes(self) -> list[str]:
        broken = ", ".join(f"{name} ({why})" for name, why in self.broken.items())
        skipped = f"{self.source.name}: {len(self.broken)} broken and skipped: {broken}"
        return [*self.source.notes, skipped] if broken else [*self.source.notes]

    def order(self, samples: int, seed: int = 0) -> list[int]:
        """Return the indices of all images in the order they are chosen, at least `samples`.

        Where there are labels, an image of every class is taken before a second of any; within
        that the order is that of `random.Random(seed)`: fewer samples are the first of more.
        """
        if samples < 1:
            raise GblmError(f"samples is {samples}; give 1 or more")
        if samples > len(self):
            raise GblmError(
                f"{self.source.name}: {len(self)} images there, {samples} asked for; "
                f"use --samples {len(self)} or less"
            )
        order, labels = list(range(len(self))), self.source.labels
        random.Random(seed).shuffle(order)
        if labels is None:
            return order
        before: Counter[int] = Counter()  # images of the same class, by label
        rounds = {}
        for index in order:
            rounds[index] = before[labels[index]]
            before[labels[index]] += 1
        return sorted(order, key=rounds.__getitem__)

    def batches(self, indices: Sequence[int], size: int, of: int | None = None) -> Iterator[Batch]:
        """Yield the images of these indices as batches `images [n, c, h, w]`, `labels [n]`.

        A broken image is left out of its batch and noted. Raises `GblmError` when more than 1 % of
        the `of` images asked for in all are broken, and where images of a batch differ in shape.
        """
        asked = of or len(indices)
        loader = DataLoader(
            Subset(self, indices),
            batch_size=size,
            num_workers=0 if len(indices) <= size else min(self.workers, -(-len(indices) // size)),
            collate_fn=list,
            generator=torch.Generator(),  # of its own, that the global one stays as it is
        )
        for decoded in loader:
            self.broken.update({image.name: image.broken for image in decoded if image.broken})
            if len(self.broken) > max(BROKEN * asked, asked >= SMALL):
                name, why = next(iter(self.broken.items()))
                raise GblmError(
                    f"{self.source.name}: {len(self.broken)} of {asked} images are broken, more "
                    f"than 1 %, first {name} ({why}); repair or remove them"
                )
            if sound := [image for image in decoded if not image.broken]:
                yield self._batch(sound)

    def _batch(self, images: Sequence[Decoded]) -> Batch:
        first = images[0]
        for image in images:
            if image.pixels.shape != first.pixels.shape:
                raise GblmError(
                    f"{self.source.name}: {image.name} is {_by(image.pixels.shape)} after "
                    f"pre-processing and {first.name} {_by(first.pixels.shape)}; give images of "
                    "one size"
                )
        batch = {"images": torch.from_numpy(np.stack([image.pixels for image in images]))}
        labels = [image.label for image in images if image.label is not None]
        return {**batch, "labels": torch.tensor(labels)} if labels else batch


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
        kept: list[Batch] = []
        keep: bool | None = None
        for batch in self.images.batches(self.indices, self.size, self.of):
            if keep is None:
                size = len(self) * sum(value.nbytes for value in batch.values())
                keep = size <= free_memory(torch.device("cpu")) * KEPT
            if keep:
                kept.append(batch)
            yield batch
        self.decoded = kept


def config(model: nn.Module, test_size: bool = False) -> dict[str, Any]:
    """Return size, mean, std, crop and interpolation of a model's images.

    test_size: those a model is tested with, where timm knows other ones than those of training.
    """
    # Of the model as it was made, where timm knows that: not as its weights were trained.
    resolve = getattr(timm.data, "resolve_input_data_config", partial(resolve_data_config, {}))
    return resolve(model=model, use_test_size=test_size)


def preprocessing(model: nn.Module, test_size: bool = False) -> Transform:
    """Return the model's own evaluation transform: resize, crop, mean and std.

    That is timm's, or the image processor of a model of transformers. Raises `GblmError` where the
    model's config is of no use for that.
    """
    way = "mend size, mean, std, crop and interpolation in its pretrained_cfg"
    with explained("the images of the model cannot be pre-processed", way):
        options = config(model, test_size)
        mode = "L" if options["input_size"][0] == 1 else "RGB"
        if hasattr(model, "image_processor"):
            return partial(_transformed, partial(processed, model.image_processor), mode)
        return partial(_transformed, create_transform(**options, is_training=False), mode)


def processed(processor: Any, picture: Image.Image) -> Tensor:
    """Return the pixels `[c, h, w]` that an image processor of transformers gives of a picture."""
    pixels: Tensor = processor(picture, return_tensors="pt")["pixel_values"][0]
    return pixels


def open_images(
    source: str,
    model: nn.Module,
    split: str,
    *,
    labelled: bool = True,
    workers: int = WORKERS,
    names: Path | None = None,
) -> Images:
    """Open a source of images for a model; no image is read yet.

    `source` is `demo`, the digits the packaged model was trained on; a folder with a folder for
    each class (`root/<class>/…`); a data set of the hub, `name` or `name:split`; a `.parquet` file
    or a folder of those, with a column of images and one of labels; `.tar` shards of WebDataset,
    with a class index in `cls`, or a folder of those; or `.npz`/`.safetensors` with
    `images` and `labels`: floats `[n, c, h, w]` are taken as ready, uint8 `[n, h, w, c]` as
    pictures. For the class of a folder see `sources.Classes`; names: a file of them, in the order
    of the classes.
    `split` is `calibration` (the training split of a data set) or `evaluation` (its validation
    split, or the test split). With `labelled=False` labels are not looked at.

    Raises `GblmError` where the source is missing or holds no image, and where a label is not one
    of the model's classes.
    """
    config: Any = getattr(model, "pretrained_cfg", {})
    classes = Classes(
        int(model.num_classes),  # type: ignore[arg-type]
        config.get("label_names") or (),
        class_map(names) if names else {},
    )
    return Images(read(source, split, classes, labelled), preprocessing(model), workers)


def calibration(images: Images, samples: int = 1024, seed: int = 0) -> Batch:
    """Return the calibration batch: `images [samples, c, h, w]` and, where known, `labels`.

    The images are those `Images.order` gives, the same for every method. In the place of a broken
    one the next is taken, as long as there is one. Raises `GblmError` where there are too few.
    """
    order = images.order(samples, seed)
    parts: list[Batch] = []
    while order and (missing := samples - sum(len(part["images"]) for part in parts)):
        parts += images.batches(order[:missing], 32, of=samples)
        order = order[missing:]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def evaluation(images: Images, size: int = TOGETHER, limit: int | None = None) -> Loader:
    """Return the images as batches of `size`, in their order; with `limit`, a choice of them.

    Of several processes each gets its share of them.
    """
    indices = list(range(len(images)))
    if limit is not None and limit < len(images):
        indices = sorted(images.order(limit)[:limit])
    return Loader(images, indices[processes.part(len(indices))], size, of=len(indices))


def fitting(model: nn.Module, batch: Batch, source: str) -> None:
    """Raise `GblmError` where the model does not take images of the shape of this batch."""
    size, shape = input_size(model), tuple(batch["images"].shape[1:])
    if shape == size:
        return
    try:
        with frozen(model), torch.no_grad():
            model(batch["images"][:1].to(next(model.parameters())))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise GblmError(
            f"{source}: its images are {_by(shape)} and the model takes {_by(size)} "
            f"({str(error).splitlines()[0]}); give images of that size"
        ) from error


def input_size(model: nn.Module) -> tuple[int, ...]:
    """Return the shape `[c, h, w]` of the images that a model was made for."""
    return tuple(config(model)["input_size"])


def _transformed(transform: Transform, mode: str, picture: Image.Image) -> Tensor:
    if picture.mode.startswith("I;16"):  # which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return transform(picture.convert(mode))


def _by(shape: Sequence[int]) -> str:
    return "×".join(str(size) for size in shape)
