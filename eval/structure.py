"""Structured pruning side by side with others, without training: what is left of a model.

    python eval/structure.py llm --model DIR --calibration FILE --evaluate FILE --length 256 \\
        --share 0.2 --patterns neurons:0.3,blocks:0.17 --methods best,best:refine=3
    python eval/structure.py vit --checkpoint FILE --calibration DIR --evaluate DIR \\
        --share 0.2 --patterns neurons:0.33

share: of the weights in the blocks that the others remove, none of them for 0; patterns and
methods: what gblm does; --speed times the blocks that it leaves. The others of a language model are
written here by their formulas, on the same windows:

    taylor   Σ |w·g| of each unit, g the gradient of the mean loss (LLM-Pruner, arXiv 2305.11627),
             the same share of every layer; the first-order term of its elements
    flap     Var(x_j)·‖W_j‖² of the reader's inputs, standardised in each layer, one threshold for
             the model, mean inputs put into a bias (FLAP, arXiv 2312.11983)
    slicegpt the stream keeps the first principal components of what the norms make of it, before
             each attention and MLP and the head; the matrices that turn one stream into the next
             count (SliceGPT, arXiv 2401.15024)
    shortgpt the blocks f of the lowest mean 1 − cos(x, f(x)) go, as many as the share holds
             (ShortGPT, arXiv 2403.03853)

and of an image classifier the Taylor importance of Torch-Pruning (pip install torch-pruning), in
each layer alike, global, and isomorphic. Each prunes neurons alone, and all that it can.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tables
import torch
from torch import Tensor, nn

import gblm
from gblm import llm, methods, vit
from gblm.base import Batch
from gblm.machine.speed import take_turns
from gblm.maths import patterns
from gblm.walk.blocks import Units
from gblm.walk.depth import Depth
from gblm.walk.units import find_units
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk

TOGETHER = 4
SECONDS = 2.0  # of each model at each use


def block_weights(walk: Walk, model: nn.Module) -> int:
    """Return how many numbers the matrices of the blocks of a model hold."""
    return sum(
        own.numel()
        for block in walk.adapter.blocks(model).values()
        for own in block.parameters()
        if own.ndim > 1
    )


@torch.no_grad()
def remove(units: Units, gone: Tensor) -> None:
    """Zero units, by a mask `[units]`."""
    for linear, axis, places in units.parts():
        linear.weight.index_fill_(axis, places[gone].flatten(), 0)


def taylor(model: nn.Module, batch: Batch, every: list[Units]) -> list[Tensor]:
    """Return Σ |w·g| of each unit: g is the gradient of the mean loss of the windows."""
    model.requires_grad_()
    for part in batch["input_ids"].split(TOGETHER):
        loss = model(input_ids=part, labels=part).loss * len(part) / len(batch["input_ids"])
        loss.backward()
    found = []
    for units in every:
        score = torch.zeros(len(units.channels))
        for linear, axis, places in units.parts():
            gradient = linear.matrix.view(linear.parameter.grad)  # type: ignore[arg-type]
            each = (linear.weight * gradient).abs().sum(dim=1 - axis)
            score += each[places].sum(dim=1)
        found.append(score)
    model.zero_grad()
    model.requires_grad_(False)
    return found


@torch.no_grad()
def fluctuation(
    model: nn.Module, batch: Batch, every: list[Units]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the standardised Var(x_j)·‖W_j‖² of each unit, and the mean inputs of the readers."""
    sums = {id(units.reader.parameter): [0, 0.0, 0.0] for units in every}

    def add(module: Any, args: tuple[Tensor]) -> None:
        x, own = args[0].flatten(0, -2).double(), sums[id(module.weight)]
        own[0], own[1], own[2] = own[0] + len(x), own[1] + x.sum(0), own[2] + x.square().sum(0)

    named = (m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in sums)
    hooks = [module.register_forward_pre_hook(add) for module in named]
    for part in batch["input_ids"].split(TOGETHER):
        model(input_ids=part)
    for hook in hooks:
        hook.remove()
    scores, means = [], []
    for units in every:
        count, total, square = sums[id(units.reader.parameter)]
        means.append((total / count).float())
        variance = (square / count - (total / count) ** 2).float()
        each = (variance * units.reader.weight.float().square().sum(dim=0))[units.channels].mean(1)
        scores.append((each - each.mean()) / each.std())
    return scores, means


