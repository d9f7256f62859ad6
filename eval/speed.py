"""Measure the time and memory of gblm: on language against others, on vision against plain passes.

    python eval/speed.py --model $GBLM_ASSETS/llama/novels-6M \\
        --calibration $GBLM_ASSETS/text/novels-calib.txt \\
        --llmcompressor-python ~/llmcompressor/bin/python --write docs/benchmarks.md
    python eval/speed.py vit --model vit_tiny_patch16_224 \\
        --checkpoint $GBLM_ASSETS/vit_tiny_patch16_224.safetensors \\
        --calibration $GBLM_ASSETS/imagenet-mini/train --write docs/benchmarks.md

Every contestant is a process of its own on the CPU, with the same model, the same calibration
samples, the same number of threads, to 50 %, saving nothing. They take turns, so that a machine
that slows down slows them all; a ratio is the median of those of the single rounds. Peak memory is
that of the whole process.

Language: the seconds are those of the whole process, from start to exit. `--check` compares the
masks of the baseline with those of gblm and measures nothing.

llmcompressor needs older versions of torch and transformers, hence an environment of its own:

    python -m venv ~/llmcompressor && ~/llmcompressor/bin/pip install llmcompressor==0.14.0.1

Its `sequential` pipeline, which it chooses by itself, prunes block by block as gblm does; its
`basic` one runs the model once and carries no pruning error on, which is less work.

Vision: the images are decoded once, into a file of ready floats. A process loads that and the
model, runs one micro-batch to warm up, and takes the time of what comes then: one plain pass over
all images, in the micro-batch that is quickest for that pass, or the whole of `gblm.prune`.
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import tables

if TYPE_CHECKING:  # the process that measures stays small: see `measure`
    from torch import Tensor, nn

SPARSITY, ALPHA = 0.5, 100.0
SAYS = "measured: "  # before what a process measures by itself
BATCH = 8  # of llmcompressor: the quickest
MICRO_BATCHES = (2, 4, 8, 16, 32)  # that a plain pass chooses from
CHOOSING = 32  # the images it does that by
METHODS = "magnitude,gradient,wanda,gblm,sparsegpt"
PACKAGES = {
    "llm": ("gblm", "llmcompressor", "torch", "transformers"),
    "vit": ("gblm", "torch", "timm"),
}


@dataclass(frozen=True)
class Ratio:
    """The time of one contestant against that of others, each times a factor."""

    ours: str
    theirs: dict[str, float]
    wanted: float | None = None  # the most that is wanted

    def __str__(self) -> str:
        terms = [f"{factor:g} {name}" for name, factor in self.theirs.items()]
        single = [name for name, factor in self.theirs.items() if factor == 1]
        return f"{self.ours} / {' + '.join(single if len(terms) == 1 and single else terms)}"

    def of(self, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
        """Return the ratios of every round; those of memory are to the largest of the others."""
        found = defaultdict(list)
        others = zip(*(runs[name] for name in self.theirs), strict=True)
        for one, round_ in zip(runs[self.ours], others, strict=True):
            for key in ("seconds", "cpu_seconds"):
                terms = zip(self.theirs.values(), round_, strict=True)
                found[key].append(one[key] / sum(factor * other[key] for factor, other in terms))
            found["peak_mb"].append(one["peak_mb"] / max(other["peak_mb"] for other in round_))
        return {"wanted": self.wanted, **found}


RATIOS = {
    "llm": (
        Ratio("gblm", {"plain gblm": 1}, 0.5),
        Ratio("gblm wanda", {"llmcompressor wanda": 1}, 0.5),
        Ratio("gblm sparsegpt", {"llmcompressor sparsegpt": 1}, 0.7),
        Ratio("gblm wanda", {"llmcompressor wanda, basic": 1}),
        Ratio("gblm sparsegpt", {"llmcompressor sparsegpt, basic": 1}),
    ),
    "vit": (
        Ratio("wanda", {"forward": 1}, 2.5),
        Ratio("gblm", {"forward": 2.5, "forward-backward": 1.6}, 1),
        Ratio("sparsegpt", {"forward": 1}),
    ),
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

# 2. The measurement.


Contestants = tuple[str, dict[str, list[str]]]  # on what, in words; their commands by name


def language(args: argparse.Namespace, windows: str) -> Contestants:
    """Draw the windows into a file, and return the contestants."""
    drawing = ["draw", args.model, args.calibration, str(args.samples), str(args.length), windows]
    measure([sys.executable, __file__, *drawing], args.threads)
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
        for ratio in RATIOS["llm"][1:]:
            (name,) = ratio.theirs  # "llmcompressor METHOD" or "llmcompressor METHOD, basic"
            if "basic" in name and not args.basic:
                continue
            words = name.replace(",", "").split()
            found[name] = [*theirs, *(*words, "sequential")[:3], args.model, windows]
    return f"{args.samples} windows of {args.length} tokens", found


def vision(args: argparse.Namespace, decoded: str) -> Contestants:
    """Decode the images into a file, choose the micro-batches, and return the contestants."""
    model = [args.model, args.checkpoint or ""]
    decoding = ["decode", *model, args.calibration, str(args.samples), decoded]
    measure([sys.executable, __file__, *decoding], args.threads)
    chosen = measure([sys.executable, __file__, "choose", *model, decoded], args.threads)
    steps = {name: str(chosen[name]) for name in PLAIN}
    sizes = " and ".join(f"{step} ({name})" for name, step in steps.items())
    commands = {}
    for name in ("start-up", *PLAIN, *args.methods.split(",")):
        entry = ["images", name, steps.get(name, steps["forward"]), *model, decoded]
        commands[name] = [sys.executable, __file__, *entry]
    return f"{args.samples} images, the plain passes in micro-batches of {sizes}", commands


CONTESTANTS = {"llm": language, "vit": vision}


def environment(threads: int) -> dict[str, str]:
    """Return the environment of every process."""
    own = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    own |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **own, "LLM_COMPRESSOR_LOG_LEVEL": "ERROR"}


def measure(command: list[str], threads: int) -> dict[str, Any]:
    """Run one process and return its wall and CPU seconds and its peak memory in MB (Linux).

    What the process says by itself is added, its seconds in the place of those.
    """
    # Linux counts what the parent held at the fork as the child's: import nothing large here.
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment(threads), stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode:
            sys.exit(f"{log.read()[-3000:]}\n{shlex.join(command)} failed: {process.returncode}")
        found = heard(log.read())
    cpu = usage.ru_utime + usage.ru_stime
    whole = {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": usage.ru_maxrss * 1024 / 1e6}
    return {**whole, **found}


def machine(side: str, other: str | None) -> str:
    """Return the name of the CPU (Linux), the cores, and the packages of both environments."""
    fields = re.findall(
        r"(model name|cpu family|model)\t+: (.*)", Path("/proc/cpuinfo").read_text()
    )
    text = f"{', '.join(map(' '.join, dict(fields).items()))}; {os.cpu_count()} cores"
    code = f"""import importlib.metadata as m
