"""The images whose predicted class changes when a classifier is pruned."""

import base64
import io
from collections.abc import Iterable

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from gblm.base import Batch
from gblm.report import Example
from gblm.vit.data import scaling
from gblm.walk.blocks import frozen

SHOWN = 8
SIDE = 160  # pixels of a thumbnail
LOOKED = 256  # images whose predictions are compared
STEP = 32  # images at a time


class Changed:
    """The first images of a source whose prediction changes, with their labels."""

    def __init__(self, model: nn.Module, batches: Iterable[Batch], source: str) -> None:
        self.batches, self.source = batches, source
        self.mean, self.std = scaling(model)
        self.names = class_names(int(model.num_classes))  # type: ignore[arg-type]
        self.dense: list[int] = []

    def before(self, model: nn.Module) -> None:
        """Note what the dense model predicts."""
        self.dense = [int(best) for _, _, best in self._predicted(model)]

    def after(self, model: nn.Module) -> tuple[str, list[Example]]:
        """Return how many predictions have changed, and the first of those images."""
        changed = [
            (pixels, int(label), old, int(new))
            for old, (pixels, label, new) in zip(self.dense, self._predicted(model), strict=True)
            if old != new
        ]
        lost = [found for found in changed if found[1] == found[2]]
        shown = (lost + [found for found in changed if found[1] != found[2]])[:SHOWN]
        whole = f"of the first {len(self.dense)} images of {self.source}"
        said = f"None {whole} is classified otherwise."
        if changed:
            said = (
                f"{len(changed)} {whole} classified otherwise, {len(lost)} of them rightly before; "
                f"the first {len(shown)}:"
            )
        return said, [
            Example(self.name(label), self.name(old), self.name(new), self.picture(pixels))
            for pixels, label, old, new in shown
        ]

    def name(self, label: int) -> str:
        """Return the name of a class, its number where it is not known."""
        return self.names[label] if self.names else f"class {label}"

    def picture(self, pixels: Tensor) -> str:
        """Return pre-processed pixels `[c, h, w]` as a thumbnail, a JPEG in base64."""
        values = pixels.float().cpu() * self.std + self.mean
        values = values[:3] if len(values) >= 3 else values[:1].expand(3, -1, -1)
        array = (255 * values.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
        found = Image.fromarray(array)
        small = max(found.size) < SIDE / 2
        factor = SIDE // max(found.size) if small else SIDE / max(found.size)
        found = found.resize(
            (round(found.width * factor), round(found.height * factor)),
            Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS,
        )
        file = io.BytesIO()
        found.save(file, "JPEG", quality=88)
        return base64.b64encode(file.getvalue()).decode()

    def _predicted(self, model: nn.Module) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Yield pixels, label and predicted class of each image."""
        parameter = next(model.parameters())
        with frozen(model), torch.no_grad():
            left = LOOKED
            for batch in self.batches:
                images, labels = batch["images"][:left], batch["labels"][:left]
                for part in zip(images.split(STEP), labels.split(STEP), strict=True):
                    best = model(part[0].to(parameter)).argmax(dim=1)
                    yield from zip(*part, best, strict=True)
                left -= len(images)
                if not left:
                    return


def class_names(classes: int) -> list[str]:
    """Return the first name of every class of an ImageNet with so many classes, else none."""
    subset = infer_imagenet_subset({"num_classes": classes})
    if not subset:
        return []
    known = ImageNetInfo(subset)
    return [known.index_to_description(i).partition(",")[0] for i in range(classes)]
