"""The contestants of `eval/speed.py`: what runs in processes of its own.

    python eval/contestants.py ENTRY ARGUMENTS

A process imports what its entry needs and no more, in the environment of a foreign package too.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

SPARSITY, ALPHA = 0.5, 100.0
SAYS = "measured: "  # before what a process measures by itself
BATCH = 8  # of llmcompressor: the quickest
MICRO_BATCHES = (2, 4, 8, 16, 32)  # that a plain pass chooses from
CHOOSING = 32  # the images it does that by


def draw(model: str, calibration: str, samples: str, length: str, path: str) -> None:
    """Draw the calibration windows as `gblm.llm` does and save them for all contestants."""
    import numpy

    from gblm.llm import models

    sizes = {"samples": int(samples), "length": int(length)}
    found = models.windows(calibration, *models.load_tokenizer(model), **sizes)
    numpy.savez(path, input_ids=found["input_ids"].numpy())


def load(model: str) -> Any:
    """Load a model as transformers does; alone, this is the share of the start-up."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model)


def linears(module: nn.Module) -> list[nn.Module]:
    """Return the linears in a module."""
    return [part for part in module.modules() if type(part).__name__ == "Linear"]


def plain_gblm(model: str, windows: str) -> Any:
    """Prune as the published code does, in one process: autograd on each sample, then layers."""
    import numpy
    import torch

    loaded = load(model)
    samples = torch.from_numpy(numpy.load(windows)["input_ids"]).split(1)
    l1: dict[nn.Module, Any] = defaultdict(float)
    l2: dict[nn.Module, Any] = defaultdict(float)  # that code always makes both norms
    for ids in samples:
        loaded(input_ids=ids, labels=ids).loss.backward()
        for linear in linears(loaded.model.layers):
            grad = linear.weight.grad * ALPHA
            l1[linear] += grad.abs()
            l2[linear] += grad**2
        loaded.zero_grad()
    with torch.no_grad():
        plain_layers(loaded, samples, l1)
    return loaded


