"""Measure on a GPU: the kernels against the device's ceiling, and a model of LLaMA-2-7B's shape.

    python eval/gpu.py --part kernels --write docs/benchmarks.md
    python eval/gpu.py --part 7b --write docs/benchmarks.md
    python eval/gpu.py --part offload --write docs/benchmarks.md
    python eval/gpu.py --part zeros --write docs/what-zeros-buy.md

Each part runs alone and takes minutes; none reads a model or a data set. `--device cpu --tiny` goes
through all of it with toy sizes, the kernels by Triton's interpreter, whose times mean nothing. So
does the second device of the tests.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tables
import torch
from torch import Tensor, nn

import gblm
from gblm import methods
from gblm.gains import said
from gblm.machine.device import peak_memory, reset_peak
from gblm.machine.offload import offloaded
from gblm.walk.gradients import sweep
from gblm.walk.journal import GradientFolder
from gblm.walk.prune import Pruning, method_pattern
from gblm.walk.survey import find_adapter
from gblm.walk.walk import Walk

GBLM_FLOPS = 12  # per weight and token: 8 of the gradient pass, 4 of the pruning pass


@dataclass
class Sizes:
    """The sizes of the model and of the calibration batch."""

    width: int = 4096
    inner: int = 11008
    blocks: int = 32
    vocabulary: int = 32000
    heads: int = 32
    samples: int = 128
    length: int = 2048
    some: int = 4  # samples for the kernels


TINY = Sizes(16, 32, 2, 64, 2, 4, 16, 2)


def seconds(work: Callable[[], Any], device: torch.device, rounds: int = 10) -> float:
    """Return the median seconds of some work: of rounds on a GPU, after three, else of one."""
    cuda = device.type == "cuda"
    for _ in range(3 if cuda else 0):
        work()
    found = []
    for _ in range(rounds if cuda else 1):
        sync(device)
        start = time.perf_counter()
        work()
        sync(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def sync(device: torch.device) -> None:
    """Wait until a device has done its work."""
    torch.get_device_module(device).synchronize()


def clear(device: torch.device) -> None:
    """Free what is held for nothing, and let the peak of memory begin anew."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    reset_peak(device)


@dataclass
class Race:
    """A kernel, its reference, and the same work by plain calls that set the ceiling.

    amount: floating-point operations (unit TFLOP/s) or bytes (TB/s) of the kernel; `ceiling` takes
    as many as `full`.
    """

    name: str
    kernel: Callable[[], Any]
    reference: Callable[[], Any]
    ceiling: Callable[[], Any]
    amount: float
    full: float
    unit: str


Draw = Callable[..., Tensor]  # random tensors by their shape


def races(sizes: Sizes, device: torch.device) -> list[Race]:
    """Return the kernels with what they compete against, on the shapes of a block."""
    torch.manual_seed(0)
    draw = partial(torch.randn, device=device)
    found = gram_races(sizes, draw)
    for outputs in (sizes.width, sizes.inner):
        found += gradient_races(sizes, outputs, draw) + mask_races(sizes.width, outputs, draw)
    return found


def gram_races(sizes: Sizes, draw: Draw) -> list[Race]:
    """Return the sums of products of inputs, of which the kernel computes half."""
    from gblm.kernels import input_gram

    width = sizes.width
    x = draw(sizes.some * sizes.length, width).bfloat16()
    work = (x.new_zeros(width, width, dtype=torch.float32), x)
    return [
        Race(
            f"input_gram [{width}, {width}], {len(x)} positions",
            lambda: input_gram.input_gram(*work),
            lambda: input_gram.reference(*work),
            lambda: x.T @ x,
            1.0 * len(x) * width * (width + 1),
            2.0 * len(x) * width * width,
            "TFLOP/s",
        )
    ]


def gradient_races(sizes: Sizes, outputs: int, draw: Draw) -> list[Race]:
    """Return the sums of gradients of samples, by the kernel and by plain calls."""
    from gblm.kernels import gradient_sums

    x, dy = (draw(sizes.some, sizes.length, size).bfloat16() for size in (sizes.width, outputs))
    total = x.new_zeros(outputs, sizes.width, dtype=torch.float32)
    flops = 2.0 * x.numel() * outputs
    work = (x, dy, total, None)

    def product() -> Tensor:
        return dy.flatten(0, 1).T @ x.flatten(0, 1)

    def batched() -> Tensor:
        return total.add_(torch.bmm(dy.mT, x).float().abs().sum(dim=0))

    return [
        Race(
            f"gradient_sums [{outputs}, {sizes.width}], {sizes.some}×{sizes.length}",
            lambda: gradient_sums.gradient_sums(*work),
            lambda: gradient_sums.reference(*work),
            product,
            flops,
            flops,
            "TFLOP/s",
        ),
        Race("bmm and accumulate", batched, batched, product, flops, flops, "TFLOP/s"),
    ]


