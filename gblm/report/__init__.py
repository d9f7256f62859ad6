"""The report of a run: what was pruned, how, what it cost and what became of it."""

import base64
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, get_origin

import numpy as np
from torch import Tensor, nn

from gblm.base import GblmError
from gblm.machine.files import portable, write_json

PACKAGES: tuple[str, ...] = ("gblm", "torch", "transformers", "timm", "datasets")
PACKAGES += ("accelerate", "safetensors", "lm_eval")

ANSWERS = ("top1", "top5", "accuracy", "exact_match")  # percent of answers that are right
Evaluation = dict[str, dict[str, float]]  # by data set: metric and value, METRIC_stderr its error


@dataclass
class LinearReport:
    """What became of one linear.

    `relative_error` is ‖(W − Ŵ)X‖ / ‖WX‖ over 1024 to 2048 of its calibration inputs X, drawn
    evenly, or all where there are fewer; `seconds` are those of its solve. `positions` is the
    number of its inputs; `note` says where it was pruned in another way than its method's.
    """

    name: str
    shape: list[int]
    sparsity: float
    relative_error: float
    seconds: float
    positions: int = 0
    note: str = ""

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass
class Gain:
    """The seconds of y = xWᵀ by every way that was tried: see `gblm.gains`.

    number: how many linears have this shape. positions: the vectors x. base: the dense way.
    """

    shape: list[int]
    number: int
    positions: int
    base: str
    seconds: dict[str, float]

    def ratio(self, way: str) -> float:
        """Return the time of a way over that of the dense one."""
        return self.seconds[way] / self.seconds[self.base]


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
        cells = np.frombuffer(base64.b64decode(self.kept, validate=True), np.uint8)
        return cells.reshape(self.rows, self.columns) / 255


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
    """Return the command line this process was started with, by the name of an installed one."""
    first, *words = sys.orig_argv[1:] or [""]
    installed = Path(first).is_absolute() and Path(first).suffix != ".py"
    start = [Path(first).name] if installed else ["python", first]
    return shlex.join([*start, *map(portable, words)])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on."""
    numbers = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            numbers[package] = version(package)
    return numbers


@dataclass(repr=False)
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
    parameters: int = 0  # numbers in the whole model,
    left: int = 0  # and in the pruned one, where it is known
    file_bytes: int = 0  # of the weights that were written
    file_zeros: float = 0.0  # the share of the numbers in them that is 0
    block_weights: int = 0  # numbers in the matrices of its blocks
    architecture: str = ""  # the class of the model
    date: str = ""  # when the run ended
    device: str = ""  # on which it ran, in words
    dtype: str = ""  # of the weights as they ran
    compute_dtype: str = ""  # of products in which fp32 blocks are computed
    calibration: str = ""  # what the samples are
    speed: dict[str, dict[str, Any]] = field(default_factory=dict)  # by use: unit, dense, pruned
    gains: list[Gain] = field(default_factory=list)  # what the zeros of its linears buy here
    loading: str = ""  # Python that loads the result, empty where none was saved
    pictures: dict[str, Mask] = field(default_factory=dict)  # of masks, by linear
    examples: list[Example] = field(default_factory=list)
    examples_note: str = ""
    program: str = ""  # which repeats the run by the config.toml beside this report
    command: str = field(default_factory=command)
    versions: dict[str, str] = field(default_factory=versions)

    def masks(self) -> dict[str, Tensor]:
        """Return the keep-mask `[out, in]` of every pruned linear, as its weights are now.

        Raises `GblmError` where the report was read from a folder: `gblm.masks(model)` has them.
        """
        keeps: Callable[[], dict[str, Tensor]] | None = vars(self).get("keeps")  # of its run
        if keeps is None:
            raise GblmError("a stored report has no masks; load its model for gblm.masks(model)")
        return keeps()

    def __repr__(self) -> str:
        return f"<{self.method}, {self.pattern}: {self.sparsity:.4f} of {self.weights:,} weights>"

    @property
    def weights(self) -> int:
        """The number of weights of all pruned linears."""
        return sum(linear.size for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """The share of the weights of all pruned linears that are exactly 0."""
        return sum(linear.sparsity * linear.size for linear in self.linears) / self.weights

    @property
    def smaller(self) -> bool:
        """Whether whole units are gone from the model."""
        return 0 < self.left < self.parameters

    def add(self, other: "Report", renamed: Mapping[str, str]) -> None:
        """Take what became of a smaller model that was pruned after this one, linear by linear.

        renamed: the names of its blocks and linears by those of the larger one, if they are others.
        """
        known = {linear.name: linear for linear in self.linears}
        names = {new: old for old, new in renamed.items()}
        for linear in other.linears:
            block, place = other.place(linear.name)
            around = f"{names.get(block, block)}.{place}" if block else linear.name
            linear.name = names.get(linear.name, around)
            before = known.setdefault(linear.name, linear)
            if before is linear:
                self.linears.append(linear)
                continue
            stays = linear.size / before.size
            before.sparsity = 1 - stays * (1 - linear.sparsity)
            before.relative_error = max(before.relative_error, linear.relative_error)
            before.seconds += linear.seconds
        self.left = other.left or self.left
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def place(self, linear: str) -> tuple[str, str]:
        """Return the block of a linear and what it is there, such as `self_attn.q_proj`."""
        around = [block for block in self.blocks if linear.startswith(f"{block}.")]
        block = max(around, key=len, default="")
        return block, linear[len(block) :].lstrip(".")

    def write(self, folder: Path) -> None:
        """Write `report.json` into the folder."""
        write_json(folder / "report.json", {**asdict(self), "sparsity": self.sparsity})

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """Return the report of a run's folder; raises `GblmError` where it is none."""
        path = folder / "report.json"
        try:
            stored = json.loads(path.read_text("utf-8"))
            names = {entry.name for entry in fields(cls)}
            report = cls(**{name: value for name, value in stored.items() if name in names})
            report.linears = [LinearReport(**linear) for linear in stored["linears"]]
            report.pictures = {name: Mask(**mask) for name, mask in stored["pictures"].items()}
            report.gains = [Gain(**gain) for gain in stored.get("gains", ())]
            report.examples = [Example(**example) for example in stored["examples"]]
            _check(report)
        except FileNotFoundError:
            way = "give a folder that --output or --report wrote"
            raise GblmError(f"{folder} holds no report.json; {way}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise GblmError(f"{path} is no report ({reason}); run the command again") from error
        return report


def merged(
    before: Evaluation, after: Evaluation, counts: Mapping[str, tuple[int, str]]
) -> dict[str, dict[str, Any]]:
    """Return the metrics of every data set with their values before and after pruning.

    Where a data set has several metrics, each stands under the name of the set and its own. The
    standard error of a metric stands beside its value; that of right answers in percent is
    √(p(1 − p)/n). counts: how many of what a data set holds, such as `(60, "windows")`.
    """
    entries = {}
    for data, values in before.items():
        metrics = [name for name in values if not name.endswith("_stderr")]
        for metric in metrics:
            entry: dict[str, Any] = {"metric": metric}
            if data in counts:
                entry["count"], entry["of"] = counts[data]
            if metric in ANSWERS and entry.get("count", 1) > 1:
                for when, found in (("dense", values[metric]), ("pruned", after[data][metric])):
                    variance = found * (100 - found) / (entry["count"] - 1)
                    entry[f"{when}_stderr"] = variance**0.5
            for end in ("", "_stderr"):
                if (key := f"{metric}{end}") in values:
                    entry |= {f"dense{end}": values[key], f"pruned{end}": after[data][key]}
            entries[data if len(metrics) == 1 else f"{data} {metric}"] = entry
    return entries


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
    parts: list[Any] = [report, *report.linears, *report.gains, *report.pictures.values()]
    parts += report.examples
    for part in parts:
        for entry in fields(part):
            origin = get_origin(entry.type)
            kind = origin if origin in (list, dict) else entry.type
            _check_kind(entry.name, getattr(part, entry.name), kind)
    for phase, seconds in report.seconds.items():
        _check_kind(phase, seconds, float)
    for values in report.evaluation.values():
        _check_kind("metric", values["metric"], str)
        for key in ("dense", "pruned", *(key for key in values if key.endswith("_stderr"))):
            _check_kind(key, values[key], float)
    for gain in report.gains:
        _check_kind("seconds", gain.seconds[gain.base], float)
    for values in report.speed.values():
        _check_kind("unit", values["unit"], str)
        for key in ("dense", "pruned"):
            _check_kind(key, values[key], float)
    for mask in report.pictures.values():
        mask.grid()
    if not report.weights > 0:
        raise ValueError("no linear in it")


def _check_kind(name: str, value: object, kind: Any) -> None:
    if not isinstance(value, int | float if kind is float else kind):
        raise TypeError(f"{name} is {value!r:.40}")
