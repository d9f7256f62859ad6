"""The types that everything else is made of."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


class GblmError(Exception):
    """What a user did wrong, where, and the way out: the one error gblm raises on purpose."""


def one_of(value: str, choices: Iterable[str], what: str) -> str:
    """Return the value; raises `GblmError` with the nearest choice where it is none of them."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise GblmError(f"unknown {what} {value!r}; {hint}choose from {', '.join(choices)}")
    return value


@dataclass
class Statistics:
    """Sums over the calibration samples of one linear, in fp32, with their counts.

    `sums` holds them by name: `input_sq [in]`, `input_gram [in, in]`, `grad_abs [out, in]`, …: see
    `gblm.maths.stats`. `samples` is the number of calibration samples, `positions` the number of
    input vectors they held. Nothing here is divided by a count: a score does that in sight.
    """

    sums: dict[str, Tensor]
    samples: int = 0
    positions: int = 0

    def __add__(self, other: "Statistics") -> "Statistics":
        """Return the statistics of both sets of samples: every sum and every count is added."""
        sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return Statistics(sums, self.samples + other.samples, self.positions + other.positions)

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name]


@dataclass(frozen=True)
class Pattern:
    """Which keep-masks are allowed.

    `keep(score [out, in])` returns the keep-mask `[out, in]` of the highest scores the pattern
    allows; `check(shape)` raises `GblmError` where a weight of that shape cannot have the pattern.
    `window` is the number of neighbouring inputs that must be chosen together (m of n:m), None
    where a solver may choose; `kept` is how many of them stay (n). `patterns.parse(name)` gives the
    pattern back.
    """

    name: str
    keep: Callable[[Tensor], Tensor]
    check: Callable[[Sequence[int]], None]
    window: int | None = None
    kept: int | None = None


@dataclass(frozen=True)
class Method:
    """A way to prune one linear: a name, the statistics it needs, and the function that does it.

    `solve(weight [out, in], statistics, pattern)` returns `(weight, keep)`: the new weight, exactly
    0 where `keep` is False. `group` is the comparison group the method was published with, taken
    for unstructured patterns where the user names none.

    allocation: how a budget is spent over the linears, by its name; None gives each the same
        pattern, "auto" follows the gradients but leaves n:m alike everywhere.
    focus: the part of a position's weight in the statistics of inputs that its gradients decide.
    refine: passes over the samples that refine what a block keeps, once its linears are solved.
    share: the part of the samples whose gradients are taken.
    regional: gradients are of each block's output norm instead of the model's loss.
    rounds, rate: of the regional optimisation before a block is pruned (see `gblm.walk.regional`).
    """

    name: str
    needs: frozenset[str]
    solve: Callable[[Tensor, Statistics, Pattern], tuple[Tensor, Tensor]]
    group: str = "row"
    allocation: str | None = None
    focus: float = 0.0
    refine: float = 0.0
    share: float = 1.0
    regional: bool = False
    rounds: int = 0
    rate: float = 0.0


@dataclass(frozen=True)
class Kind:
    """How a module is seen as a linear.

    `weight(module)` is a view `[out, in]` of its weight, written through; `features` is the
    dimension of its input and output that holds the features, the samples standing first.
    """

    weight: Callable[[nn.Module], Tensor]
    features: int = -1


LINEAR = Kind(lambda module: module.get_parameter("weight"))

Batch = dict[str, Tensor]  # calibration samples: every tensor has the samples first


@dataclass(frozen=True)
class Adapter:
    """What the core must know of a model family.

    blocks(model): its blocks by name, in any order.
    trunk(model, batch): run the model through its last block; returns what its head takes: a
        tensor `[samples, …]`, or a list, tuple or dict of them.
    loss(model, hidden, batch): the loss of every sample `[samples]`, through the model's own head.
    kind(module): how a module is seen as a linear, None where it is not prunable.
    """

    blocks: Callable[[nn.Module], dict[str, nn.Module]]
    trunk: Callable[[nn.Module, Batch], Tensor]
    loss: Callable[[nn.Module, Tensor, Batch], Tensor]
    kind: Callable[[nn.Module], Kind | None] = lambda module: (
        LINEAR if isinstance(module, nn.Linear) else None
    )
