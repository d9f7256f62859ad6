"""The images whose predicted class changes when a classifier is pruned."""

import base64
import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from gblm.base import Batch
from gblm.report import Example
from gblm.vit.adapters import logits
from gblm.vit.data import config
from gblm.vit.sources import SYNSET
from gblm.walk.blocks import frozen

SHOWN = 8
SIDE = 160  # pixels of a thumbnail
COMPARED = 256  # images whose predictions are compared
STEP = 32  # images at a time


class Changed:
    """The first images of a source whose prediction changes, with their labels.

    names: of some classes, by their index.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        source: str,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.batches, self.source = batches, source
        scaling = config(model)
        self.mean, self.std = (torch.tensor(scaling[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.names = class_names(model) | readable(names or {})
        self.dense: list[int] = []

    def before(self, model: nn.Module) -> None:
        """Note what the dense model predicts."""
        self.dense = [int(best) for _, _, best in self._predicted(model)]

    def after(self, model: nn.Module) -> tuple[str, list[Example]]:
        """Return how many predictions have changed, and the first of those images."""
        predictions = zip(self.dense, self._predicted(model), strict=True)
        changed = [
            (pixels, int(label), before, int(now))
            for before, (pixels, label, now) in predictions
            if before != now
        ]
        lost = sum(label == before for _, label, before, _ in changed)
        first = sorted(changed, key=lambda image: image[1] != image[2])[:SHOWN]  # the lost ones
        where = f"of the first {len(self.dense)} images of {self.source} changed class"
        were = f"{lost} {'was' if lost == 1 else 'were'} correct before"
        some = f"; the first {len(first)}:" if len(first) < len(changed) else ":"
        note = f"{len(changed)} {where}; {were}{some}"
        return note if changed else f"None {where}.", [
            Example(self.name(label), self.name(before), self.name(now), self.picture(pixels))
            for pixels, label, before, now in first
        ]

    def name(self, label: int) -> str:
        """Return the name of a class, its number where it is not known."""
        return self.names.get(label, f"class {label}")

    def picture(self, pixels: Tensor) -> str:
        """Return pre-processed pixels `[c, h, w]` as a thumbnail, a JPEG in base64."""
        values = pixels.float().cpu() * self.std + self.mean
        values = values[:3] if len(values) >= 3 else values[:1].expand(3, -1, -1)
        array = (255 * values.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(array)
        small = max(picture.size) < SIDE / 2
        factor = SIDE // max(picture.size) if small else SIDE / max(picture.size)
        filter = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        file = io.BytesIO()
        ImageOps.scale(picture, factor, filter).save(file, "JPEG", quality=88)
        return base64.b64encode(file.getvalue()).decode()

    def _predicted(self, model: nn.Module) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Yield pixels, label and predicted class of each image."""
        parameter = next(model.parameters())
        parts = (
            part
            for batch in self.batches
            for part in zip(batch["images"].split(STEP), batch["labels"].split(STEP), strict=True)
        )
        left = COMPARED
        with frozen(model), torch.no_grad():
            while left and (part := next(parts, None)):
                images, labels = part[0][:left], part[1][:left]
                predicted = logits(model, images.to(parameter)).argmax(dim=1)
                yield from zip(images, labels, predicted, strict=True)
                left -= len(images)


def class_names(model: Any) -> dict[int, str]:
    """Return the names of a model's classes by index: its own, else those of its ImageNet."""
    own = getattr(model, "pretrained_cfg", {}).get("label_names")
    if own and not all(map(SYNSET.fullmatch, own)):
        return dict(enumerate(own))
    classes = int(model.num_classes)
    subset = infer_imagenet_subset({"num_classes": classes})
    if not subset:
        return {}
    info = ImageNetInfo(subset)
    return {i: info.index_to_description(i).partition(",")[0] for i in range(classes)}


def readable(names: Mapping[int, str]) -> dict[int, str]:
    """Return the names of folders that say what is in them: no synsets and no numbers."""
    return {i: n for i, n in names.items() if not SYNSET.fullmatch(n) and not n.isdecimal()}
