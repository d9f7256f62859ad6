"""`python -m gblm.vit`: prune an image classifier, compare methods, save the result."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from gblm.base import Batch, GblmError
from gblm.command import side
from gblm.command.estimate import Source, Task, seen
from gblm.command.job import Bars, Opened
from gblm.command.settings import (
    CALIBRATION,
    EVALUATION,
    FILE,
    MEMORY,
    NUMBER,
    WHAT,
    WHOLE,
    Settings,
)
from gblm.command.show import Outline
from gblm.machine.device import find_dtype
from gblm.machine.processes import gathered
from gblm.methods import METHODS
from gblm.report import Evaluation, Examples, clock
from gblm.report.wording import short
from gblm.vit import demo

EXAMPLES = """\
examples:
  python -m gblm.vit                                    the packaged demo, all methods
  python -m gblm.vit --model vit_base_patch16_224 --calibration imagenet/train --output PRUNED
  python -m gblm.vit --model vit_base_patch16_224 --calibration imagenet/train --dry-run
  python -m gblm.vit --model vit_tiny_patch16_224 --checkpoint FILE.safetensors \\
      --method gblm,wanda,sparsegpt --sparsity 0.5,2:4 --calibration DIR --evaluate DIR
"""


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """The flags of `python -m gblm.vit`."""

    checkpoint: Annotated[str | None, WHAT(FILE, "FILE")] = None
    """the weights, .safetensors [those of the model's name]"""
    unlabelled: Annotated[bool, CALIBRATION()] = False
    """labels are the model's predictions"""
    evaluate_images: Annotated[int | None, EVALUATION(NUMBER, "N")] = None
    """a choice of this many"""
    workers: Annotated[int | None, MEMORY(WHOLE, "N")] = None
    """processes that decode images [auto]"""


@dataclass(kw_only=True)
class Classifier(Opened):
    """An image classifier with its evaluation images by data set, and its checkpoint's dtype."""

    sets: dict[str, Any]
    stored: torch.dtype

    def evaluate(self, bars: Bars) -> Evaluation:
        """Return top-1, top-5 and cross-entropy on every data set, and note what it says."""
        from gblm.vit.evaluate import evaluate

        def progress(done: int, total: int) -> None:
            bars("evaluate", done, total)

        metrics = {
            name: evaluate(self.model, images, progress) for name, images in self.sets.items()
        }
        for loader in self.sets.values():  # what other processes have met
            for broken in gathered(loader.images.broken):
                loader.images.broken.update(broken)
        notes = [note for loader in self.sets.values() for note in loader.images.notes]
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]
        return metrics

    def save(self, folder: Path) -> None:
        from gblm.vit import models

        models.save(self.model, folder, self.stored)

    def loading(self, folder: Path) -> str:
        from gblm.vit import models

        return models.loading(folder)

    def examples(self) -> Examples:
        from gblm.vit.examples import Changed

        calibration = (self.settings.calibration, [self.batch])
        source, images = next(iter(self.sets.items()), calibration)
        return Changed(self.model, images, short(source))


def load(
    settings: ImageSettings,
    device: torch.device,
    scratch: Path,
    seconds: dict[str, float],
) -> Classifier:
    """Load the model, choose the images; returns both with what is done with them."""
    with clock(seconds, "load"):
        from gblm.vit import adapters, models

        if settings.model == str(demo.FOLDER):
            torch.set_num_threads(1)  # so small a model is slower on more, by far beside others
        model, offload, stored = models.load_offloaded(
            settings.model,
            settings.checkpoint,
            settings.offload,
            scratch,
            device=device,
            dtype=settings.dtype,
        )
    with clock(seconds, "data"):
        batch, sets, notes = draw(settings, model)
    return Classifier(
        settings,
        model,
        batch,
        adapters.adapter(model),
        f"{len(batch['images'])} images from {settings.calibration}",
        offload,
        notes,
        sets=sets,
        stored=stored,
    )


def outline(settings: ImageSettings, device: torch.device) -> Outline:
    """Return what config and file names tell of a run; no image is decoded."""
    from gblm.vit import adapters, data, models

    def sight(model: nn.Module) -> Source:
        parameter = next(model.parameters())
        shape = data.input_size(model)
        images = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
        labels = torch.zeros(1, dtype=torch.int64, device=parameter.device)
        return model, {"images": images, "labels": labels}, adapters.adapter(model)

    def whole() -> nn.Module:
        return models.load(settings.model, settings.checkpoint)

    try:
        model = models.sketch(settings.model)
    except Exception:  # whatever the model's code had against having no values
        model = whole()
    dtype = find_dtype(settings.dtype, device, lambda: torch.float32) or torch.float32
    images = data.open_images(
        settings.calibration, model, "calibration", labelled=not settings.unlabelled
    )
    images.chosen(settings.samples)
    sets = [data.open_images(name, model, "evaluation") for name in settings.evaluate]
    counts = [min(len(found), settings.evaluate_images or len(found)) for found in sets]
    task = Task(settings.samples, evaluated=sum(counts), together=data.TOGETHER)
    look = seen(lambda: nullcontext(sight(model.to(dtype))), lambda: sight(whole().to(dtype)))
    return Outline(look, task, torch.float32)


def draw(settings: ImageSettings, model: nn.Module) -> tuple[Batch, dict[str, Any], list[str]]:
    """Return the calibration batch, the evaluation images by data set, and notes on them."""
    from gblm.vit import data, models

    workers = settings.workers or data.WORKERS
    source = settings.calibration
    sets = {
        name: data.open_images(name, model, "evaluation", workers=workers)
        for name in settings.evaluate
    }
    for name, found in sets.items():
        for first in found.batches([0], 1, of=len(found)):  # none where that image is broken
            data.fitting(model, first, name)
    labelled = not settings.unlabelled
    images = data.open_images(source, model, "calibration", labelled=labelled, workers=workers)
    batch = data.calibration(images, settings.samples, settings.seed)
    parameter = next(model.parameters())
    batch = {
        name: value.to(parameter if value.is_floating_point() else parameter.device)
        for name, value in batch.items()
    }
    data.fitting(model, batch, source)
    notes = images.notes
    if "labels" not in batch:
        if labelled:
            raise GblmError(
                f"{source} has no labels; give a labelled source, or --unlabelled to take the "
                "model's own predictions"
            )
        batch = models.predicted(model, batch)
        notes.append("the calibration labels are the model's own predictions")
    limit = settings.evaluate_images
    return batch, {name: data.evaluation(found, limit=limit) for name, found in sets.items()}, notes


SIDE = side.Side(
    program="python -m gblm.vit",
    about="Prune an image classifier, without retraining.",
    examples=EXAMPLES,
    kind=ImageSettings,
    load=load,
    outline=outline,
    usual={"method": ("gblm",), "sparsity": ("0.5",), "alpha": "auto", "samples": 1024},
    demo={
        "model": str(demo.FOLDER),
        "calibration": "demo",
        "evaluate": ("demo",),
        "method": tuple(METHODS),
        "sparsity": ("0.5", "0.7", "0.8"),
    },
    alone=("calibration", "evaluate", "checkpoint"),
    sources=("demo",),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return side.main(SIDE, argv)


if __name__ == "__main__":
    sys.exit(main())