def mask_races(inputs: int, outputs: int, draw: Draw) -> list[Race]:
    """Return the choices of masks, whose ceiling is to copy the weight."""
    from gblm.kernels import nm_keep, row_keep, score_mask

    weight, score = draw(outputs, inputs), draw(outputs, inputs).abs()
    fused = (weight, draw(inputs).abs(), score, 100.0, 2, 4)
    half = (score, inputs // 2)
    other = torch.empty_like(weight)

    def race(name: str, kernel: Callable, reference: Callable, bytes_: float) -> Race:
        return Race(
            f"{name} [{outputs}, {inputs}]",
            kernel,
            reference,
            lambda: other.copy_(weight),
            bytes_ * weight.numel(),
            2.0 * weight.nbytes,
            "TB/s",
        )

    return [
        race(  # W and G read, W and the mask written
            "score_mask 2:4",
            lambda: score_mask.score_mask(*fused),
            lambda: score_mask.reference(*fused),
            13.0,
        ),
        race(
            "nm_keep 2:4",
            lambda: nm_keep.nm_keep(score, 2, 4),
            lambda: nm_keep.reference(score, 2, 4),
            5.0,
        ),
        race(
            "row_keep 50 %",
            lambda: row_keep.row_keep(*half),
            lambda: row_keep.reference(*half),
            5.0,
        ),
    ]


def kernels_part(sizes: Sizes, device: torch.device) -> str:
    """Return the table of the kernels."""
    head = "kernel", "ms", "rate", "ceiling", "share", "reference, ms", "compiled reference, ms"
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', *['--:'] * 6])} |"]
    for race in races(sizes, device):
        own, theirs = seconds(race.kernel, device), seconds(race.reference, device)
        top = race.full / seconds(race.ceiling, device) / 1e12
        rate = race.amount / own / 1e12
        try:
            compiled = f"{1e3 * seconds(torch.compile(race.reference), device):.3f}"
        except Exception as error:  # of a compiler that is missing, or of the code it made
            compiled = type(error).__name__
        cells = [race.name, f"{1e3 * own:.3f}", f"{rate:.3g} {race.unit}", f"{top:.3g}"]
        cells += [f"{100 * rate / top:.0f} %", f"{1e3 * theirs:.3f}", compiled]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return (
        "Medians of ten rounds. The ceiling is what cuBLAS reaches in bfloat16 on the same\n"
        "matrices, or copying the weight; `input_gram` counts the half of the operations that a\n"
        "symmetric product has.\n\n" + "\n".join(lines) + "\n"
    )


def made(sizes: Sizes, device: torch.device, place: torch.device) -> nn.Module:
    """Return a LLaMA with random weights in bfloat16, drawn on the device and put in place."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=max(sizes.length, 32),
    )
    auto: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model: nn.Module = auto.from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        for name, own in list(module.named_parameters(recurse=False)):
            drawn = torch.empty(own.shape, dtype=torch.bfloat16, device=device)
            module.register_parameter(name, nn.Parameter(drawn.to(place), requires_grad=False))
    draw_weights(model, device)
    return model.to(place).eval()


def draw_weights(model: nn.Module, device: torch.device) -> None:
    """Give a model new random weights, norms of 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for own in model.parameters():
            if own.ndim == 1:
                own.fill_(1)
            else:
                drawn = torch.empty(own.shape, dtype=own.dtype, device=device)
                own.copy_(drawn.normal_(std=own.shape[-1] ** -0.5))


def samples(sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Return random windows."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(sizes.vocabulary, (sizes.samples, sizes.length), generator=draw)
    return {"input_ids": ids.to(device)}


def floor(model: nn.Module, sizes: Sizes, device: torch.device) -> tuple[float, float]:
    """Return the seconds of gblm's operations at the measured matrix rate, and that rate."""
    x = torch.randn(sizes.some * sizes.length, sizes.width, device=device, dtype=torch.bfloat16)
    w = torch.randn(sizes.width, sizes.width, device=device, dtype=torch.bfloat16)
    rate = 2 * x.numel() * len(w) / seconds(lambda: x @ w, device)
    weights = sizes.blocks * (4 * sizes.width**2 + 3 * sizes.width * sizes.inner)
    return GBLM_FLOPS * weights * sizes.samples * sizes.length / rate, rate


def model_part(sizes: Sizes, device: torch.device, pattern: str, names: list[str]) -> str:
    """Return the seconds and the peak memory of pruning by some methods."""
    model = made(sizes, device, device)
    batch = samples(sizes, device)
    least, rate = floor(model, sizes, device)
    lines = [
        "| method | s | gradients, s | prune, s | peak GB |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name in names:
        draw_weights(model, device)  # of a pruned one the equal zeros would cost more
        clear(device)
        sync(device)
        start = time.perf_counter()
        report = gblm.prune(model, batch, methods.make(name), pattern)
        sync(device)
        whole = time.perf_counter() - start
        parts = [f"{report.seconds.get(key, 0.0):.1f}" for key in ("gradients", "prune")]
        cells = [name, f"{whole:.1f}", *parts, f"{peak_memory(device) / 1e9:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    text = f"{shape(model, sizes)}, to {pattern}:\n\n" + "\n".join(lines)
    return (
        f"{text}\n\nAt the measured rate of {rate / 1e12:.3g} TFLOP/s the operations of gblm, "
        f"{GBLM_FLOPS} for each weight and token,\ntake {least:.1f} s.\n"
    )


def shape(model: nn.Module, sizes: Sizes) -> str:
    """Return the size of the model and of the batch, in words."""
    count = sum(own.numel() for own in model.parameters())
    return (
        f"A LLaMA of {count / 1e9:.3g} billion random weights in bfloat16 ({sizes.blocks} blocks, "
        f"{sizes.width} wide,\n{sizes.inner} inside), {sizes.samples} windows of {sizes.length}"
    )


def offload_part(sizes: Sizes, device: torch.device, pattern: str) -> str:
    """Return the peak memory of the device with weights in main memory, gradients in a folder."""
    model = made(sizes, device, torch.device("cpu"))
    clear(device)
    adapter = find_adapter(model)
    offload = offloaded("cpu", model, adapter.blocks(model), Path(), device)
    assert offload
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        walk = Walk.of(model, samples(sizes, device), adapter, folder=work)
        store = GradientFolder(work / "gradients", {"needs": ["grad_abs"]}, torch.bfloat16)
        sweep(walk, {"grad_abs"}, store=store)
        sync(device)
        first = time.perf_counter() - start
        method = methods.make("gblm")
        Pruning(walk, method, method_pattern(method, pattern), store.finish()).run()
        sync(device)
    whole = time.perf_counter() - start
    offload.close()
    return (
        f"{shape(model, sizes)}, by gblm to {pattern}, with the\nweights in main memory and the "
        "inputs of blocks and the sums of gradients (in bfloat16) on disk:\n"
        f"a peak of {peak_memory(device) / 1e9:.1f} GB on the device, in {whole:.1f} s, "
        f"{first:.1f} of them gradients.\n"
    )


def zeros_part(sizes: Sizes, device: torch.device) -> str:
    """Return what 2:4 buys: every linear by trial, and a forward pass before and after."""
    model = made(replace(sizes, blocks=min(sizes.blocks, 4)), device, device)
    keep = gblm.parse("2:4").keep
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features != sizes.vocabulary:
            module.weight.data[~keep(module.weight.abs().float())] = 0
    ids = samples(sizes, device)["input_ids"][:1, :512]
    with torch.no_grad():
        dense = seconds(lambda: model(ids), device)
        tried = "\n".join(f"    {line}" for line in said(gblm.gains(model)))
        swapped = gblm.accelerate(model, positions=ids.shape[1])
        ratio = seconds(lambda: model(ids), device) / dense
    return (
        f"{shape(model, sizes)}, of which one, cut to {ids.shape[1]}, is forwarded; 2:4:\n\n"
        f"{tried}\n\n{swapped}.\nA forward pass then takes {ratio:.2f} of the dense time.\n"
    )


def machine(device: torch.device) -> str:
    """Return the device and the versions of what runs on it."""
    import transformers
    import triton

    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{device}, toy sizes"
    return (
        f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}, triton "
        f"{triton.__version__}, transformers {transformers.__version__}"
    )


def main() -> None:
    """Read the flags, measure a part or all, print the text and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--part",
        choices=["kernels", "7b", "offload", "zeros", "all"],
        default="all",
        help="[%(default)s]",
    )
    add("--device", default="cuda", help="[%(default)s]")
    add("--tiny", action="store_true", help="toy sizes, to try the script")
    add("--pattern", default="0.5", help="of the model's parts [%(default)s]")
    add("--methods", default="gblm,wanda,sparsegpt", help="of 7b [%(default)s]")
    add("--write", type=Path, help="Markdown file for the tables")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU here; --device cpu --tiny tries the script")
    sizes = TINY if args.tiny else Sizes()
    parts = {
        "kernels": lambda: kernels_part(sizes, device),
        "7b": lambda: model_part(sizes, device, args.pattern, args.methods.split(",")),
        "offload": lambda: offload_part(sizes, device, args.pattern),
        "zeros": lambda: zeros_part(sizes, device),
    }
    titles = {"kernels": "the kernels", "7b": "LLaMA-2-7B's shape", "offload": "offloaded weights"}
    titles["zeros"] = "what 2:4 buys"
    for name in parts if args.part == "all" else [args.part]:
        text = f"{parts[name]()}\n{machine(device)}\n"
        tables.publish(text, args.write, f"gpu-{name}", f"## GPU: {titles[name]}")


if __name__ == "__main__":
    main()
