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
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import contestants
import tables
from contestants import PLAIN, SPARSITY

ENTRIES = contestants.__file__
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
        Ratio("gblm", {"plain gblm": 1}, 0.6),
        Ratio("gblm wanda", {"llmcompressor wanda": 1}, 0.5),
        Ratio("gblm sparsegpt", {"llmcompressor sparsegpt": 1}, 0.4),
        Ratio("gblm wanda", {"llmcompressor wanda, basic": 1}),
        Ratio("gblm sparsegpt", {"llmcompressor sparsegpt, basic": 1}),
        Ratio("gblm, gradients of half", {"plain gblm": 1}, 0.6),
        Ratio("gblm, gradients of a quarter", {"plain gblm": 1}, 0.6),
        Ratio("gblm best", {"gblm sparsegpt": 1}, 3),
    ),
    "vit": (
        Ratio("wanda", {"forward": 1}, 2.5),
        Ratio("gblm", {"forward": 2.5, "forward-backward": 1.6}, 1),
        Ratio("sparsegpt", {"forward": 1}),
    ),
}

# 1. The measurement.


Contestants = tuple[str, dict[str, list[str]]]  # on what, in words; their commands by name


def language(args: argparse.Namespace, windows: str) -> Contestants:
    """Draw the windows into a file, and return the contestants."""
    drawing = ["draw", args.model, args.calibration, str(args.samples), str(args.length), windows]
    measure([sys.executable, ENTRIES, *drawing], args.threads)
    flags = ["--model", args.model, "--sparsity", str(SPARSITY), "--calibration", windows]
    flags += ["--samples", str(args.samples), "--length", str(args.length)]
    ours = [sys.executable, "-m", "gblm.llm", *flags, "--method"]
    found = {
        "start-up": [sys.executable, ENTRIES, "load", args.model],
        "plain gblm": [sys.executable, ENTRIES, "plain_gblm", args.model, windows],
        "gblm": [*ours, "gblm"],
        "gblm, gradients of half": [*ours, "gblm:share=0.5"],
        "gblm, gradients of a quarter": [*ours, "gblm:share=0.25"],
        "gblm wanda": [*ours, "wanda"],
        "gblm sparsegpt": [*ours, "sparsegpt"],
        "gblm best": [*ours, "best"],
    }
    if args.llmcompressor_python:
        theirs = [args.llmcompressor_python, ENTRIES]
        found["start-up, llmcompressor's packages"] = [*theirs, "load", args.model]
        for ratio in RATIOS["llm"]:
            (name,) = ratio.theirs  # "llmcompressor METHOD" or "llmcompressor METHOD, basic"
            if not name.startswith("llmcompressor") or ("basic" in name and not args.basic):
                continue
            words = name.replace(",", "").split()
            found[name] = [*theirs, *(*words, "sequential")[:3], args.model, windows]
    return f"{args.samples} windows of {args.length} tokens", found


def vision(args: argparse.Namespace, decoded: str) -> Contestants:
    """Decode the images into a file, choose the micro-batches, and return the contestants."""
    model = [args.model, args.checkpoint or ""]
    decoding = ["decode", *model, args.calibration, str(args.samples), decoded]
    measure([sys.executable, ENTRIES, *decoding], args.threads)
    chosen = measure([sys.executable, ENTRIES, "choose", *model, decoded], args.threads)
    steps = {name: str(chosen[name]) for name in PLAIN}
    sizes = " and ".join(f"{step} ({name})" for name, step in steps.items())
    commands = {}
    for name in ("start-up", *PLAIN, *args.methods.split(",")):
        entry = ["images", name, steps.get(name, steps["forward"]), *model, decoded]
        commands[name] = [sys.executable, ENTRIES, *entry]
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
        found = contestants.heard(log.read())
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
        "A run is a whole process, from start to exit; medians of the rounds.\nOf peak memory less "
        "than 1 is wanted.",
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


def markdown(result: dict[str, Any], picture: str = "") -> str:
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
{picture}| ratio | time | min–max | wanted | peak memory |
|---|--:|--:|--:|--:|
{ratios}
{TEXTS[result["side"]][1]}

{result["machine"]}

    {result["command"]}
"""


def draw_runs(runs: dict[str, list[dict[str, float]]]) -> Callable[[Any], None]:
    """Return what draws the seconds, from least to most, and the peak memory of every contestant.

    Those of gblm are coloured.
    """
    ours = [name.startswith("gblm") or name in METHODS.split(",") for name in runs]
    colors = ["tab:blue" if own else "silver" for own in ours]

    def draw(canvas: Any) -> None:
        pair = canvas.subplots(1, 2, sharey=True)
        for axes, key, label in zip(pair, ("seconds", "peak_mb"), ("s", "peak MB"), strict=True):
            found = [[run[key] for run in measured] for measured in runs.values()]
            middle = [median(values) for values in found]
            less = [median(values) - min(values) for values in found]
            more = [max(values) - median(values) for values in found]
            axes.barh(list(runs), middle, xerr=[less, more], color=colors, capsize=2)
            axes.set_xlabel(label)
            axes.grid(axis="x", alpha=0.3)
        pair[0].invert_yaxis()

    return draw


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
    add("--runs", type=int, default=5, help="rounds; on language after one more [%(default)s]")
    add("--cold", action="store_true", help="on language, no round to warm up")
    add("--threads", type=int, default=2, help="of every process [%(default)s]")
    add("--llmcompressor-python", help="python of its environment; without it, it is left out")
    add("--write", type=Path, help="Markdown file to write into; JSON and figure go beside it")
    add("--section", help="of that file [speed, speed:vit]")
    add("--basic", action="store_true", help="the `basic` pipeline of llmcompressor as well")
    add("--only", nargs="+", metavar="NAME", help="of the contestants, as the table names them")
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
            command = [sys.executable, ENTRIES, "check", args.model, samples]
            sys.exit(subprocess.run(command, env=environment(args.threads)).returncode)
        if unknown := [name for name in args.only or () if name not in commands]:
            flags.error(f"--only {unknown[0]!r} is no contestant; there are {', '.join(commands)}")
        commands = {name: commands[name] for name in args.only or commands}
        runs: dict[str, list[dict[str, float]]] = defaultdict(list)
        warm = args.side == "llm" and not args.cold  # on vision a process warms up by itself
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
        section = args.section or ("speed" if args.side == "llm" else f"speed:{args.side}")
        heading = "## Speed and memory" + ("" if section == "speed" else f": {name}")
        file = args.write.with_name(f"{section.replace(':', '-')}.json")
        tables.replace(file, json.dumps(result, indent=2) + "\n")
        size = (8, 1 + 0.28 * len(runs))
        picture = tables.picture(file.with_suffix(".svg"), draw_runs(runs), size)
        tables.write(args.write, section, heading, markdown(result, picture))


if __name__ == "__main__":
    main()