def plain_layers(model: Any, samples: tuple[Tensor, ...], l1: dict[nn.Module, Tensor]) -> None:
    """Prune layer by layer, sample by sample, by |W|·(sqrt(Σx² / n) + Σ|100 g|)."""
    import torch

    states: list[Tensor] = []
    others: dict[str, Any] = {}
    squares: dict[nn.Module, Any] = defaultdict(float)

    def catch(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        others.update(kwargs)
        raise StopIteration

    def add(linear: nn.Module, args: tuple[Tensor], _: Tensor) -> None:
        squares[linear] += torch.norm(args[0].flatten(0, -2).t().float(), p=2, dim=1) ** 2

    model.config.use_cache = False
    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in samples:
        with suppress(StopIteration):
            model(input_ids=ids)
    handle.remove()
    for layer in model.model.layers:
        handles = [linear.register_forward_hook(add) for linear in linears(layer)]
        for state in states:
            layer(state, **others)
        for handle in handles:
            handle.remove()
        for linear in linears(layer):
            size = linear.weight.abs()
            score = size * torch.sqrt(squares[linear] / len(states)) + size * l1[linear]
            order = torch.sort(score, dim=-1, stable=True)[1]
            drop = torch.zeros_like(score, dtype=torch.bool)
            drop.scatter_(1, order[:, : int(score.shape[1] * SPARSITY)], True)
            linear.weight[drop] = 0
        states = [layer(state, **others) for state in states]


def check(model: str, windows: str) -> None:
    """Compare the masks of the baseline with those of gblm, and say how many cells agree."""
    import numpy
    import torch

    import gblm

    ours, theirs = load(model), plain_gblm(model, windows)
    ids = torch.from_numpy(numpy.load(windows)["input_ids"])
    gblm.prune(ours, {"input_ids": ids}, gblm.METHODS["gblm"](alpha=ALPHA), str(SPARSITY))
    pairs = zip(linears(ours.model.layers), linears(theirs.model.layers), strict=True)
    share = min(float(((a.weight == 0) == (b.weight == 0)).double().mean()) for a, b in pairs)
    print(f"{share:.4%} of the mask cells of the worst linear agree")
    if share < 0.999:
        sys.exit("the baseline does not prune as gblm does")


def llmcompressor(method: str, pipeline: str, model: str, windows: str) -> None:
    """Prune with llmcompressor, which runs in a virtual environment of its own."""
    import numpy
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers import pruning

    modifier = pruning.WandaPruningModifier if method == "wanda" else pruning.SparseGPTModifier
    ids = numpy.load(windows)["input_ids"]
    oneshot(
        model=load(model),
        dataset=Dataset.from_dict({"input_ids": list(ids)}),
        recipe=modifier(sparsity=SPARSITY, targets=["Linear"], ignore=["re:.*lm_head"]),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        pipeline=pipeline,
        batch_size=BATCH,
        shuffle_calibration_samples=False,
    )


def decode(model: str, checkpoint: str, calibration: str, samples: str, path: str) -> None:
    """Choose the calibration images as `gblm.vit` does and save them, decoded, for all."""
    import numpy

    from gblm.vit import data, models

    images = data.open_images(calibration, models.load(model, checkpoint or None), "calibration")
    batch = data.calibration(images, int(samples))
    numpy.savez(path, **{name: value.numpy() for name, value in batch.items()})


def opened(model: str, checkpoint: str, path: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a classifier and the decoded images."""
    import numpy
    import torch

    from gblm.vit import models

    with numpy.load(path) as file:
        batch = {name: torch.from_numpy(file[name]) for name in file.files}
    return models.load(model, checkpoint or None), batch


def forward(model: nn.Module, batch: dict[str, Tensor], step: int) -> None:
    """Run the model over the images."""
    import torch

    with torch.no_grad():
        for part in batch["images"].split(step):
            model(part)


def forward_backward(model: nn.Module, batch: dict[str, Tensor], step: int) -> None:
    """Run the model over the images, and differentiate their mean loss by all parameters."""
    from torch.nn.functional import cross_entropy

    parts = zip(batch["images"].split(step), batch["labels"].split(step), strict=True)
    for part, labels in parts:
        cross_entropy(model(part), labels).backward()


PLAIN = {"forward": forward, "forward-backward": forward_backward}


def say(found: dict[str, Any]) -> None:
    """Tell the process that measures what this one has found."""
    print(f"{SAYS}{json.dumps(found)}", flush=True)


def heard(log: str) -> dict[str, Any]:
    """Return what a process said, nothing where it did not."""
    lines = [line for line in log.splitlines() if line.startswith(SAYS)]
    return json.loads(lines[-1].removeprefix(SAYS)) if lines else {}


def timed(work: Callable[..., object], *args: Any) -> dict[str, float]:
    """Return the wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(*args)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def choose(model: str, checkpoint: str, path: str) -> None:
    """Say the micro-batch in which each plain pass is quickest."""
    loaded, batch = opened(model, checkpoint, path)
    few = {name: value[:CHOOSING] for name, value in batch.items()}
    found = {}
    for name, run in PLAIN.items():
        run(loaded, few, MICRO_BATCHES[-1])
        seconds = {
            step: min(timed(run, loaded, few, step)["seconds"] for _ in range(2))
            for step in MICRO_BATCHES
        }
        found[name] = min(seconds, key=seconds.__getitem__)
    say(found)


def images(contestant: str, step: str, model: str, checkpoint: str, path: str) -> None:
    """Say the seconds of a plain pass, of pruning by a method, or of nothing at all."""
    loaded, batch = opened(model, checkpoint, path)
    forward(loaded, {name: value[: int(step)] for name, value in batch.items()}, int(step))
    if contestant == "start-up":
        found = timed(lambda: None)
    elif contestant in PLAIN:
        found = timed(PLAIN[contestant], loaded, batch, int(step))
    else:
        import gblm
        from gblm.methods import make

        found = timed(gblm.prune, loaded, batch, make(contestant, alpha="auto"), str(SPARSITY))
    say(found)


ENTRIES = {
    entry.__name__: entry
    for entry in (draw, load, plain_gblm, check, llmcompressor, decode, choose, images)
}


if __name__ == "__main__":
    ENTRIES[sys.argv[1]](*sys.argv[2:])
