"""Figures that papers have published, from `published.json`, to stand beside ours."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tables

FILE = Path(__file__).with_name("published.json")
TITLES = {
    "perplexity": "Perplexity on WikiText-2",
    "zero-shot": "Zero-shot accuracy in %, mean of six tasks",
}


@cache
def published() -> dict[str, Any]:
    """Return what the file holds."""
    return json.loads(FILE.read_text())


def theirs(model: str) -> str | None:
    """Return the name the papers have for a model, a hub name or a folder; None for any other."""
    own = Path(model.rstrip("/")).name.casefold()
    for name, known in published()["models"].items():
        if own in known:
            return name
    return None


def look_up(model: str, metric: str, window: int, pattern: str, method: str) -> float | None:
    """Return the published figure, None where there is none.

    metric: of `TITLES`. pattern: "0.5" in the comparison group each method was published with,
    "2:4", "" for the dense model. method: its name with its options, as a report has it.
    """
    for group in published()["figures"]:
        if (group["metric"], group["window"], group["pattern"]) == (metric, window, pattern):
            found = group["values"].get(method, {}).get(theirs(model))
            if found is not None:
                return found
    return None


def text() -> str:
    """Return everything in the file as Markdown, with its sources."""
    found = published()
    groups = [group for group in found["figures"] if group["pattern"]]
    lines = [
        *(
            f"{entry['model']}, {entry['pattern']}, window {entry['window']}: {entry['what']}: "
            f"{' and '.join(f'{value:g}' for value in entry['values'])} ({source(entry)})."
            for entry in found["ablations"]
        ),
        *(
            f"{entry['model']}: pruning by {entry['method']} takes {entry['seconds']} s and "
            f"{entry['gigabytes']} GB ({source(entry)})."
            for entry in found["costs"]
        ),
    ]
    return f"{found['note']}\n\n" + "".join(map(table, groups)) + "".join(f"- {x}\n" for x in lines)


def table(group: dict[str, Any]) -> str:
    """Return the Markdown table of one group of figures, the dense models above."""
    metric, window, pattern = (group[name] for name in ("metric", "window", "pattern"))
    models = [m for m in published()["models"] if any(m in v for v in group["values"].values())]
    cells = {
        (method, model): [value]
        for method in ("dense", *group["values"])
        for model in models
        if (value := look_up(model, metric, window, pattern if method != "dense" else "", method))
    }
    heading = f"{TITLES[metric]}, window {window}, {pattern} ({source(group)})"
    return f"{heading}:\n\n{tables.table('method', cells)}\n"


def source(entry: dict[str, Any]) -> str:
    """Return the name of the paper of an entry, and where it is."""
    return f"{entry['source']}, {published()['sources'][entry['source']]}"