def influences(walk: Walk, depth: Depth) -> dict[str, float]:
    """Return the mean 1 − cos(x, f(x)) over positions of each block that can go, by its name."""
    found = {}

    def add(visit: Visit) -> None:
        visit.outputs = list(visit.finished())
        pairs = zip(depth.outputs(visit), visit.outputs, strict=True)
        each = [1 - torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairs]
        found[visit.block.name] = float(torch.cat(each).mean())

    forward(walk, add)
    return found


@contextmanager
def sliced(model: Any, batch: Batch, share: float) -> Iterator[float]:
    """Have a LLaMA keep fewer components of its stream for a time; gives the share it removed.

    With Q of the largest eigenvalues of Σ n(x)ᵀ n(x), n the norm without its factors, the stream x
    becomes x·Q·Qᵀ. A block's matrices then have d' of d rows or columns, and two more, d'·d', turn
    its stream from one basis into the next.
    """
    layers, width = model.model.layers, model.config.hidden_size
    norms = [x for own in layers for x in (own.input_layernorm, own.post_attention_layernorm)]
    norms.append(model.model.norm)
    grams = [torch.zeros(width, width, dtype=torch.float64) for _ in norms]
    seen: dict[int, Tensor] = {}

    def add(i: int, module: Any, args: tuple[Tensor]) -> None:
        x = args[0].detach().flatten(0, -2).double()
        x = x / x.square().mean(dim=1, keepdim=True).add(module.variance_epsilon).sqrt()
        grams[i] += x.T @ x

    hooks = [own.register_forward_pre_hook(partial(add, i)) for i, own in enumerate(norms)]
    with torch.no_grad():
        for part in batch["input_ids"].split(TOGETHER):
            model(input_ids=part)
    for hook in hooks:
        hook.remove()
    whole = sum(own.numel() for own in layers.parameters() if own.ndim > 1)

    def removed(kept: int) -> float:
        return 1 - kept / width - 2 * len(layers) * kept**2 / whole

    kept = max(n for n in range(1, width) if removed(n) >= share)
    bases = [torch.linalg.eigh(own).eigenvectors[:, -kept:].to(model.dtype) for own in grams]

    def keep(i: int, module: Any, args: Any, output: Any) -> Any:
        """Let what is added to the stream leave it in the subspace of the next norm."""
        x, out = seen.get(i - 1, 0), output[0] if isinstance(output, tuple) else output
        new = ((out + x) @ bases[i]) @ bases[i].T
        seen[i] = new
        return (new - x, *output[1:]) if isinstance(output, tuple) else new - x

    adders = [model.model.embed_tokens]
    adders += [module for own in layers for module in (own.self_attn, own.mlp)]
    hooks = [own.register_forward_hook(partial(keep, i)) for i, own in enumerate(adders)]
    yield removed(kept)
    for hook in hooks:
        hook.remove()


def alike(scores: list[Tensor], every: list[Units], share: float) -> list[Tensor]:
    """Return which units go: the lowest of each layer, the same share of all."""
    return [score.argsort().argsort() < round(share * len(score)) for score in scores]


def threshold(scores: list[Tensor], every: list[Units], share: float) -> list[Tensor]:
    """Return which units go: the lowest of all layers, until they hold a share of the weights."""
    costs = torch.cat([torch.full((len(x.channels),), x.weights) for x in every]).double()
    flat = torch.cat(scores)
    order = flat.argsort()
    gone = torch.zeros(len(flat), dtype=torch.bool)
    gone[order[costs[order].cumsum(0) <= share * costs.sum()]] = True
    return list(gone.split([len(own.channels) for own in every]))


