"""Measure the time and memory of gblm against a plain baseline and against llmcompressor.

    python eval/speed.py --model $GBLM_ASSETS/llama/novels-6M \\
        --calibration $GBLM_ASSETS/text/novels-calib.txt \\
        --llmcompressor-python ~/llmcompressor/bin/python --write docs/benchmarks.md

Every contestant is a process of its own, from start to exit, on the CPU, with the same model, the
same calibration windows, the same number of threads, to 50 %, saving nothing. They take turns, so
that a machine that slows down slows them all; a ratio is the median of those of the single rounds.
`--check` compares the masks of the baseline with those of gblm and measures nothing.

llmcompressor needs older versions of torch and transformers, hence an environment of its own:

    python -m venv ~/llmcompressor && ~/llmcompressor/bin/pip install llmcompressor==0.14.0.1

Its `sequential` pipeline, which it chooses by itself, prunes block by block as gblm does; its
`basic` one runs the model once and carries no pruning error on, which is less work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the process that measures stays small: see `measure`
    from torch import Tensor, nn

SPARSITY, ALPHA = 0.5, 100.0
BATCH = 8  # of llmcompressor: the quickest
RATIOS = {  # of ours to theirs, with the most that is wanted of the time
    ("gblm", "plain gblm"): 0.5,
    ("gblm wanda", "llmcompressor wanda"): 0.5,
    ("gblm sparsegpt", "llmcompressor sparsegpt"): 0.7,
    ("gblm wanda", "llmcompressor wanda, basic"): None,
    ("gblm sparsegpt", "llmcompressor sparsegpt, basic"): None,
}

# 1. What runs in processes of its own: `python eval/speed.py ENTRY ARGUMENTS`.


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


ENTRIES = {entry.__name__: entry for entry in (draw, load, plain_gblm, check, llmcompressor)}

# 2. The measurement.


def contestants(args: argparse.Namespace, windows: str) -> dict[str, list[str]]:
    """Return the command of every contestant, by its name."""
    flags = ["--model", args.model, "--sparsity", str(SPARSITY), "--calibration", windows]
    flags += ["--samples", str(args.samples), "--length", str(args.length)]
    ours = [sys.executable, "-m", "gblm.llm", *flags, "--method"]
    found = {
        "start-up": [sys.executable, __file__, "load", args.model],
        "plain gblm": [sys.executable, __file__, "plain_gblm", args.model, windows],
        "gblm": [*ours, "gblm"],
        "gblm wanda": [*ours, "wanda"],
        "gblm sparsegpt": [*ours, "sparsegpt"],
    }
    if args.llmcompressor_python:
        theirs = [args.llmcompressor_python, __file__]
        found["start-up, llmcompressor's packages"] = [*theirs, "load", args.model]
        for _, name in list(RATIOS)[1:]:  # "llmcompressor METHOD" or "llmcompressor METHOD, basic"
            if "basic" in name and not args.basic:
                continue
            words = name.replace(",", "").split()
            found[name] = [*theirs, *(*words, "sequential")[:3], args.model, windows]
    return found


def measure(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run one process and return its wall and CPU seconds and its peak memory in MB (Linux)."""
    # Linux counts what the parent held at the fork as the child's: import nothing large here.
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode:
            sys.exit(f"{log.read()[-3000:]}\n{shlex.join(command)} failed: {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


def machine(other: str | None) -> str:
    """Return the name of the CPU (Linux), the cores, and the packages of both environments."""
    fields = re.findall(
        r"(model name|cpu family|model)\t+: (.*)", Path("/proc/cpuinfo").read_text()
    )
    text = f"{', '.join(map(' '.join, dict(fields).items()))}; {os.cpu_count()} cores"
    code = """import importlib.metadata as m
for name in ("gblm", "llmcompressor", "torch", "transformers"):
    for found in m.distributions(name=name): print("", name, found.version, end="")"""
    for python in filter(None, (sys.executable, other)):
        text += ";" + subprocess.check_output([python, "-I", "-c", code], text=True)
    return text


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of contestants and of ratios, with what they were measured on."""
    runs, ratios = "", ""
    for name, found in result["runs"].items():
        seconds, peak = [[run[key] for run in found] for key in ("seconds", "peak_mb")]
        runs += f"| {name} | {median(seconds):.2f} | {min(seconds):.2f}–{max(seconds):.2f} "
        runs += f"| {median(peak):.0f} |\n"
    for name, found in result["ratios"].items():
        seconds, wanted = found["seconds"], f"≤ {found['wanted']}" if found["wanted"] else ""
        ratios += f"| {name} | {median(seconds):.2f} | {min(seconds):.2f}–{max(seconds):.2f} "
        ratios += f"| {wanted} | {median(found['peak_mb']):.2f} |\n"
    return f"""{result["setting"]}.
A run is a whole process, from start to exit; medians of the rounds, after one to warm up.

| contestant | median s | min–max s | peak MB |
|---|--:|--:|--:|
{runs}
| ratio | time | min–max | wanted | peak memory, wanted < 1 |
|---|--:|--:|--:|--:|
{ratios}
`plain gblm` is what the published code does: autograd on one sample after the other, then Wanda
layer by layer. The rows of llmcompressor are of its `sequential` pipeline, which like gblm lets
every block see that those before it are pruned.

{result["machine"]}

    {result["command"]}
"""


def write(path: Path, text: str) -> None:
    """Put the text between the markers of a Markdown file, at its end where it has none."""
    start, end = "<!-- speed -->", "<!-- /speed -->"
    page = path.read_text() if path.exists() else "# Benchmarks\n"
    if start not in page:
        page += f"\n## Speed and memory\n\n{start}\n{end}\n"
    path.write_text(page.split(start)[0] + f"{start}\n{text}{end}" + page.split(end)[1])


def portable(text: str) -> str:
    """Return a command line without the folders of this machine."""
    for folder, name in ((os.environ.get("GBLM_ASSETS"), "$GBLM_ASSETS"), (str(Path.home()), "~")):
        text = text.replace(folder, name) if folder else text
    return text


def main() -> None:
    """Draw the windows, let the contestants take turns, show and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="folder of a LLaMA")
    add("--calibration", required=True, help="any source of gblm.llm")
    add("--samples", type=int, default=128, help="calibration windows [%(default)s]")
    add("--length", type=int, default=256, help="tokens in a window [%(default)s]")
    add("--runs", type=int, default=5, help="rounds, after one to warm up [%(default)s]")
    add("--threads", type=int, default=2, help="of every process [%(default)s]")
    add("--llmcompressor-python", help="python of its environment; without it, it is left out")
    add("--write", type=Path, help="Markdown file to write into; speed.json goes beside it")
    add("--basic", action="store_true", help="the `basic` pipeline of llmcompressor as well")
    add("--check", action="store_true", help="only compare the masks of baseline and gblm")
    args = parser.parse_args()

    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    environment |= {"TQDM_DISABLE": "1", "LLM_COMPRESSOR_LOG_LEVEL": "ERROR"}
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        windows, sizes = f"{folder}/windows.npz", [str(args.samples), str(args.length)]
        drawing = ["draw", args.model, args.calibration, *sizes, windows]
        measure([sys.executable, __file__, *drawing], environment)
        if args.check:
            command = [sys.executable, __file__, "check", args.model, windows]
            sys.exit(subprocess.run(command, env=environment).returncode)
        runs: dict[str, list[dict[str, float]]] = defaultdict(list)
        for turn in range(args.runs + 1):
            for name, command in contestants(args, windows).items():
                runs[name].append(measure(command, environment))
                print(
                    f"round {turn}  {name:36} {runs[name][-1]['seconds']:6.2f} s", file=sys.stderr
                )
        runs = {name: measured[1:] for name, measured in runs.items()}  # the first warms up

    ratios: dict[str, dict[str, Any]] = {}
    for (ours, theirs), wanted in RATIOS.items():
        if theirs in runs:
            ratios[f"{ours} / {theirs}"] = {"wanted": wanted}
            for key in runs[ours][0]:
                pairs = zip(runs[ours], runs[theirs], strict=True)
                ratios[f"{ours} / {theirs}"][key] = [one[key] / other[key] for one, other in pairs]
    result = {
        "setting": f"{Path(args.model).name}, {args.samples} windows of {args.length} tokens, "
        f"to {SPARSITY:.0%}, {args.threads} threads, {args.runs} rounds",
        "machine": f"{machine(args.llmcompressor_python)}; load before {busy:.1f}",
        "command": portable(shlex.join(["python", *sys.argv])),
        "ratios": ratios,
        "runs": runs,
    }
    print(markdown(result))
    if args.write:
        write(args.write, markdown(result))
        args.write.with_name("speed.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ENTRIES:
        ENTRIES[sys.argv[1]](*sys.argv[2:])
    else:
        main()
