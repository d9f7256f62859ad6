"""Train the demo model of `gblm.vit` again: a tiny ViT on the 8×8 digits of scikit-learn.

    python eval/train_demo_vit.py --output demo_model

It writes a folder that timm loads as `local-dir:demo_model`. The default number of steps takes a
few minutes on 2 idle cores; where other programs want them too, set OMP_WAIT_POLICY=passive, or
the threads lose most of their time waiting for each other.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from gblm.vit import data, demo, models
from gblm.vit.evaluate import evaluate

BATCH = 64  # images in a step
PEAK_RATE = 2e-3
WARMUP = 100  # steps in which the rate rises to its peak; then it falls, by a cosine, to 0
TURN = 10  # degrees, at most, to either side
SHIFT = 0.7  # pixels, at most, in each direction
STRETCH = 0.1  # of the size, at most, in each direction; the same for the slant


def tiny_vit() -> VisionTransformer:
    """Return a fresh timm ViT for digits: 16 patches of 2×2 pixels and a class token.

    Every linear has a multiple of 16 inputs, so that all n:m patterns up to 8:16 apply.
    """
    model: Any = timm.create_model(
        "vit_tiny_patch16_224",  # timm loads a folder by a name that it knows
        pretrained_cfg_overlay={  # the model's own pre-processing: pixels as they are, to -1…1
            "input_size": (1, 8, 8),
            "crop_pct": 1.0,
            "mean": (0.5,),
            "std": (0.5,),
            "tag": "digits",
            "license": "mit",
        },
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=4,
    )
    for block in model.blocks.modules():
        if isinstance(block, torch.nn.Linear):  # timm's 0.02 is for widths of hundreds
            torch.nn.init.normal_(block.weight, std=block.in_features**-0.5)
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    return model


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images `[n, 1, h, w]`, each turned, stretched, slanted and shifted at random."""

    def drawn(*shape: int) -> Tensor:  # uniform in -1…1
        return 2 * torch.rand(len(images), *shape, generator=generator) - 1

    angle = drawn() * math.radians(TURN)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    stretch = torch.eye(2) + STRETCH * drawn(2, 2)
    shift = drawn(2, 1) * 2 * SHIFT / images.shape[-1]
    grid = affine_grid(
        torch.cat([turn @ stretch, shift], dim=2), list(images.shape), align_corners=False
    )
    # Outside of the picture there is no ink, and that is -1.
    return grid_sample(images + 1, grid, align_corners=False) - 1


def train(model: VisionTransformer, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """Train on the images, moved anew each time: AdamW, a linear warmup, a fall to 0."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    start, losses, order = time.monotonic(), [], torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        fall = max(0, step - WARMUP) / max(1, steps - WARMUP)
        rate = PEAK_RATE * min(step / WARMUP, (1 + math.cos(math.pi * fall)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        loss = cross_entropy(model(moved(images[chosen], generator)), labels[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 500 == 0:
            minutes, mean = (time.monotonic() - start) / 60, sum(losses[-500:]) / 500
            print(f"{minutes:5.1f} min  step {step}/{steps}  loss {mean:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=demo.FOLDER, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000, help=f"of {BATCH} images each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    model = tiny_vit()
    images = data.open_images("demo", model, "calibration", workers=0)
    held_out = data.evaluation(data.open_images("demo", model, "evaluation", workers=0))
    batch = data.calibration(images, len(images))
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(images):,} images to train on, {len(held_out.indices):,} held out")
    epochs = args.steps * BATCH / len(images)
    print(f"{weights:,} weights, {args.steps} steps, {epochs:.0f} times the images")
    train(model, batch["images"], batch["labels"], args.steps, args.seed)

    models.save(model, args.output)
    saved = models.load(str(args.output))
    for name, loader in {"training": [batch], "held-out": list(held_out)}.items():
        found = evaluate(saved, loader)
        print(f"{name}  top-1 {found['top1']:.2f} %, cross-entropy {found['cross_entropy']:.4f}")


if __name__ == "__main__":
    main()
