"""Draw the picture of the README: what methods leave of a language model and of a ViT.

    GBLM_ASSETS=… [SMOLLM2=…] python eval/overview.py

The runs are those of `eval/quality.py` and stand in the same store: a call does only what is
missing there. The language model is SmolLM2-135M where its runs are stored, or the folder of it
and its texts is named; else a small one of the assets.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import alpha
import figures
import quality
import tables

from gblm.command.side import guarded

SMOLLM2 = "SmolLM2-135M"
CASES = {  # what `eval/quality.py` takes; the methods of one picture see the same samples
    SMOLLM2: "llm --model $SMOLLM2/smollm2 --samples 128 --length 512 --windows 100 "
    "--calibration $SMOLLM2/wikitext-first.txt --evaluate $SMOLLM2/wikitext-rest.txt "
    "--methods wanda,gblm,sparsegpt,best --patterns 0.5,0.6,0.7,2:4",
    "stories260K": "llm --model $GBLM_ASSETS/llama/stories260K --length 256 --draws 3 "
    "--calibration $GBLM_ASSETS/text/tinystories-calib.txt "
    f"--evaluate {alpha.STORIES}/evaluation.npz "
    "--methods magnitude,wanda,gblm,sparsegpt,best --patterns 0.5,0.6,0.7,2:4",
    "ViT-tiny/16": "vit --model vit_tiny_patch16_224 --samples 1000 "
    "--checkpoint $GBLM_ASSETS/vit_tiny_patch16_224.safetensors "
    f"--calibration {alpha.PICTURES}/train --evaluate {alpha.PICTURES}/val "
    "--methods magnitude,wanda,gblm,sparsegpt,best --patterns 0.5,0.6,0.7,2:4",
}


def panel(axes: Any, name: str, args: argparse.Namespace) -> None:
    """Draw a metric of one model against the patterns."""
    values, level = figures.measured(args)
    metric = next(iter(quality.METRICS[args.side]))
    quality.draw_patterns(args, metric, values, level)(axes)
    axes.set_title(f"{name}: {figures.title(args)}", fontsize="medium")
    axes.set_ylabel("")
    axes.grid(alpha=0.3)


def there(args: argparse.Namespace) -> bool:
    """Say whether the runs of a case are stored, or its model is named by $SMOLLM2."""
    known = quality.stored(args.store)
    keys = (quality.key_of(quality.key(args, run)) for run in (None, *quality.wanted(args)))
    return bool(os.environ.get("SMOLLM2")) or all(key in known for key in keys)


def main() -> None:
    """Carry out what is missing of both models, then draw them side by side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, default=Path("docs/benchmarks.md"))
    args = parser.parse_args()
    cases = {n: quality.parser().parse_args(alpha.case(n, CASES)) for n in CASES}
    cases.pop("stories260K" if there(cases[SMOLLM2]) else SMOLLM2)

    def draw(canvas: Any) -> None:
        both = canvas.subplots(1, len(cases))
        for axes, (name, flags) in zip(both, cases.items(), strict=True):
            panel(axes, name, flags)
        canvas.legend(*both[-1].get_legend_handles_labels(), loc="outside lower center", ncols=6)

    shown = tables.picture(args.write.with_name("overview.svg"), draw, (9, 3.6))
    said = "; ".join(quality.described(flags) for flags in cases.values())
    command = tables.portable(shlex.join(["python", *sys.argv]))
    text = f"{said}.\n\n{shown}    {command}\n"
    print(text)
    tables.write(args.write, "overview", "## At a glance", text)


if __name__ == "__main__":
    sys.exit(guarded(main))
