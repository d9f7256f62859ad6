"""The report of a run: what was pruned, how, what it cost and what became of it."""

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "gblm",
    "torch",
    "transformers",
    "timm",
    "datasets",
    "accelerate",
    "safetensors",
    "lm_eval",
)


@dataclass
class LinearReport:
    """What became of one linear.

    `relative_error` is ‖(W − Ŵ)X‖ / ‖WX‖ over 1024 to 2048 of its calibration inputs X, drawn
    evenly, or all where there are fewer; `seconds` are those of its solve.
    """

    name: str
    shape: list[int]
    sparsity: float
    relative_error: float
    seconds: float


@dataclass
class Report:
    """What a run did, with `seconds` per phase and an `evaluation` of the model by data set."""

    method: str
    pattern: str
    model: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    linears: list[LinearReport] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)  # linears left alone, and why
    notes: list[str] = field(default_factory=list)  # what else a reader must know
    seed: int | None = None

    @property
    def sparsity(self) -> float:
        """The share of the weights of all pruned linears that are exactly 0."""
        sizes = [linear.shape[0] * linear.shape[1] for linear in self.linears]
        zeros = [linear.sparsity * size for linear, size in zip(self.linears, sizes, strict=True)]
        return sum(zeros) / sum(sizes)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as what `report.json` holds."""
        return {
            **asdict(self),
            "sparsity": self.sparsity,
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "versions": versions(),
        }

    def write(self, folder: Path) -> None:
        """Write `report.json` into the folder: beside first, then renamed."""
        beside = folder / "report.json.part"
        beside.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        os.replace(beside, folder / "report.json")


@contextlib.contextmanager
def clock(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds a phase takes to the phase."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
