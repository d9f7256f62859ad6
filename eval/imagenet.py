"""Evaluate an image classifier of timm by top-1 and top-5, as timm's own validate.py does.

    python eval/imagenet.py vit_base_patch16_224 --data imagenet/val
    python eval/imagenet.py vit_tiny_patch16_224 --data $GBLM_ASSETS/imagenet-mini/val \\
        --checkpoint $GBLM_ASSETS/vit_tiny_patch16_224.safetensors --write docs/imagenet.md

The model is a name of timm or a folder, one that gblm has pruned as well as any other. The images
lie in a folder for each class; folders named by synsets may be fewer than the classes of the model.
They are pre-processed as validate.py does it: at the size a model is tested at where that is larger
than the one it was trained at, which `python -m gblm.vit` takes (`--use-train-size`, of the same
name there, takes it here too). `--write` puts the result into a section of a Markdown file, and
beside it into a JSON file with the names that validate.py gives its results.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tables

from gblm.command.side import guarded
from gblm.machine.device import find_device


def parser() -> argparse.ArgumentParser:
    """Return the parser of the script."""
    new = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = new.add_argument
    add("model", help="a name of timm or a folder")
    add("--data", required=True, help="a folder of images, or any source of vision with labels")
    add("--checkpoint", help="the weights, where they are not those of the name or the folder")
    add("--limit", type=int, help="evaluate on a choice of this many, as even as the classes allow")
    add("--use-train-size", action="store_true", help="the image size of training")
    add("--device", default="auto", help="cpu, cuda, auto [%(default)s]")
    add("--write", type=Path, help="Markdown file for the result; the JSON goes beside it")
    return new


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return top-1 and top-5 in % and what they were measured with, as validate.py names it."""
    from gblm.vit import data, models
    from gblm.vit.evaluate import evaluate

    model = models.load(args.model, args.checkpoint).to(find_device(args.device))
    test_size = not args.use_train_size
    config = data.config(model, test_size)
    images = data.open_images(args.data, model, "evaluation")
    images = replace(images, transform=data.preprocessing(model, test_size))
    loader = data.evaluation(images, limit=args.limit)
    found = evaluate(model, loader, progress)
    top1, top5 = round(found["top1"], 4), round(found["top5"], 4)
    return {
        "model": tables.portable(args.model),
        "top1": top1,
        "top1_err": round(100 - top1, 4),
        "top5": top5,
        "top5_err": round(100 - top5, 4),
        "param_count": round(sum(own.numel() for own in model.parameters()) / 1e6, 2),
        "img_size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "cross_entropy": round(found["cross_entropy"], 4),
        "images": len(loader.indices) - len(images.broken),
        "notes": images.notes,
    }


def progress(done: int, total: int) -> None:
    """Show how far the evaluation is, on a terminal."""
    if sys.stderr.isatty():
        print(f"\rbatch {done} of {total}", end="\n" if done == total else "", file=sys.stderr)


def markdown(args: argparse.Namespace, found: dict[str, Any]) -> str:
    """Return the result as a table, with the standard errors of a share of so many images."""
    name, images = Path(found["model"]).name, found["images"]
    lines = ["| model | top-1 | top-5 | cross-entropy |", "|---|--:|--:|--:|"]
    shares = [
        f"{value:.2f} ± {(value * (100 - value) / images) ** 0.5:.2f}"
        for value in (found["top1"], found["top5"])
    ]
    lines.append(f"| {name} | {' | '.join(shares)} | {found['cross_entropy']:.4f} |")
    text = f"{images} images of {Path(args.data).name}, {found['img_size']} pixels, crop "
    text += f"{found['crop_pct']}, {found['interpolation']}; % ± standard error.\n\n"
    text += "\n".join(lines) + "\n\n" + "".join(f"- {note}\n" for note in found["notes"])
    return f"{text}    {tables.portable(shlex.join(['python', *sys.argv]))}\n"


def main() -> None:
    """Read the flags, evaluate, show and write the result."""
    args = parser().parse_args()
    found = measure(args)
    text = markdown(args, found)
    print(text)
    if args.write:
        name = Path(found["model"]).name
        tables.write(args.write, f"imagenet:{name}", f"## ImageNet: {name}", text)
        file = args.write.with_name(f"imagenet-{name}.json")
        tables.replace(file, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(guarded(main))
