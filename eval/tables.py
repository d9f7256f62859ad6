"""What the scripts share that write tables and figures into the documents."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

FOLDERS = ("GBLM_ASSETS", "SMOLLM2")  # variables that name those of models and data
COLORS = {  # the same method has the same colour in every figure
    "magnitude": "dimgray",
    "wanda": "tab:blue",
    "gradient": "tab:green",
    "gblm": "tab:red",
    "sparsegpt": "tab:purple",
    "admm": "tab:brown",
    "best": "tab:orange",
}
MARKERS = dict(zip(COLORS, "xs^Dvpo", strict=True))


def portable(text: str) -> str:
    """Return a command line, or a path, without the folders of this machine."""
    folders = [(os.environ.get(name, "").rstrip("/"), f"${name}") for name in FOLDERS]
    for folder, name in (*folders, (str(Path.home()), "~")):
        text = text.replace(folder, name) if folder else text
    return text


def replace(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    os.replace(beside, path)


def write(path: Path, section: str, heading: str, text: str) -> None:
    """Put the text between the markers of a section of a Markdown file, at its end where none."""
    start, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    page = path.read_text() if path.exists() else ""
    if start not in page:
        page = f"{page}\n{heading}\n\n{start}\n{end}\n".lstrip("\n")
    replace(path, page.split(start)[0] + f"{start}\n{text}{end}" + page.split(end)[1])


def publish(text: str, page: Path | None, section: str, heading: str) -> None:
    """Print a text with the command of the running script, and write it into a page, if any."""
    command = ["python", f"eval/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    text += f"\n    {portable(shlex.join(command))}\n"
    print(text)
    if page:
        write(page, section, heading, text)


def threads() -> str:
    """Return how many threads torch computes with, in words."""
    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def number(value: float) -> str:
    """Return a value with two decimals, a large one with four digits."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.4g}"


def cell(values: Sequence[float]) -> str:
    """Return the mean of the draws, and ± their standard deviation where there are several."""
    spread = f" ± {number(stdev(values))}" if len(values) > 1 else ""
    return f"{number(mean(values))}{spread}"


def table(corner: str, cells: Mapping[tuple[str, str], Sequence[float]]) -> str:
    """Return a Markdown table of the draws by row and column, both in their first order.

    What is not there is left empty.
    """
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    lines = [[corner, *columns], ["---", *["--:"] * len(columns)]]
    lines += [
        [row, *(cell(found) if (found := cells.get((row, column))) else "" for column in columns)]
        for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure(path: Path, draw: Callable[[Any], None]) -> str:
    """Draw an SVG figure on the axes of matplotlib, with a legend: see `picture`."""

    def single(canvas: Any) -> None:
        axes = canvas.subplots()
        draw(axes)
        canvas.legend(fontsize="small", loc="outside right upper", frameon=False)
        axes.grid(alpha=0.3)

    return picture(path, single)


def picture(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (7, 4)) -> str:
    """Draw an SVG on a figure of matplotlib, of a size in inches; return Markdown that shows it.

    Without matplotlib nothing is drawn or returned, and a message says so.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is missing; pip install 'gblm[eval]'", file=sys.stderr)
        return ""
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": path.name}):  # the same file for the same values
        canvas = Figure(figsize=size, layout="constrained")
        draw(canvas)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        canvas.savefig(beside, format="svg", metadata={"Date": None})
        os.replace(beside, path)
    return f"![{path.stem}]({path.name})\n\n"


def level(axes: Any, label: str, value: float) -> None:
    """Draw a value as a dotted line, unless the drawn ones lie so far off that it would press them.

    That is beyond twice, or below half, of the nearest of them.
    """
    drawn = [float(y) for line in axes.get_lines() for y in line.get_ydata()]
    if min(drawn) / 2 <= value <= max(drawn) * 2:
        axes.axhline(value, color="black", linestyle=":", label=label)


def logarithmic(axes: Any) -> None:
    """Make the upright axis logarithmic, with plain numbers at a few ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    subs = (1,) if decades > 3 else (1, 2, 5) if decades > 1.2 else (1, 2, 3, 4, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
