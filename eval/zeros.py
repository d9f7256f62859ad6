"""Measure what zeros buy: file, memory and time of a pruned model beside the dense one, on a CPU.

    python eval/zeros.py --model MODEL --write docs/what-zeros-buy.md

The masks are those of magnitude: for size and time it matters how many weights are zero, not which.
Of the structured models gblm has removed neurons of every MLP, or whole blocks, so that about 30 %
of the weights of the blocks are gone. Both models of a row run in turns. What only a GPU can show
is published, and marked so.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tables
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import gblm
from gblm.command import measure
from gblm.gains import trial
from gblm.llm.adapters import blocks
from gblm.packed import plain_share
from gblm.report.wording import gain, size

COLUMNS = ("file", "memory", "CPU prefill", "CPU decode", "GPU prefill", "GPU decode")
NO = "no gain"
# Of a row's GPU columns: what is published, by the sources below the table.
PUBLISHED = {
    "2:4": ("× 0.72–0.79 in FP8 [1], no gain in bf16 [2]", "no gain: × 1.12 [3]"),
    "int8": ("", "× 0.70 [4]"),
}
SOURCES = """\
- [1] One FP8 linear of 64 to 512 tokens against dense FP8: https://github.com/pytorch/ao/pull/2012
- [2] BERT on an A100: https://github.com/pytorch/tutorials/issues/3236
- [3] LLaMA-2-7B, one sequence, RTX 4090: https://github.com/pytorch/tutorials/issues/3505
- [4] LLaMA-2-7B, 105 to 150 tokens a second, A100, torch.compile: the README of https://github.com/pytorch/ao
"""


def uses(model: PreTrainedModel, length: int, new: int) -> dict[str, Callable[[], Any]]:
    """Return a forward pass of so many tokens, and the generation of others."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=draw)
    count = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    return {
        "CPU prefill": partial(model, ids),
        "CPU decode": partial(model.generate, ids[:, : length // 8], **count),
    }


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears in the blocks of a model."""
    return {
        f"{name}.{inner}": own
        for name, block in blocks(model).items()
        for inner, own in block.named_modules()
        if isinstance(own, nn.Linear)
    }


def zeroed(dense: PreTrainedModel, pattern: str) -> PreTrainedModel:
    """Return the model with the smallest weights of its linears at 0."""
    model = copy.deepcopy(dense)
    keep = gblm.parse(pattern, "row").keep
    for own in linears(model).values():
        weight = own.weight.data
        weight[~keep(weight.abs().float())] = 0  # and not −0, as a product with a mask would give
    return model


def smaller(dense: PreTrainedModel, kind: str, share: float) -> PreTrainedModel:
    """Return the model without that share of the weights of its blocks: "neurons", or "blocks"."""
    model, count = copy.deepcopy(dense), 1.0
    if kind == "neurons":
        sizes = {name: own.weight.numel() for name, own in linears(dense).items()}
        count = sum(size for name, size in sizes.items() if ".mlp." in name) / sum(sizes.values())
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (16, 32), generator=draw)
    gblm.prune(model, {"input_ids": ids}, "magnitude", f"{kind}:{share / count:.3g}")
    return model


def packed_shares(model: PreTrainedModel) -> tuple[float, float, float]:
    """Return the share of bytes packed, of the file and of its linears, and what zstd makes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        alone = plain_share(Path(folder) / "model")
        sizes = gblm.pack(Path(folder) / "model", Path(folder) / "packed")
    return sizes.packed / sizes.dense, sizes.pruned_packed / sizes.pruned_dense, alone


def int8_row(dense: PreTrainedModel) -> dict[str, str]:
    """Return what weights of 8 bits buy the linears alone, by trial."""
    weights = {name: own.weight.detach() for name, own in linears(dense).items()}
    found: dict[str, str] = {}
    for column, positions in (("CPU prefill", 128), ("CPU decode", 1)):
        tried = trial(weights, (positions,), among="int8")
        dense_time = sum(own.number * own.seconds[own.base] for own in tried)
        quick = sum(own.number * own.seconds.get("int8", own.seconds[own.base]) for own in tried)
        found[column] = f"{gain(quick / dense_time, most=1e9)} of the linear layers"
    held = sum(own.numel() for own in weights.values())
    every = sum(own.numel() for own in dense.parameters())
    left = 1 - held * (1 - 1 / dense.dtype.itemsize) / every
    return {"file": gain(left), "memory": gain(left), **found}


def rows(
    dense: PreTrainedModel, length: int, new: int
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the cells of every row, and what the packed files hold in words."""
    found: dict[str, dict[str, str]] = {}
    said = []
    models = {pattern: partial(zeroed, dense, pattern) for pattern in ("0.5", "0.7", "2:4")}
    for kind in ("neurons", "blocks"):
        models[f"structured, 30 % by {kind}"] = partial(smaller, dense, kind, 0.3)
    for name, make in models.items():
        model = make()
        with torch.no_grad():
            entries = measure.speed(
                dense, model, partial(uses, length=length, new=new), dense.dtype
            )
        found[name] = {key: gain(own["pruned"] / own["dense"]) for key, own in entries.items()}
        if not name.startswith("structured"):
            whole, pruned, alone = packed_shares(model)
            packed = f"× {whole:.2f}, linear layers × {pruned:.2f}"
            found[f"{name}, packed"] = {**dict.fromkeys(COLUMNS[1:4], NO), "file": packed}
            said.append(
                f"{name}: {pruned:.1%} of the linear layers, zstd alone {alone:.1%} of the file"
            )
    found["int8, dense or pruned"] = int8_row(dense)
    return found, said


def table(found: dict[str, dict[str, str]]) -> str:
    """Return the Markdown table, with what is published of the GPU."""
    lines = [["", *COLUMNS], ["---", *["--:"] * len(COLUMNS)]]
    for name, cells in found.items():
        kind = name.partition(",")[0]
        ours = [cells.get(column, "") for column in COLUMNS[:4]]
        zeros = NO if kind in ("0.5", "0.7") else ""
        lines.append([name, *ours, *PUBLISHED.get(kind, (zeros, zeros))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Read the flags, measure, print the table and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="a causal language model with MLPs of gate, up and down")
    add("--dtype", default="bfloat16", help="[%(default)s]")
    add("--length", type=int, default=128, help="tokens of a forward pass [%(default)s]")
    add("--seconds", type=float, default=15, help="of each model at each use [%(default)s]")
    add("--new", type=int, default=64, help="tokens to generate [%(default)s]")
    add("--write", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    measure.SECONDS = args.seconds
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    found, said = rows(dense, args.length, args.new)
    count = sum(own.nbytes for own in dense.parameters())
    packages = f"torch {torch.__version__}, {tables.threads()}"
    text = (
        f"{Path(args.model).name} in {args.dtype}, {size(count)}; forward of {args.length} tokens, "
        f"{args.new} generated; {packages}.\n\n{table(found)}\n{SOURCES}\nPacked: "
        f"{'; '.join(said)}.\n"
    )
    tables.publish(text, args.write, "zeros", "## The table")


if __name__ == "__main__":
    main()
