"""The types that everything else is made of."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor, nn


class GblmError(Exception):
    """What a user did wrong, where, and the way out: the one error gblm raises on purpose."""


def one_of(value: str, choices: Iterable[str], what: str) -> str:
    """Return the value; raises `GblmError` with the nearest choice where it is none of them."""
    choices = list(choices)
    if value not in choices:
        hint = nearest(value, choices, cutoff=0.4)
        raise GblmError(f"unknown {what} {value!r}; {hint}choose from {', '.join(choices)}")
    return value


def nearest(
    value: str,
    choices: Iterable[str],
    *,
    count: int = 1,
    cutoff: float = 0.6,
    form: Callable[[str], str] = repr,
) -> str:
    """Return "did you mean …? " with the nearest choices, as `form` has them; empty for none."""
    near = difflib.get_close_matches(value, list(choices), count, cutoff)
    return f"did you mean {', '.join(map(form, near))}? " if near else ""


def reason(error: Exception) -> str:
    """Return the kind of an error, and the first sentence of what it says."""
    sentence = str(error).strip().split("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {sentence or 'no reason given'}"


@contextmanager
def explained(what: str, way: str) -> Iterator[None]:
    """Turn any other error into a `GblmError`: what is wrong, the reason, the way out."""
    try:
        yield
    except GblmError:
        raise
    except Exception as error:  # every library and every format has exceptions of its own
        raise GblmError(f"{what} ({reason(error)}); {way}") from error


@dataclass
class Statistics:
    """Sums over the calibration samples of one linear, in fp32, with their counts.

    `sums` holds them by name: `input_sq [in]`, `input_gram [in, in]`, `grad_abs [out, in]`, …: see
    `gblm.maths.stats`. `samples` is the number of calibration samples, `positions` the number of
    input vectors they held, `differentiated` the number of samples whose gradients were added.
    Nothing here is divided by a count: a score does that in sight.
    """

    sums: dict[str, Tensor]
    samples: int = 0
    positions: int = 0
    differentiated: int = 0

    def __add__(self, other: "Statistics") -> "Statistics":
        """Return the statistics of both sets of samples: every sum and every count is added."""
        sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return Statistics(
            sums,
            self.samples + other.samples,
            self.positions + other.positions,
            self.differentiated + other.differentiated,
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name]


@dataclass(frozen=True)
class Pattern:
    """Which keep-masks are allowed.

    `keep(score [out, in])` returns the keep-mask `[out, in]` of the highest scores the pattern
    allows; `check(shape)` raises `GblmError` where a weight of that shape cannot have the pattern.
    `window` is the number of neighbouring inputs that must be chosen together (m of n:m), None
    where a solver may choose; `kept` is how many of them stay (n). `units` names the kinds of whole
    units that go, with their shares, `uneven` says that layers may keep different numbers of them,
    and `then` is the pattern of what they leave.
    `patterns.parse(name)` gives the pattern back.
    """

    name: str
    keep: Callable[[Tensor], Tensor]
    check: Callable[[Sequence[int]], None]
    window: int | None = None
    kept: int | None = None
    units: tuple[tuple[str, float], ...] = ()
    uneven: bool = False
    then: "Pattern | None" = None


# Prunes one linear: (weight [out, in], statistics, pattern) -> (weight, keep), the new weight being
# exactly 0 where `keep` is False.
Solver = Callable[[Tensor, Statistics, Pattern], tuple[Tensor, Tensor]]

DENSE_OUTPUTS = "dense_outputs"  # what a step needs beside statistics: what the dense block gives


class Step(ABC):
    """A technique of pruning, which visits every block: a frozen dataclass of its options.

    `needs` names the statistics it takes (see `gblm.maths.stats`), and `DENSE_OUTPUTS` where it
    fits the block to what the dense one gives.
    """

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """The names of the statistics."""

    @property
    def solver(self) -> Solver | None:
        """The function that prunes one linear, None of a step that prunes none."""
        return None

    @abstractmethod
    def visit(self, visit: Any) -> None:
        """Work on one block: a `gblm.walk.visit.Visit` gives its calls, its inputs, its targets."""

    def check_model(self, walk: Any) -> None:
        """Raise `GblmError` where the step cannot work on the model of a `gblm.walk.walk.Walk`."""
        return

    def begin(self, walk: Any) -> Any:
        """Return what the step must know of the dense model at the end, before the first block.

        It may change the model into one that gives the same.
        """
        return None

    def end(self, walk: Any, known: Any) -> None:
        """Work on the whole model after the last block; known: what `begin` has returned."""
        return

    def undo(self, walk: Any, known: Any) -> None:
        """Give the model back what `begin` has changed, but for the parameters of its blocks."""
        return

    @abstractmethod
    def cost(self, footprint: Any) -> Any:
        """Return the `Cost` of all blocks of a model, by its `gblm.walk.footprint.Footprint`."""

    def check(self, pattern: Pattern) -> None:
        """Raise `GblmError` where it cannot give a model a pattern."""
        return

    def key(self) -> dict[str, str]:
        """Return what tells this step from another in the journal of a run: its options."""
        return {field.name: named(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


def named(value: object) -> str:
    """Return a value as text that is the same in every process: functions by name and options."""
    if isinstance(value, partial):
        options = {key: named(option) for key, option in value.keywords.items()}
        return f"{named(value.func)} {[named(x) for x in value.args]} {options}"
    if isinstance(value, frozenset):
        return str(sorted(value))
    return str(getattr(value, "__qualname__", value))


@dataclass(frozen=True)
class Method:
    """A way to prune a model: a name, the steps that visit each block, an allocation.

    allocation: how a budget is spread over the linears, by its name; None gives each the same
        pattern, "auto" follows the gradients but gives every linear the same n:m.
    group: the comparison group of unstructured patterns where the user names none, as published.
    share: the part of the samples whose gradients are taken.
    """

    name: str
    steps: tuple[Step, ...]
    allocation: str | None = None
    group: str = "row"
    share: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that its steps need."""
        return frozenset().union(*(step.needs for step in self.steps))

    def key(self) -> dict[str, Any]:
        """Return what tells this method from another in the journal of a run."""
        steps = [{type(step).__name__: step.key()} for step in self.steps]
        own = {"allocation": self.allocation, "gradients of": self.share}
        return {"method": self.name, "steps": steps, **own}

    @property
    def solve(self) -> Solver:
        """The function that prunes one linear: that of its first step that has one."""
        solvers = [step.solver for step in self.steps if step.solver]
        if not solvers:
            raise GblmError(f"method {self.name} has no step that prunes; add one")
        return solvers[0]


