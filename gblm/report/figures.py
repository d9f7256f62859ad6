"""The figures of a report: SVG by matplotlib, drawn to be read on light and on dark pages.

What is ink takes the colour of the text around it; values are one colour at more or less opacity,
which lets the page shine through. A unit of a figure is a pixel of the page at its natural size.
"""

import io
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gblm.report import LinearReport, Mask, Report
from gblm.report.wording import Metric, percent

INK = "#010203"  # becomes the colour of the text around the figure
ERROR = "#d9480f"
SPARSITY = "#1c7ed6"
# Colours that stand out from white and from black alike.
SERIES = ("#1c7ed6", "#d9480f", "#2b9348", "#ae3ec9", "#0c8599", "#b08900", "#e64980", "#868e96")
MARKERS = "osD^vPX"
WIDTH = 330  # a figure fills a phone
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are not formulas
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
}
SVG = "{http://www.w3.org/2000/svg}"
LINK = "http://www.w3.org/1999/xlink"


MAPS = (  # of which value of a linear; title, what it says, colour
    (
        "relative_error",
        "Error by layer",
        "How far the outputs have moved, ‖(W\u00a0−\u00a0Ŵ)X‖\u00a0/\u00a0‖WX‖, in percent.",
        ERROR,
    ),
    (
        "sparsity",
        "Sparsity by layer",
        "The share of the weights that are exactly 0, in percent.",
        SPARSITY,
    ),
)
Row = dict[int, list[LinearReport]]  # the linears of a kind by the number of their block
Cells = dict[int, tuple[float, str]]  # a value, and what is said where a pointer rests on it


def heat_maps(report: Report) -> list[tuple[str, str, Markup]]:
    """Return title, what it says, and picture of error and of sparsity: depth × kind."""
    rows: dict[str, Row] = defaultdict(lambda: defaultdict(list))
    whole: Row = defaultdict(list)
    for linear in report.linears:
        block, kind = report.place(linear.name)
        if block in report.blocks:
            column = report.blocks.index(block)
            rows[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind)][column].append(linear)
            whole[column].append(linear)
    if not whole:
        return []
    rows["whole block"] = whole
    maps = []
    shares = [linear.sparsity for linear in report.linears]
    even = max(shares) - min(shares) < 0.005  # the picture would be of one colour
    for value, title, says, colour in MAPS[:1] if even else MAPS:
        cells = {
            kind: {i: _cell(linears, value, report.blocks[i]) for i, linears in row.items()}
            for kind, row in rows.items()
        }
        maps.append((title, says, heat(value, title, cells, colour)))
    return maps


def _cell(linears: list[LinearReport], of: str, block: str) -> tuple[float, str]:
    """Return the mean of a value over linears, each by its size, and what is said of it."""
    sizes = [linear.size for linear in linears]
    value = float(np.average([getattr(linear, of) for linear in linears], weights=sizes))
    name = linears[0].name if len(linears) == 1 else f"{block}, {len(linears)} layers"
    return value, f"{name}: {percent(value)}"


def heat(name: str, label: str, rows: dict[str, Cells], colour: str) -> Markup:
    """Return a heat map of shares: a row per kind, the last one set apart, a column per block."""
    columns = 1 + max(column for row in rows.values() for column in row)
    left, high, gap, below = 6 + 6 * max(map(len, rows)), 24, 6, 62
    wide = max(WIDTH - left - 4, 7 * columns)
    step = wide / columns
    bottom = high * len(rows) + gap
    values = [value for row in rows.values() for value, _ in row.values()]
    low, top = min(values), max(values)
    if top - low < 0.005:  # all alike: shown as what they are between nothing and all
        low, top = 0.0, 1.0
    tips: list[str] = []
    with style(name):
        figure, axes = canvas(left + wide + 4, bottom + below)
        for y, (kind, row) in enumerate(rows.items()):
            above = y * high + (gap if y == len(rows) - 1 else 0)
            text(axes, left - 6, above + high / 2, kind, "right", 11)
            for column, (value, tip) in row.items():
                x = left + column * step
                box = Rectangle((x + 0.5, above + 0.5), step - 1, high - 1, lw=0)
                alpha = opacity((value - low) / (top - low))
                box.set(facecolor=colour, alpha=alpha, gid=f"tip-{len(tips)}")
                tips.append(tip)
                axes.add_patch(box)
                if columns <= 8:
                    text(axes, x + step / 2, above + high / 2, f"{100 * value:.0f}", "center")
        every = next(n for n in (1, 2, 4, 5, 8, 10, 20, 50, 100) if columns / n <= 12 or n == 100)
        for column in range(0, columns, every):
            text(axes, left + (column + 0.5) * step, bottom + 9, str(column), "center")
        text(axes, left - 6, bottom + 9, "block", "right")
        scale(axes, left, bottom + 32, wide, low, top, colour)
        return svg(figure, label, tips)


def scale(axes: Any, x: float, y: float, wide: float, low: float, top: float, colour: str) -> None:
    """Draw what the opacities of a colour stand for."""
    for i in range(6):
        box = Rectangle((x + i * wide / 6 + 0.5, y), wide / 6 - 1, 8, lw=0)
        box.set(facecolor=colour, alpha=opacity(i / 5))
        axes.add_patch(box)
    text(axes, x, y + 19, percent(low), "left")
    text(axes, x + wide, y + 19, percent(top), "right")


def text(axes: Any, x: float, y: float, words: str, align: str, size: int = 10) -> None:
    """Write words in a line whose middle is at y."""
    axes.text(x, y, words, ha=align, va="center_baseline", size=size)