for name in {PACKAGES[side]}:
    for found in m.distributions(name=name): print("", name, found.version, end="")"""
    for python in filter(None, (sys.executable, other)):
        text += ";" + subprocess.check_output([python, "-I", "-c", code], text=True)
    return text


TEXTS = {  # above the tables, and below
    "llm": (
        "A run is a whole process, from start to exit; medians of the rounds, after one to warm "
        "up.\nOf peak memory less than 1 is wanted.",
        """\
`plain gblm` is what the published code does: autograd on one sample after the other, then Wanda
layer by layer. The rows of llmcompressor are of its `sequential` pipeline, which like gblm lets
every block see that those before it are pruned.""",
    ),
    "vit": (
        """\
Medians of the rounds. The images are decoded beforehand, and start-up is not in the seconds: a
process loads model and images, runs one micro-batch, and takes the time of what comes then.""",
        """\
`forward` and `forward-backward` are one plain pass over the same images, the latter with the mean
loss differentiated by all parameters; a method's row is the whole of `gblm.prune`. The peak is that
of the process, `start-up` that of one which does no more than load.""",
    ),
}


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
{TEXTS[result["side"]][0]}

| contestant | median s | min–max s | peak MB |
|---|--:|--:|--:|
{runs}
| ratio | time | min–max | wanted | peak memory |
|---|--:|--:|--:|--:|
{ratios}
{TEXTS[result["side"]][1]}

{result["machine"]}

    {result["command"]}
"""


