"""Measure the peak memory of pruning from disk, against the model's size, and compare the masks.

    python eval/memory.py make FOLDER               a LLaMA of random weights, 2.7 GB in bfloat16
    python eval/memory.py measure FOLDER --write docs/benchmarks.md

Every run is a process of its own on the CPU. The base is what a process holds that has imported
torch and transformers; the peak is above that. With `--compare` the model is pruned in main memory
too, and every weight of both results is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tables

FLAGS = ["--samples", "16", "--length", "512", "--method", "gblm", "--sparsity", "0.5"]


def make(folder: Path, blocks: int, width: int, inner: int, vocabulary: int) -> None:
    """Write a random LLaMA shard by shard, with windows to calibrate on and a byte tokenizer."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    heads = width // 128
    LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).bfloat16()

    shards = []
    for i in range(blocks):
        name = f"model.layers.{i}"
        block = {f"{name}.self_attn.{k}_proj.weight": random(width, width) for k in "qkvo"}
        block |= {f"{name}.mlp.{k}_proj.weight": random(inner, width) for k in ("gate", "up")}
        block[f"{name}.mlp.down_proj.weight"] = random(width, inner)
        for norm in ("input", "post_attention"):
            block[f"{name}.{norm}_layernorm.weight"] = torch.ones(width).bfloat16()
        shards.append(block)
        save_file(block, folder / f"model-{i:05}.safetensors", metadata={"format": "pt"})
    rest = {"model.norm.weight": torch.ones(width).bfloat16()}
    rest |= {
        name: random(vocabulary, width) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save_file(rest, folder / "model-rest.safetensors", metadata={"format": "pt"})
    index = {name: f"model-{i:05}.safetensors" for i, block in enumerate(shards) for name in block}
    index |= dict.fromkeys(rest, "model-rest.safetensors")
    written = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(written))
    ids = torch.randint(vocabulary, (16, 512), generator=draw)
    np.savez(folder / "windows.npz", input_ids=ids.numpy())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    PreTrainedTokenizerFast(tokenizer_object=bytes_).save_pretrained(folder)


def peak(arguments: list[str]) -> tuple[float, float]:
    """Return the peak memory of a Python process in MB, and its seconds."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise SystemExit(log.read().decode())
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def equal(one: Path, other: Path) -> bool:
    """Say whether two results hold the same weights, bit for bit, in whatever shards."""
    import torch
    from safetensors import safe_open

    def files(folder: Path) -> dict[str, Path]:
        found = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    first, second = files(one), files(other)
    if set(first) != set(second):
        return False
    for name, path in first.items():
        with safe_open(path, "pt") as a, safe_open(second[name], "pt") as b:
            if not torch.equal(a.get_tensor(name), b.get_tensor(name)):
                return False
    return True


def measure(folder: Path, compare: bool, write: Path | None, section: str) -> None:
    """Prune from disk, and in memory where asked, and print what that takes."""
    base, _ = peak(["-c", "import torch, transformers, gblm, gblm.llm.__main__, gblm.llm.models"])
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    lines = [f"| model | {size:.0f} | |", f"| libraries alone | {base:.0f} | |"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        kinds = ["disk", "none"] if compare else ["disk"]
        for kind in kinds:
            flags = ["--model", str(folder), "--calibration", str(folder / "windows.npz"), *FLAGS]
            flags += ["--backward", "blocks", "--device", "cpu", "--micro-batch", "1"]
            out = Path(work) / kind
            found, seconds = peak(
                ["-m", "gblm.llm", *flags, "--offload", kind, "--output", str(out)]
            )
            lines.append(f"| --offload {kind} | {found:.0f} | {found - base:.0f} |")
            print(lines[-1], f"{seconds:.0f} s of CPU", flush=True)
        text = "| | MB | MB above the libraries |\n| --- | --: | --: |\n" + "\n".join(lines) + "\n"
        if compare:
            same = equal(Path(work) / "disk", Path(work) / "none")
            said = "equal, bit for bit" if same else "NOT equal"
            text += f"\nEvery weight of both results, and so every mask, is {said}.\n"
    text = f"gblm, 16 windows of 512 tokens, on the CPU:\n\n{text}"
    tables.publish(text, write, section, "## Memory, pruned from disk")


def main() -> None:
    """Read the flags; make the model, or measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["make", "measure"])
    parser.add_argument("folder", type=Path)
    for name, default in {"blocks": 24, "width": 2048, "inner": 5504, "vocabulary": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="[%(default)s]")
    parser.add_argument("--compare", action="store_true", help="prune in main memory too")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    parser.add_argument("--section", default="memory", help="of that file [%(default)s]")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.blocks, args.width, args.inner, args.vocabulary)
    else:
        measure(args.folder, args.compare, args.write, args.section)


if __name__ == "__main__":
    main()