def language(args: argparse.Namespace) -> Iterator[Row]:
    """Yield each contestant, the share of the blocks' weights it removed, and the perplexity."""
    model, tokenizer = llm.models.load(args.model, dtype="float32")
    windows = {"samples": args.samples, "length": args.length}
    batch = llm.models.windows(args.calibration, model.config, tokenizer, **windows)
    ids = llm.data.evaluation(args.evaluate, tokenizer, args.length, args.windows)
    yield Row("dense", 0.0, llm.evaluate.perplexity(model, ids))
    if args.share:
        depth = Depth.of(walk := Walk.of(model, batch), patterns.parse(f"blocks:{args.share}"))
        influence = influences(walk, depth)
        depth.gone = sorted(influence, key=lambda name: influence[name])[: depth.number]
        with depth.passing(depth.gone):
            removed = depth.number / len(walk.blocks)
            yield Row("ShortGPT, blocks", removed, llm.evaluate.perplexity(model, ids))
        with sliced(model, batch, args.share) as removed:
            yield Row("SliceGPT", removed, llm.evaluate.perplexity(model, ids))
    for kinds in (("neurons",), ("neurons", "heads")) if args.share else ():
        for name in ("taylor", "flap"):
            own = copy.deepcopy(model)
            walk = Walk.of(own, batch)
            every = [x for units in find_units(walk).values() for x in units if x.kind in kinds]
            whole = sum(x.weights * len(x.channels) for x in every)
            share = args.share * block_weights(walk, own) / whole
            means: list[Tensor] = []
            if name == "taylor":
                gone = alike(taylor(own, batch, every), every, share)
            else:
                scores, means = fluctuation(own, batch, every)
                gone = threshold(scores, every, share)
            for i, (units, mask) in enumerate(zip(every, gone, strict=True)):
                if means:
                    inputs = units.channels[mask].flatten()
                    bias = units.reader.weight[:, inputs].float() @ means[i][inputs]
                    module = own.get_submodule(units.reader.name)
                    module.bias = nn.Parameter(bias.to(units.reader.weight.dtype))
                remove(units, mask)
            lost = sum(int(m.sum()) * x.weights for x, m in zip(every, gone, strict=True))
            removed = lost / block_weights(walk, own)
            yield Row(f"{name}, {' and '.join(kinds)}", removed, llm.evaluate.perplexity(own, ids))
    timed = {f"{n} tokens": {"input_ids": ids[:1, :n]} for n in (128, 1) if args.speed}
    for method, pattern in ways(args):
        measure = partial(llm.evaluate.perplexity, windows=ids)
        yield ours(model, batch, method, pattern, measure, timed)


def images(args: argparse.Namespace) -> Iterator[Row]:
    """Yield each contestant, the share of the blocks' weights it removed, and the top-1."""
    model = vit.load(args.model, args.checkpoint)
    batch = vit.data.calibration(
        vit.data.open_images(args.calibration, model, "calibration"), args.samples
    )
    loader = vit.data.evaluation(vit.data.open_images(args.evaluate, model, "evaluation"))

    def top1(own: nn.Module) -> float:
        return vit.evaluate.evaluate(own, loader)["top1"]

    yield Row("dense", 0.0, top1(model))
    walk = Walk.of(model, batch)
    whole = block_weights(walk, model)
    rivals: list[tuple[str, dict[str, bool], bool]] = [
        ("Torch-Pruning, Taylor, neurons alike", {}, True),
        ("Torch-Pruning, Taylor, neurons, global", {"global_pruning": True}, True),
        ("Torch-Pruning, isomorphic Taylor", {"global_pruning": True, "isomorphic": True}, False),
    ]
    for name, kind, mlp in rivals if args.share else []:
        low, high = 0.0, 0.9
        for _ in range(7):  # the ratio that removes the share
            own, ratio = copy.deepcopy(model), (low + high) / 2
            torch_pruned(own, batch, ratio, mlp, kind)
            removed = 1 - block_weights(walk, own) / whole
            low, high = (ratio, high) if removed < args.share else (low, ratio)
        yield Row(name, removed, top1(own))
    inputs = {f"{n} images": {"images": batch["images"][:n]} for n in (1, 16) if args.speed}
    for method, pattern in ways(args):
        yield ours(model, batch, method, pattern, top1, inputs)