def counted(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number} {what}{'s' if number > 1 else ''}"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the script."""
    new = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = new.add_argument
    add("side", nargs="?", default="llm", choices=CONTESTANTS, help="[%(default)s]")
    add("--model", required=True, help="folder of a LLaMA, or a model of timm")
    add("--checkpoint", help="the weights of a model of timm")
    add("--calibration", required=True, help="any source of the side")
    add("--samples", type=int, help="calibration samples [128 windows, 512 images]")
    add("--length", type=int, default=256, help="tokens in a window [%(default)s]")
    add("--methods", default=METHODS, help="on vision, with commas [%(default)s]")
    add(
        "--runs", type=int, default=5, help="rounds; on language after one to warm up [%(default)s]"
    )
    add("--threads", type=int, default=2, help="of every process [%(default)s]")
    add("--llmcompressor-python", help="python of its environment; without it, it is left out")
    add("--write", type=Path, help="Markdown file to write into; the JSON goes beside it")
    add("--basic", action="store_true", help="the `basic` pipeline of llmcompressor as well")
    add("--check", action="store_true", help="only compare the masks of baseline and gblm")
    return new


def main() -> None:
    """Draw the samples, let the contestants take turns, show and write the tables."""
    flags = parser()
    args = flags.parse_args()
    if args.check and args.side != "llm":
        flags.error("--check compares masks on language alone")
    args.samples = args.samples or {"llm": 128, "vit": 512}[args.side]
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        samples = f"{folder}/samples.npz"
        setting, commands = CONTESTANTS[args.side](args, samples)
        if args.check:
            command = [sys.executable, __file__, "check", args.model, samples]
            sys.exit(subprocess.run(command, env=environment(args.threads)).returncode)
        runs: dict[str, list[dict[str, float]]] = defaultdict(list)
        warm = 1 if args.side == "llm" else 0  # on vision a process warms up by itself
        for turn in range(args.runs + warm):
            for name, command in commands.items():
                runs[name].append(measure(command, args.threads))
                print(
                    f"round {turn}  {name:36} {runs[name][-1]['seconds']:6.2f} s", file=sys.stderr
                )
        runs = {name: measured[warm:] for name, measured in runs.items()}

    name = Path(args.model).name
    threads, rounds = counted(args.threads, "thread"), counted(args.runs, "round")
    result = {
        "side": args.side,
        "setting": f"{name}, {setting}, to {SPARSITY:.0%}, {threads}, {rounds}",
        "machine": f"{machine(args.side, args.llmcompressor_python)}; load before {busy:.1f}",
        "command": tables.portable(shlex.join(["python", *sys.argv])),
        "ratios": {
            str(ratio): ratio.of(runs)
            for ratio in RATIOS[args.side]
            if {ratio.ours, *ratio.theirs} <= runs.keys()
        },
        "runs": runs,
    }
    print(markdown(result))
    if args.write:
        section = "speed" if args.side == "llm" else f"speed:{args.side}"
        heading = "## Speed and memory" + ("" if args.side == "llm" else f": {name}")
        tables.write(args.write, section, heading, markdown(result))
        file = args.write.with_name(f"{section.replace(':', '-')}.json")
        tables.replace(file, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ENTRIES:
        ENTRIES[sys.argv[1]](*sys.argv[2:])
    else:
        main()