Batch = dict[str, Tensor]  # calibration samples: every tensor has the samples first


@dataclass(frozen=True)
class Adapter:
    """What the core must know of a model family.

    blocks(model): its blocks by name, in any order.
    trunk(model, batch): run the model through its last block; returns what its head takes: a
        tensor `[samples, …]`, or a list, tuple or dict of them.
    loss(model, hidden, batch): the loss of every sample `[samples]`, through the model's own head.
    unpad(batch): the samples of a batch one by one, `[1, …]` each, cut to their real positions;
        None where no sample has padding.
    logits(model, hidden, batch): what the loss is of, `[samples, …, classes]`, through the head;
        None for a model that is not to be distilled.
    everywhere(block): lets every expert of a block see all positions for a time, while what the
        block gives stays the same; by default each sees those that are sent to it.
    config(model): the settings that its class makes it of, by name, and what makes one of changed
        settings, without values of its parameters; None where it cannot be made so.
    batch(model, data, **options): the calibration samples that a user's data are.
    narrows(model): whether what is saved of it can be loaded with widths that its config cannot
        state, by what `gblm.machine.carry.write_widths` writes beside the weights.
    untied(model): gives the head weights of its own where it shares those of the embedding; returns
        what undoes that.
    coupled(model, batch): the batch with what the loss of each sample takes of the others, of the
        dense model; by default the batch as it is, for a loss of each sample by itself.
    """

    blocks: Callable[[nn.Module], dict[str, nn.Module]]
    trunk: Callable[[nn.Module, Batch], Any]
    loss: Callable[[nn.Module, Any, Batch], Tensor]
    unpad: Callable[[Batch], list[Batch] | None] = lambda batch: None
    everywhere: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    config: (
        Callable[[nn.Module], tuple[dict[str, Any], Callable[[dict[str, Any]], nn.Module]]] | None
    ) = None
    batch: Callable[..., Batch] = lambda model, data: data
    logits: Callable[[nn.Module, Any, Batch], Tensor] | None = None
    narrows: Callable[[nn.Module], bool] = lambda model: False
    untied: Callable[[nn.Module], Callable[[], None]] = lambda model: lambda: None
    coupled: Callable[[nn.Module, Batch], Batch] = lambda model, batch: batch