def opacity(share: float) -> float:
    """Return the opacity of a value, 0 … 1 between the lowest and the highest."""
    return 0.1 + 0.75 * share


def mask(name: str, picture: Mask, shape: Sequence[int], window: int = 0) -> Markup:
    """Return the picture of a mask of a weight `[out, in]`: the bluer, the more is kept.

    window: of n:m, neighbours that a line sets apart from others.
    """
    grid, corner, side = picture.grid(), picture.corner, 240
    low, top = (0.0, 1.0) if corner or np.ptp(grid) < 0.02 else (grid.min(), grid.max())
    colours = np.empty((*grid.shape, 4))
    colours[..., :3] = matplotlib.colors.to_rgb(SPARSITY)
    colours[..., 3] = np.clip((grid - low) / (top - low), 0, 1)
    rows, columns = grid.shape if corner else shape
    wide, high = (side * min(1.0, max(0.35, x)) for x in (columns / rows, rows / columns))
    width, height = round(wide), round(high) + (2 if corner else 40)
    with style(name):
        figure, axes = canvas(width, height)
        axes.imshow(colours, interpolation="none", extent=(0, wide, high, 0), aspect="auto")
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.add_patch(Rectangle((0.5, 0.5), wide - 1, high - 1, fill=False, ec=INK, lw=0.5))
        if corner and window:
            axes.vlines(np.arange(window, columns, window) * wide / columns, 0, high, INK, lw=1)
        if not corner:
            scale(axes, 0, high + 8, wide, low, top, SPARSITY)
        return svg(figure, f"Mask of {name}: {percent(float(grid.mean()))} kept")


@dataclass
class Point:
    """One run in a plot of a metric against sparsity."""

    method: str
    sparsity: float
    value: float
    tip: str
    window: bool = False  # of n:m


def pareto(name: str, points: Sequence[Point], dense: dict[str, float], metric: Metric) -> Markup:
    """Return the plot of a metric against sparsity; dense models are levels.

    A method has a colour, and one line for its sparsities, one with hollow marks for n:m.
    """
    series: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.sparsity):
        series.setdefault(point.method + ", n:m" * point.window, []).append(point)
    methods = list(dict.fromkeys(point.method for point in points))
    columns = 1 if max(map(len, series)) > 16 else 2
    under = 50 + 17 * -(-len(series) // columns)
    height = 210 + under
    tips: list[str] = []
    with style(name):
        figure = Figure((WIDTH / 72, height / 72))
        axes = figure.add_axes((0.15, under / height, 0.79, 195 / height))
        for label, line in series.items():
            i = methods.index(line[0].method)
            axes.plot(
                [point.sparsity for point in line],
                [point.value for point in line],
                color=SERIES[i % len(SERIES)],
                marker=MARKERS[i % len(MARKERS)],
                fillstyle="none" if line[0].window else "full",
                label=label,
                lw=1.5,
                ms=6,
            )
            for point in line:  # a larger target for the pointer
                target = axes.plot(point.sparsity, point.value, "o", ms=16, alpha=0)[0]
                target.set(gid=f"tip-{len(tips)}")
                tips.append(point.tip)
        for label, value in dense.items():
            axes.axhline(value, color=INK, lw=1, ls=(0, (4, 3)), alpha=0.7)
            side = metric.better or 1  # away from the runs
            axes.annotate(
                label,
                (1, value),
                xycoords=axes.get_yaxis_transform(),
                xytext=(0, 3 * side),
                textcoords="offset points",
                ha="right",
                va="bottom" if side > 0 else "top",
            )
        values = [*(point.value for point in points), *dense.values()]
        if metric.better < 0 and min(values) > 0 and max(values) > 5 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.margins(y=0.12)
        shares = [point.sparsity for point in points]
        axes.set_xlim(max(0, min(shares) - 0.1), min(1, max(shares) + 0.1))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.set_xlabel("sparsity")
        axes.grid(axis="y", color=INK, alpha=0.15, lw=0.6)
        figure.legend(loc="lower left", bbox_to_anchor=(0, 0), ncols=columns, frameon=False)
        return svg(figure, f"{metric.title} against sparsity", tips)


def style(name: str) -> AbstractContextManager[None]:
    """Draw in the style of the report; the ids of a figure hang on its name."""
    return matplotlib.rc_context(SETTINGS | {"svg.hashsalt": name})


def canvas(width: int, height: int) -> tuple[Figure, Any]:
    """Return a figure of a size in pixels, and axes whose unit is a pixel, from the top down."""
    figure = Figure((width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def svg(figure: Figure, label: str, tips: Sequence[str] = ()) -> Markup:
    """Return a figure as SVG to stand in a page, with a label, and the page's font and ink.

    tips: what is said where a pointer rests on the artists whose gid is tip-0, tip-1, …
    """
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", file.getvalue().decode()))
    for element in root.iter():
        if style := element.get("style"):
            style = re.sub(r"font-family:[^;]*;? ?", "", style)
            element.set("style", style.replace(INK, "currentColor"))
        name = element.get("id", "")
        if name and name not in used:
            del element.attrib["id"]
        if name.startswith("tip-"):
            title = ElementTree.Element(f"{SVG}title")
            title.text = tips[int(name.removeprefix("tip-"))]
            element.insert(0, title)
    width = round(72 * figure.get_figwidth())
    for key in ("width", "height", "version"):
        del root.attrib[key]
    root.attrib |= {"role": "img", "aria-label": label, "style": f"--width: {width}px"}
    ElementTree.register_namespace("", SVG[1:-1])
    ElementTree.register_namespace("xlink", LINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))
