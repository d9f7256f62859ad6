"""The report of a run: what was pruned, how, what it cost and what became of it."""

import base64
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, get_origin

import numpy as np
from torch import nn

from gblm.base import GblmError
from gblm.machine.files import write_json

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

Evaluation = dict[str, dict[str, float]]  # by data set: metric and value, METRIC_stderr its error


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
class Mask:
    """A picture of what a linear keeps: the kept share of each of its cells, `[rows, columns]`.

    `kept` holds a byte of 0 … 255 per cell, row by row, in base64. Each cell stands for as many
    weights; with `corner` it is one weight, of the first outputs and inputs.
    """

    rows: int
    columns: int
    kept: str
    corner: bool = False

    def grid(self) -> np.ndarray:
        """Return the kept shares 0 … 1, `[rows, columns]`; raises `ValueError` for damage."""
        found = np.frombuffer(base64.b64decode(self.kept, validate=True), np.uint8)
        return found.reshape(self.rows, self.columns) / 255


@dataclass
class Example:
    """What the model makes of one input before and after pruning: `given` goes in.

    Where the input is a picture, `picture` is its JPEG in base64 and `given` the right answer.
    """

    given: str
    dense: str
    pruned: str
    picture: str = ""


class Examples(Protocol):
    """Inputs on which a reader sees what pruning has changed; each side brings its own."""

    def before(self, model: nn.Module) -> None:
        """Note what the dense model makes of them."""

    def after(self, model: nn.Module) -> tuple[str, list[Example]]:
        """Return what they are, in a sentence, and those to show."""


def command() -> str:
    """Return the command line this process was started with."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


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
    blocks: list[str] = field(default_factory=list)  # their names, in the order of use
    allocation: str = "uniform"
    parameters: int = 0  # numbers in the whole model
    compute_dtype: str = ""  # of products in which fp32 blocks are computed
    calibration: str = ""  # what the samples are
    loading: str = ""  # Python that loads the result, empty where none was saved
    masks: dict[str, Mask] = field(default_factory=dict)  # by linear
    examples: list[Example] = field(default_factory=list)
    examples_note: str = ""
    command: str = field(default_factory=command)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def weights(self) -> int:
        """The number of weights of all pruned linears."""
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """The share of the weights of all pruned linears that are exactly 0."""
        sizes = [linear.shape[0] * linear.shape[1] for linear in self.linears]
        zeros = [linear.sparsity * size for linear, size in zip(self.linears, sizes, strict=True)]
        return sum(zeros) / sum(sizes)

    def place(self, linear: str) -> tuple[str, str]:
        """Return the block of a linear and what it is there, such as `self_attn.q_proj`."""
        own = [block for block in self.blocks if linear.startswith(f"{block}.")]
        block = max(own, key=len, default="")
        return block, linear[len(block) :].lstrip(".")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as what `report.json` holds."""
        return {**asdict(self), "sparsity": self.sparsity}

    def write(self, folder: Path) -> None:
        """Write `report.json` into the folder."""
        write_json(folder / "report.json", self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """Return the report of a run's folder; raises `GblmError` where it is none."""
        path = folder / "report.json"
        try:
            found = json.loads(path.read_text("utf-8"))
            known = {own.name for own in fields(cls)}
            report = cls(**{key: value for key, value in found.items() if key in known})
            report.linears = [LinearReport(**linear) for linear in found["linears"]]
            report.masks = {k: Mask(**mask) for k, mask in found.get("masks", {}).items()}
            report.examples = [Example(**example) for example in found.get("examples", [])]
            _check(report)
        except FileNotFoundError:
            raise GblmError(
                f"{folder} holds no report.json; give a folder that --output or --report wrote"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise GblmError(
                f"{path} is no report ({type(error).__name__}: {error}); run the command again"
            ) from error
        return report


def merged(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """Return the metrics of every data set with their values before and after pruning.

    Where a data set has several metrics, each stands under the name of the set and its own. The
    standard error of a metric stands beside its value.
    """
    found = {}
    for name, metrics in before.items():
        own = [metric for metric in metrics if not metric.endswith("_stderr")]
        for metric in own:
            entry: dict[str, Any] = {"metric": metric}
            for end in ("", "_stderr"):
                if (key := f"{metric}{end}") in metrics:
                    entry |= {f"dense{end}": metrics[key], f"pruned{end}": after[name][key]}
            found[name if len(own) == 1 else f"{name} {metric}"] = entry
    return found


def check_pages() -> None:
    """Raise `GblmError` where what draws a page is not installed."""
    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise GblmError(
            f"a page of a report is drawn with {' and '.join(missing)}, which is not installed; "
            "pip install 'gblm[report]', or do without --report"
        )


@contextlib.contextmanager
def clock(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds a phase takes to the phase."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def _check(report: Report) -> None:
    """Raise `ValueError`, `TypeError` or `KeyError` where a report holds other than it should."""
    parts: list[Any] = [report, *report.linears, *report.masks.values(), *report.examples]
    for part in parts:
        for own in fields(part):
            origin, value = get_origin(own.type), getattr(part, own.name)
            kind: Any = origin if origin in (list, dict) else own.type
            if not isinstance(value, int | float if kind is float else kind):
                raise TypeError(f"{own.name} is {value!r:.40}")
    for numbers in (report.seconds, *map(_values, report.evaluation.values())):
        for name, value in numbers.items():
            if not isinstance(value, int | float):
                raise TypeError(f"{name} is {value!r:.40}")
    for mask in report.masks.values():
        mask.grid()
    if not report.weights > 0:
        raise ValueError("no linear in it")


def _values(evaluation: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(evaluation["metric"], str):
        raise TypeError("a metric has no name")
    errors = {key: value for key, value in evaluation.items() if key.endswith("_stderr")}
    return {**errors, **{key: evaluation[key] for key in ("dense", "pruned")}}
