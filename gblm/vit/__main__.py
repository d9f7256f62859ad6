"""`python -m gblm.vit`: prune an image classifier, compare methods, save the result."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from gblm import vit
from gblm.base import Batch, GblmError
from gblm.command import settings as shell
from gblm.command import side
from gblm.command.job import Bars, Opened
from gblm.machine.device import find_dtype
from gblm.machine.processes import gathered
from gblm.methods import METHODS
from gblm.report import Evaluation, Examples, clock
from gblm.report.wording import short
from gblm.vit import demo

EXAMPLES = """\
examples:
  gblm vit                                    the packaged demo, all methods
  gblm vit --model vit_base_patch16_224 --calibration imagenet/train --output PRUNED
  gblm vit --model vit_base_patch16_224 --calibration imagenet/train --dry-run
  gblm vit --model vit_tiny_patch16_224 --checkpoint FILE.safetensors \\
      --method gblm,wanda,sparsegpt --sparsity 0.5,2:4 --calibration DIR --evaluate DIR"""


CLASSES = replace(shell.PATH, offers="file")
SAMPLES = 1024  # where none are named, or as many as there are


@dataclass(frozen=True, kw_only=True)
class ImageSettings(shell.Settings):
    """The flags of `python -m gblm.vit`."""

    checkpoint: Annotated[str | None, shell.WHAT(shell.FILE, "FILE")] = None
    """the weights, .safetensors [those of the model's name]"""
    num_classes: Annotated[int | None, shell.WHAT(shell.WHOLE, "N")] = None
    """classes of the head [those of the weights]"""
    img_size: Annotated[int | None, shell.WHAT(shell.WHOLE, "PIXELS")] = None
    """side of the images, for models of timm that take others than their own"""
    class_map: Annotated[Path | None, shell.CALIBRATION(CLASSES, "FILE")] = None
    """names of the class folders in the order of the classes, a line each, or JSON"""
    evaluate_images: Annotated[int | None, shell.EVALUATION(shell.NUMBER, "N")] = None
    """evaluate on N images only, drawn evenly over the classes"""
    workers: Annotated[int | None, shell.MEMORY(shell.WHOLE, "N")] = None
    """processes that decode images [auto]"""


@dataclass(kw_only=True)
class Classifier(Opened):
    """An image classifier with its evaluation images by data set.

    source: the checkpoint on disk that it was loaded from.
    """

    sets: dict[str, Any]
    source: Any = None

    def evaluate(self, bars: Bars) -> Evaluation:
        """Return top-1, top-5 and cross-entropy on every data set, and note what it says."""
        bar, metrics = partial(bars, "evaluate"), Evaluation()
        for name, loader in self.sets.items():
            metrics[name] = vit.evaluate.evaluate(self.model, loader, bar)
            for broken in gathered(loader.images.broken):  # what other processes have met
                loader.images.broken.update(broken)
            self.notes += [note for note in loader.images.notes if note not in self.notes]
        return metrics

    def counts(self) -> dict[str, tuple[int, str]]:
        return {name: (loader.of, "images") for name, loader in self.sets.items()}

    def evaluated(self) -> tuple[int, int]:
        return sum(loader.of for loader in self.sets.values()), vit.data.TOGETHER

    def save(self, folder: Path) -> None:
        vit.models.save(self.model, folder, self.source)

    def uses(self, model: nn.Module) -> dict[str, Callable[[], Any]]:
        """Return forward passes of 1 and 16 of the images."""
        images, own = self.batch["images"], next(model.parameters())
        chosen = {count: images[torch.arange(count) % len(images)].to(own) for count in (1, 16)}
        return {f"forward of {count}": partial(model, some) for count, some in chosen.items()}

    def graph(self) -> tuple[nn.Module, Tensor]:
        """Return the model from images to logits, and an image."""
        return vit.adapters.Logits(self.model), self.batch["images"][:1]

    def loading(self, folder: Path) -> str:
        return vit.models.loading(self.model, folder, self.settings.format == "packed")

    def examples(self) -> Examples:
        for source, loader in self.sets.items():
            names = loader.images.source.classes
            return vit.examples.Changed(self.model, loader, short(source), names)
        return vit.examples.Changed(self.model, [self.batch], short(self.settings.calibration))


def load(
    settings: ImageSettings, device: torch.device, scratch: Path, seconds: dict[str, float]
) -> Classifier:
    """Load the model, then choose the images."""
    with clock(seconds, "load"):
        if settings.model == demo.NAME:
            torch.set_num_threads(1)  # so small a model is slower on more, by far beside others
        model, offload, source = vit.models.load_offloaded(
            settings.model,
            settings.checkpoint,
            settings.offload,
            scratch,
            device=device,
            dtype=settings.dtype,
            **timm_options(settings),
        )
    side.check_folders(settings, model)
    with clock(seconds, "data"):
        images, sets = open_images(settings, model)
        settings = replace(settings, samples=settings.samples or min(SAMPLES, len(images)))
        for name, loader in sets.items():
            for batch in loader.images.batches([0], 1, of=loader.of):  # none where it is broken
                vit.data.fitting(model, batch, name)
        batch, notes = draw(settings, model, images)
    return Classifier(
        settings=settings,
        model=model,
        batch=batch,
        adapter=vit.adapters.adapter(model),
        calibration=f"{len(batch['images'])} images from {settings.calibration}",
        offload=offload,
        notes=notes,
        stored=source.dtype or torch.float32,
        sets=sets,
        source=source,
        origin=source.folder,
    )


@contextmanager
def sketch(settings: ImageSettings, device: torch.device) -> Iterator[Classifier]:
    """Look at what images there are, and decode none; the model has no values."""
    try:
        model = vit.models.sketch(settings.model, settings.checkpoint, **timm_options(settings))
    except GblmError:
        raise
    except Exception:  # whatever the model's code had against it
        options = timm_options(settings)
        model = vit.models.load(settings.model, settings.checkpoint, **options)
    dtype = find_dtype(settings.dtype, device, lambda: torch.float32) or torch.float32
    images, sets = open_images(settings, model.to(dtype))
    settings = replace(settings, samples=settings.samples or min(SAMPLES, len(images)))
    images.order(settings.samples)
    pixels = torch.empty(1, dtype=dtype).expand(settings.samples, *vit.data.input_size(model))
    batch = {"images": pixels, "labels": torch.zeros(settings.samples, dtype=torch.int64)}
    yield Classifier(settings, model, batch, vit.adapters.adapter(model), sets=sets)


def timm_options(settings: ImageSettings) -> dict[str, int]:
    """Return the options that timm makes a model by."""
    named = {"num_classes": settings.num_classes, "img_size": settings.img_size}
    return {name: value for name, value in named.items() if value}


def open_images(settings: ImageSettings, model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """Return the images to calibrate on, and those to evaluate on by data set."""
    limit = settings.evaluate_images
    options: dict[str, Any] = {
        "workers": settings.workers or vit.data.WORKERS,
        "names": settings.class_map,
    }
    sets = {}
    for name in settings.evaluate:
        images = vit.data.open_images(name, model, "evaluation", **options)
        sets[name] = vit.data.evaluation(images, limit=limit)
    source, labelled = settings.calibration, not settings.unlabelled
    images = vit.data.open_images(source, model, "calibration", labelled=labelled, **options)
    return images, sets


def draw(settings: ImageSettings, model: nn.Module, images: Any) -> tuple[Batch, list[str]]:
    """Return the calibration batch, with predictions for labels where asked for, and notes."""
    parameter = next(model.parameters())
    batch = {
        name: value.to(parameter if value.is_floating_point() else parameter.device)
        for name, value in vit.data.calibration(images, settings.samples, settings.seed).items()
    }
    vit.data.fitting(model, batch, settings.calibration)
    if "labels" in batch:
        return batch, images.notes
    if not settings.unlabelled:
        raise GblmError(
            f"{settings.calibration} has no labels; give a labelled source, or --unlabelled to "
            "take the model's own predictions"
        )
    notes = [*images.notes, "the calibration labels are the model's own predictions"]
    return vit.models.predicted(model, batch), notes


SIDE = side.Side(
    program="gblm vit",
    about="Prune an image classifier, without retraining.",
    examples=EXAMPLES,
    kind=ImageSettings,
    load=load,
    sketch=sketch,
    usual={"method": ("best",), "sparsity": ("0.5",), "alpha": "auto"},
    demo={
        "model": demo.NAME,
        "calibration": "demo",
        "evaluate": ("demo",),
        "method": tuple(METHODS),
        "sparsity": ("0.5", "0.7", "0.8"),
    },
    alone=("calibration", "evaluate", "checkpoint"),
)
main = partial(side.main, SIDE)

if __name__ == "__main__":
    sys.exit(main())
