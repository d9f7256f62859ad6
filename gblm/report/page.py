"""The page a person reads: one run, or several side by side; one file that needs no other."""

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from gblm.machine.files import write_text
from gblm.report import Report, figures, wording
from gblm.report.wording import Change, changes

LINE = 72  # characters of a line of a command, about
WINDOW = re.compile(r"\d+:\d+")  # a pattern n:m


def write_pages(folder: Path, labels: list[str], reports: list[Report]) -> Path:
    """Write the page and `report.json` of the last report, and the comparison of those there are.

    Returns the folder of the last.

    labels: of all runs of a command, finished or not. A single run's files are in the folder
    itself; of several, each has a folder of its label, beside the comparison.
    """
    last = folder / labels[len(reports) - 1] if len(labels) > 1 else folder
    reports[-1].write(last)
    write_text(last / "report.html", run_page(reports[-1]))
    if len(labels) > 1:
        done = dict(zip(labels, reports, strict=False))
        page = comparison_page(done, {label: quote(f"{label}/report.html") for label in done})
        write_text(folder / "report.html", page)
    return last


def run_page(report: Report) -> str:
    """Return the page of one run."""
    measured = changes(report)
    window = int(report.pattern.partition(":")[2]) if WINDOW.fullmatch(report.pattern) else 0
    shapes = {linear.name: linear.shape for linear in report.linears}
    left_dense: dict[str, list[str]] = {}
    for name, reason in report.dense.items():
        left_dense.setdefault(reason, []).append(name)
    return render(
        "run.html.j2",
        report=report,
        title=wording.headline(report),
        name=wording.short(report.model) or report.architecture or "model",
        changes=measured,
        first=next(iter(measured), None),
        left=left_dense,
        maps=figures.heat_maps(report),
        masks={
            name: figures.mask(name, mask, shapes[name], window)
            for name, mask in report.pictures.items()
            if name in shapes
        },
        examples=[(e, common(e.dense.strip(), e.pruned.strip())) for e in report.examples],
        shapes=shapes,
        window=window,
        ways=list(dict.fromkeys(way for own in report.gains for way in own.seconds)),
        blocks=len({report.place(linear.name)[0] for linear in report.linears}),
        zeros=round(report.weights * report.sparsity),
    )


def common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start, up to a word's end."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return same if same in (len(one), len(other)) else one.rfind(" ", 0, same) + 1


@dataclass
class Row:
    """One run in the comparison; `values` are its metrics by data set and name."""

    label: str
    report: Report
    link: str
    values: dict[tuple[str, str], Change]
    front: bool = False

    @property
    def model(self) -> str:
        return wording.short(self.report.model) or "model"

    @property
    def pattern(self) -> str:
        """What was asked for, whatever the weights were compared in."""
        return self.report.pattern.partition("/")[0]

    @property
    def group(self) -> tuple[str, str]:
        """The runs that it is compared with: those of its model with the same pattern."""
        return self.model, self.pattern

    @property
    def error(self) -> float:
        """The mean relative error of the linears."""
        errors = [linear.relative_error for linear in self.report.linears]
        return sum(errors) / len(errors)


def comparison_page(runs: dict[str, Report], links: dict[str, str] | None = None) -> str:
    """Return the page that compares runs, by label; `links` lead to the pages of some of them."""
    rows = []
    for label, report in runs.items():
        values = {(change.data, change.metric.title): change for change in changes(report)}
        rows.append(Row(label, report, (links or {}).get(label, ""), values))
    groups = list(dict.fromkeys(row.group for row in rows))
    rows.sort(key=lambda row: groups.index(row.group))
    metrics = {key: change.metric for row in rows for key, change in row.values.items()}
    models = list(dict.fromkeys(row.model for row in rows))
    first = next(iter(metrics), None)
    best: list[Row] = []  # of each pattern
    if first and metrics[first].better and all(first in row.values for row in rows):
        better = metrics[first].better
        for group in groups:
            own = [row for row in rows if row.group == group]
            best += [max(own, key=lambda row: row.values[first].pruned * better)] * (len(own) > 1)
        for row in best:
            row.front = True
    return render(
        "comparison.html.j2",
        title=f"{wording.counted(len(rows), 'run')} of {', '.join(models)}",
        rows=rows,
        models=models,
        metrics=metrics,
        first=first,
        best=best,
        patterns=len(groups),
        plots={key: plot(rows, key, metric) for key, metric in metrics.items()},
    )


def plot(rows: list[Row], key: tuple[str, str], metric: wording.Metric) -> Markup:
    """Return the plot of a metric against sparsity; models are named where there are several."""
    points: list[figures.Point] = []
    dense: dict[str, float] = {}
    measured = [row for row in rows if key in row.values]
    several = len({row.model for row in measured}) > 1
    for row in measured:
        report, change = row.report, row.values[key]
        model = f"{row.model}, " if several else ""
        method = f"{model}{report.method}"
        tip = f"{method}, {report.pattern}: {change.after}"
        window = ":" in report.pattern
        points.append(figures.Point(method, report.sparsity, change.pruned, tip, window))
        dense[f"{model}dense"] = change.dense
    return figures.pareto(" ".join(key), points, dense, metric)


def folded(command: str) -> str:
    """Return a command in lines that a shell takes for one, broken before its flags.

    >>> print(folded("gblm llm --model a/folder/of/some/length --calibration notes.txt --seed 1"))
    gblm llm --model a/folder/of/some/length --calibration notes.txt \\
        --seed 1
    """
    parts = re.split(r" (?=-)", command)
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < LINE:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return " \\\n    ".join(lines)


def dotted(name: str) -> Markup:
    """Return a dotted name that may be broken after its dots."""
    return Markup("<code>{}</code>").format(Markup(".<wbr>").join(name.split(".")))


def render(template: str, **values: Any) -> str:
    """Return a page of this folder's templates; whatever is put in is escaped."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"dotted": dotted, "folded": folded}
    words = ("amount", "gain", "number", "percent", "count", "size", "time", "counted", "short")
    pages.filters |= {word: getattr(wording, word) for word in words}
    return pages.get_template(template).render(values)