def torch_pruned(
    model: Any, batch: Batch, ratio: float, mlp: bool, options: dict[str, Any]
) -> None:
    """Prune a ViT of timm by Torch-Pruning as its own example does, the MLPs alone or all of it."""
    import torch_pruning as tp

    heads = {m: model.blocks[0].attn.num_heads for n, m in model.named_modules() if "qkv" in n}
    ignored = [model.head]
    if mlp:
        ignored += [*heads, *(block.mlp.fc2 for block in model.blocks), model.patch_embed.proj]
    for block in model.blocks:
        block.attn.fused_attn = False
    pruner = tp.pruner.BasePruner(
        model,
        batch["images"][:1],
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads=heads,
        prune_head_dims=True,
        round_to=1,
        **options,
    )
    model.requires_grad_()
    for x, y in zip(batch["images"].split(32), batch["labels"].split(32), strict=True):
        nn.functional.cross_entropy(model(x), y).backward()
    pruner.step()
    model.zero_grad()
    for block, module in zip(model.blocks, pruner.num_heads.items(), strict=True):
        block.attn.num_heads = module[1]
        block.attn.head_dim = module[0].out_features // (3 * module[1])
        block.attn.attn_dim = block.attn.head_dim * module[1]


def ways(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return each method with each pattern."""
    named = [pattern for pattern in args.patterns.split(",") if pattern]
    return [(method, pattern) for pattern in named for method in args.methods.split(",")]


@dataclass
class Row:
    """A contestant: the share of the blocks' weights it removed, and what is measured of the rest.

    seconds: of processor time that it took. times: of the blocks, and their bytes, by those of the
    dense model.
    """

    name: str
    removed: float
    value: float
    seconds: float = 0.0
    times: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        more = "".join(f"  {name} × {ratio:.2f}" for name, ratio in self.times.items())
        return f"{self.name:48} {self.removed:6.1%} {self.value:9.3f}{more}"


def ours(
    model: nn.Module,
    batch: Batch,
    method: str,
    pattern: str,
    measure: Callable[[nn.Module], float],
    inputs: dict[str, Batch],
) -> Row:
    """Return the row of a method of gblm; inputs: of which the blocks' time is taken, by name."""
    own, start = copy.deepcopy(model), time.process_time()
    whole = block_weights(walk := Walk.of(own, batch), own)
    name, options = methods.parse(method)
    gblm.prune(own, batch, methods.make(name, **options), pattern)
    left, seconds = block_weights(walk, own), time.process_time() - start
    row = Row(f"gblm {method}, `{pattern}`", 1 - left / whole, measure(own), seconds)
    for of, part in inputs.items():
        works = [partial(walk.adapter.trunk, each, part) for each in (model, own)]
        with torch.no_grad():
            dense, small = take_turns(works, torch.device("cpu"), SECONDS)
        row.times |= {f"time of {of}": small.seconds / dense.seconds, "bytes": left / whole}
    return row


def page(rows: list[Row], args: argparse.Namespace, metric: str) -> str:
    """Return the table of all rows, in Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row.times))
    lines = [["", "removed", metric, *columns], ["---", *["--:"] * (2 + len(columns))]]
    for row in rows:
        times = [f"× {row.times[name]:.2f}" if row.times else "" for name in columns]
        removed = f"{row.removed:.1%}" if row.removed else ""
        lines.append([row.name, removed, f"{row.value:.2f}", *times])
    about = f"{Path(args.model).name}: {args.samples} samples of {Path(args.calibration).name}"
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{about}; {tables.threads()}.\n\n{text}"


def main() -> None:
    """Run the contestants of a command line, and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("side", choices=["llm", "vit"])
    for name in ("calibration", "evaluate"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--checkpoint")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--patterns", default="")
    parser.add_argument("--methods", default="best")
    parser.add_argument("--speed", action="store_true", help="time the blocks of what gblm leaves")
    parser.add_argument("--write", type=Path, help="a Markdown page for the table")
    parser.add_argument("--section", default="", help="its name there")
    args = parser.parse_args()
    rows = []
    for row in (language if args.side == "llm" else images)(args):
        rows.append(row)
        print(row, flush=True)
    text = page(rows, args, "perplexity" if args.side == "llm" else "top-1 in %")
    name = args.section or f"structure-{Path(args.model).name}"
    tables.publish(text, args.write, name, f"### {name}")


if __name__ == "__main__":
    main()
