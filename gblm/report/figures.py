"""The figures of a report: SVG by matplotlib, drawn to be read on light and on dark pages.

What is ink takes the colour of the text around it; values are one colour at more or less opacity,
which lets the page shine through. A unit of a figure is a pixel of the page at its natural size.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@dataclass
class Cell:
    """A value of a heat map, and what is said of it where a pointer rests on it."""

    value: float
    tip: str


def heat_maps(report: Report) -> list[tuple[str, str, Markup]]:
    """Return title, what it says, and picture of error and of sparsity: depth × kind."""
    if not report.blocks or not report.linears:
        return []
    rows: dict[str, dict[int, list[LinearReport]]] = {}
    for linear in report.linears:
        block, kind = report.place(linear.name)
        if block in report.blocks:
            row = rows.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind), {})
            row.setdefault(report.blocks.index(block), []).append(linear)
    whole: dict[int, list[LinearReport]] = {}
    for row in rows.values():
        for column, found in row.items():
            whole.setdefault(column, []).extend(found)
    rows["whole block"] = whole

    def cells(of: str) -> dict[str, dict[int, Cell]]:
        return {
            kind: {column: _cell(found, of, report.blocks[column]) for column, found in row.items()}
            for kind, row in rows.items()
        }

    return [
        (
            "Error by linear",
            "How far the outputs have moved, ‖(W\u00a0−\u00a0Ŵ)X‖\u00a0/\u00a0‖WX‖, in percent.",
            heat("error", "Relative error, block by block", cells("relative_error"), ERROR),
        ),
        (
            "Sparsity by linear",
            "The share of the weights that are exactly 0, in percent.",
            heat("sparsity", "Sparsity, block by block", cells("sparsity"), SPARSITY),
        ),
    ]


def _cell(linears: list[LinearReport], of: str, block: str) -> Cell:
    """Return the mean of a value over linears, each by its size."""
    sizes = [linear.shape[0] * linear.shape[1] for linear in linears]
    value = float(np.average([getattr(linear, of) for linear in linears], weights=sizes))
    name = linears[0].name if len(linears) == 1 else f"{block}, {len(linears)} linears"
    return Cell(value, f"{name}: {percent(value)}")


def heat(name: str, label: str, rows: dict[str, dict[int, Cell]], colour: str) -> Markup:
    """Return a heat map of shares: a row per kind, the last one set apart, a column per block."""
    columns = 1 + max(column for row in rows.values() for column in row)
    left, high, gap, below = 6 + 6 * max(map(len, rows)), 24, 6, 62
    wide = max(WIDTH - left - 4, 7 * columns)
    width, height = left + wide + 4, high * len(rows) + gap + below
    found = [cell.value for row in rows.values() for cell in row.values()]
    low, top = min(found), max(found)
    if top - low < 0.005:  # all alike: shown as what they are between nothing and all
        low, top = 0.0, 1.0
    tips: list[str] = []
    with drawn(name):
        figure, axes = canvas(width, height)
        for y, (kind, row) in enumerate(rows.items()):
            above = y * high + (gap if y == len(rows) - 1 else 0)
            axes.text(left - 6, above + high / 2, kind, ha="right", va="center_baseline")
            for column, cell in row.items():
                share = (cell.value - low) / (top - low)
                corner = (left + column * wide / columns + 0.5, above + 0.5)
                box = Rectangle(corner, wide / columns - 1, high - 1, lw=0)
                box.set(facecolor=colour, alpha=opacity(share), gid=f"tip-{len(tips)}")
                tips.append(cell.tip)
                axes.add_patch(box)
                if columns <= 8:
                    middle = (corner[0] + wide / columns / 2 - 0.5, above + high / 2)
                    text = f"{100 * cell.value:.0f}"
                    axes.text(*middle, text, ha="center", va="center_baseline", size=10)
        under = high * len(rows) + gap
        step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 50, 100) if columns / s <= 12 or s == 100)
        for column in range(0, columns, step):
            x = left + (column + 0.5) * wide / columns
            axes.text(x, under + 9, str(column), ha="center", va="center_baseline", size=10)
        axes.text(left - 6, under + 9, "block", ha="right", va="center_baseline", size=10)
        scale(axes, left, under + 32, wide, low, top, colour)
        return svg(figure, label, tips)


def scale(axes: Any, x: float, y: float, wide: float, low: float, top: float, colour: str) -> None:
    """Draw what the opacities of a colour stand for."""
    for i in range(6):
        box = Rectangle((x + i * wide / 6 + 0.5, y), wide / 6 - 1, 8, lw=0)
        axes.add_patch(box)
        box.set(facecolor=colour, alpha=opacity(i / 5))
    axes.text(x, y + 19, percent(low), ha="left", va="center_baseline", size=10)
    axes.text(x + wide, y + 19, percent(top), ha="right", va="center_baseline", size=10)


def opacity(share: float) -> float:
    """Return the opacity of a value, 0 … 1 between the lowest and the highest."""
    return 0.1 + 0.75 * share


def mask(name: str, found: Mask, shape: Sequence[int]) -> Markup:
    """Return the picture of a mask of a weight `[out, in]`: the bluer, the more is kept."""
    grid = found.grid()
    low, top = (0.0, 1.0) if found.corner or np.ptp(grid) < 0.02 else (grid.min(), grid.max())
    red, green, blue = matplotlib.colors.to_rgb(SPARSITY)
    colours = np.empty((*grid.shape, 4))
    colours[:] = red, green, blue, 0
    colours[..., 3] = np.clip((grid - low) / (top - low), 0, 1)
    side = 240
    rows, columns = (found.rows, found.columns) if found.corner else shape
    wide, high = (side * min(1.0, max(0.35, x)) for x in (columns / rows, rows / columns))
    height = round(high) + (2 if found.corner else 40)
    with drawn(name):
        figure, axes = canvas(round(wide), height)
        axes.imshow(colours, interpolation="none", extent=(0, wide, high, 0), aspect="auto")
        axes.set(xlim=(0, round(wide)), ylim=(height, 0))
        axes.add_patch(Rectangle((0.5, 0.5), wide - 1, high - 1, fill=False, ec=INK, lw=0.5))
        if not found.corner:
            scale(axes, 0, high + 8, wide, low, top, SPARSITY)
        kept = f"{percent(float(grid.mean()))} kept"
        return svg(figure, f"Mask of {name}: {kept}")


@dataclass
class Point:
    """One run in a plot of a metric against sparsity."""

    method: str
    sparsity: float
    value: float
    tip: str
    window: bool = False  # of n:m


def pareto(name: str, points: Sequence[Point], dense: dict[str, float], of: Metric) -> Markup:
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
    with drawn(name):
        figure = Figure((WIDTH / 72, height / 72))
        axes = figure.add_axes((0.15, under / height, 0.79, 195 / height))
        for label, found in series.items():
            i = methods.index(found[0].method)
            look: dict[str, Any] = {
                "color": SERIES[i % len(SERIES)],
                "marker": MARKERS[i % len(MARKERS)],
            }
            look |= {"fillstyle": "none" if found[0].window else "full", "label": label}
            x, y = [point.sparsity for point in found], [point.value for point in found]
            axes.plot(x, y, lw=1.5, ms=6, **look)
            for point in found:  # a larger target for the pointer
                target = axes.plot(point.sparsity, point.value, "o", ms=16, alpha=0)[0]
                target.set(gid=f"tip-{len(tips)}")
                tips.append(point.tip)
        for label, value in dense.items():
            axes.axhline(value, color=INK, lw=1, ls=(0, (4, 3)), alpha=0.7)
            side = of.better or 1  # away from the runs
            place: dict[str, Any] = {"xytext": (0, 3 * side), "textcoords": "offset points"}
            place |= {"ha": "right", "va": "bottom" if side > 0 else "top"}
            axes.annotate(label, (1, value), xycoords=axes.get_yaxis_transform(), **place)
        values = [*(point.value for point in points), *dense.values()]
        if of.better < 0 and min(values) > 0 and max(values) > 5 * min(values):
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
        return svg(figure, f"{of.title} against sparsity", tips)


@contextmanager
def drawn(name: str) -> Iterator[None]:
    """Draw in the style of the report; the ids of a figure hang on its name."""
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": name}):
        yield


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
        own = element.get("id", "")
        if own and own not in used:
            del element.attrib["id"]
        if own.startswith("tip-"):
            title = ElementTree.Element(f"{SVG}title")
            title.text = tips[int(own.removeprefix("tip-"))]
            element.insert(0, title)
    width = round(72 * figure.get_figwidth())
    for key in ("width", "height", "version"):
        del root.attrib[key]
    root.attrib |= {"role": "img", "aria-label": label, "style": f"--width: {width}px"}
    ElementTree.register_namespace("", SVG[1:-1])
    ElementTree.register_namespace("xlink", LINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))
