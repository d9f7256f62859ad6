"""Allocation: how much of each linear goes, given one budget for the model.

An allocation is a value made by a factory here, with a line in `ALLOCATIONS`. `patterns_for` turns
the shares it gives into a pattern for each linear, and keeps the count of the whole model.
"""

import inspect
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gblm.base import GblmError, Pattern, Statistics, one_of
from gblm.maths import patterns, scores, stats
from gblm.maths.scores import NORMS

STEPS = 4096  # points at most on the loss curve of a linear
MOVED = 1 / 32  # of a linear, in a step of the search

Loss = Callable[[list[float], bool], float]  # of shares of all linears; True: on fewer samples


@dataclass(frozen=True)
class Weighed:
    """A linear as an allocation sees it: `weight [out, in]` and statistics of the dense model.

    read: brings the values of both, where they are elsewhere.
    """

    name: str
    weight: Tensor
    statistics: Statistics
    block: str
    read: Callable[[], tuple[Tensor, Statistics]] | None = None

    def values(self) -> tuple[Tensor, Statistics]:
        """Return the weight in fp32, or wider, and its statistics."""
        weight, statistics = self.read() if self.read else (self.weight, self.statistics)
        return stats.wide(weight), statistics


@dataclass(frozen=True)
class Budget:
    """The share of all prunable weights that goes, and where scores are compared.

    `group` is "row" or "layer"; `window` is the m of n:m, where scores are compared within m.
    loss: of the model without some shares of its linears, for an allocation that asks for trials.
    """

    sparsity: float
    group: str = "row"
    window: int | None = None
    loss: Loss | None = None

    def width(self, weight: Tensor) -> int:
        """Return the number of weights of one comparison group of a weight `[out, in]`."""
        return self.window or (weight.shape[1] if self.group == "row" else weight.numel())

    def reach(self, bound: float) -> float:
        """Return how far a share may lie from the sparsity: a bound, one of m at least for n:m."""
        return max(bound, 1 / self.window) if self.window else bound


@dataclass(frozen=True)
class Allocation:
    """A way to spend a budget: a name, the statistics it needs, and the function that does it.

    `shares(linears, budget)` returns the share of each linear that goes, about the budget's
    sparsity in all; `patterns_for` makes the count exact. trials: how often it asks for the loss of
    the budget on fewer samples, and on all.
    """

    name: str
    needs: frozenset[str]
    shares: Callable[[Sequence[Weighed], Budget], list[float]]
    trials: tuple[int, int] = (0, 0)


def uniform() -> Allocation:
    """Take the same share of every linear layer."""
    return Allocation("uniform", frozenset(), lambda x, budget: [budget.sparsity] * len(x))


def gradient(norm: str = "l1", bound: float = 0.15) -> Allocation:
    """Take what costs least: the next weight of every layer costs the same loss.

    The loss of dropping a weight is |w|·Σ|g| (norm "l1") or w²·Σg² ("l2"), sums over the samples,
    on the dense model; each linear's curve is that of its own comparison groups (see `loss_curve`).
    bound: how far a share may lie from the budget's sparsity, one of m at least for n:m.

    Raises `GblmError` where the norm is unknown or the bound outside (0, 1].
    """
    return _by_loss("gradient", norm, bound)


def global_(norm: str = "l1", bound: float = 1.0) -> Allocation:
    """Take of each layer the share that one threshold for the whole model would drop.

    The threshold is on |w|·Σ|g| (norm "l1") or w²·Σg² ("l2") of every weight by itself, whatever
    the comparison group of the pattern. bound: see `gradient`; 1 leaves the shares free.

    Raises `GblmError` where the norm is unknown or the bound outside (0, 1].
    """
    return _by_loss("global", norm, bound, group="layer")


def owl(m: float = 5, lam: float = 0.08) -> Allocation:
    """Take less of blocks with more outliers (OWL, arXiv 2310.05175).

    d = the share of scores |W|·‖X‖₂ of a block above m times their mean; a block's share is
    S − (u − mean u) with u = 2·lam·(d − min d) / (max d − min d), the mean over all weights, and
    the same for all its linears. Where all d are equal, so are the shares.

    Raises `GblmError` where m or lam is not above 0.
    """
    if not (m > 0 and lam > 0):
        raise GblmError(f"owl needs m > 0 and lam > 0, not {m:g} and {lam:g}; published: 5, 0.08")

    def shares(linears: Sequence[Weighed], budget: Budget) -> list[float]:
        names = list(dict.fromkeys(linear.block for linear in linears))
        blocks = {name: [x for x in linears if x.block == name] for name in names}
        outliers = {name: _outliers(block, m) for name, block in blocks.items()}
        low, high = min(outliers.values()), max(outliers.values())
        spread = high - low or 1.0
        less = [2 * lam * (outliers[linear.block] - low) / spread for linear in linears]
        sizes = [linear.weight.numel() for linear in linears]
        mean = sum(u * size for u, size in zip(less, sizes, strict=True)) / sum(sizes)
        return [min(max(budget.sparsity - u + mean, 0.0), 1.0) for u in less]

    return Allocation(f"owl(m={m:g}, lam={lam:g})", frozenset({"input_sq"}), shares)


def search(generations: int = 30, children: int = 8, bound: float = 0.15) -> Allocation:
    """Take what loses least in trials, from `gradient`'s shares on (EvoPress, arXiv 2410.14649).

    A child of the best shares so far drops 1/32, or one of m, more of a linear and less of another
    of its shape, one to three times. Of each generation's children, the two of the lowest loss on
    fewer samples are tried on all, and the best of them takes the place of its parent if it is
    better. bound: see `gradient`.

    Raises `GblmError` where a number is below 1 or the bound outside (0, 1].
    """
    if min(generations, children) < 1:
        raise GblmError(f"{generations} generations of {children} children; give 1 or more")
    start = gradient(bound=bound)

    def shares(linears: Sequence[Weighed], budget: Budget) -> list[float]:
        assert budget.loss
        loss, draw, best = budget.loss, random.Random(0), start.shares(linears, budget)
        pairs = _pairs([tuple(linear.weight.shape) for linear in linears])
        lowest = loss(best, False)
        for _ in range(generations if pairs else 0):
            young = [_moved(best, pairs, budget, bound, draw) for _ in range(children)]
            young.sort(key=lambda child: loss(child, True))
            for child in young[:2]:
                if (found := loss(child, False)) < lowest:
                    best, lowest = child, found
        return best

    trials = (generations * children, 1 + 2 * generations)
    return Allocation("search", start.needs | {"input_sq"}, shares, trials)


ALLOCATIONS: dict[str, Callable[..., Allocation]] = {
    "uniform": uniform,
    "gradient": gradient,
    "global": global_,
    "owl": owl,
    "search": search,
}


def make(name: str, **options: Any) -> Allocation:
    """Return the allocation of that name, made with those of the options that it takes.

    Raises `GblmError` where no allocation has that name.
    """
    factory = ALLOCATIONS[one_of(name, ALLOCATIONS, "allocation")]
    taken = inspect.signature(factory).parameters
    return factory(**{option: value for option, value in options.items() if option in taken})


def patterns_for(
    allocation: Allocation,
    linears: Sequence[Weighed],
    pattern: Pattern,
    loss: Loss | None = None,
) -> dict[str, Pattern]:
    """Return the pattern of each linear by its name; a linear that is not in it stays dense.

    pattern: the budget, as it would be for all linears alike; each gets one of its kind. Together
    they drop as many weights as floor(sparsity · all weights) lets them: with "layer" exactly that,
    else less by fewer weights than the smallest step of a linear (`out` for a row, size / m for
    n:m). With n:m every linear keeps 1 to m − 1 of m; a row or layer keeps one weight at least.
    loss: of the model, see `Budget`.

    Raises `GblmError` where a linear lacks a statistic or cannot have the pattern.
    """
    for linear in linears:
        _check(allocation, linear, pattern)
    budget = replace(budget_of(pattern), loss=loss)
    counts = _counts(linears, allocation.shares(linears, budget), budget)
    by_name: dict[str, Pattern] = {}
    for linear, count in zip(linears, counts, strict=True):
        width = budget.width(linear.weight)
        if budget.window:
            by_name[linear.name] = patterns.nm(width - count, width)
        elif count:
            by_name[linear.name] = patterns.unstructured(count / width, budget.group)
    return by_name


def loss_curve(linear: Weighed, norm: str, width: int) -> Tensor:
    """Return the loss per weight of dropping a little more of a linear, `[steps]`, on the CPU.

    The k-th of `width` steps drops the k-th lowest weight of each comparison group of `width`
    weights; its loss is the mean of theirs, |w|·Σ|g| ("l1") or w²·Σg² ("l2"). The curve never
    falls. Beyond `STEPS` steps it is read at as many points, evenly.
    """
    score = scores.gradient(*linear.values(), norm)
    lowest = patterns.ascending(scores.finite(score, "score").reshape(-1, width))
    loss = lowest if norm == "l1" else lowest.square()
    steps = min(width, STEPS)
    middles = (torch.arange(steps, dtype=torch.float64) + 0.5) * (width / steps)
    return loss.mean(dim=0, dtype=torch.float64).cpu()[middles.long()]


def _by_loss(name: str, norm: str, bound: float, group: str | None = None) -> Allocation:
    """Return the allocation that drops the cheapest steps of all loss curves, within the bound."""
    statistic = NORMS[one_of(norm, NORMS, "norm")]
    if not 0 < bound <= 1:
        raise GblmError(f"bound {bound:g} is outside (0, 1]; 0.15 is the usual one")

    def shares(linears: Sequence[Weighed], budget: Budget) -> list[float]:
        compared = Budget(budget.sparsity, group) if group else budget
        curves = [loss_curve(x, norm, compared.width(x.weight)) for x in linears]
        sizes = [x.weight.numel() for x in linears]
        return cheapest(curves, sizes, budget.sparsity, budget.reach(bound))

    return Allocation(f"{name}(norm={norm}, bound={bound:g})", frozenset({statistic}), shares)


def cheapest(curves: list[Tensor], sizes: list[int], sparsity: float, bound: float) -> list[float]:
    """Return the shares that drop the cheapest steps of all curves, within sparsity ± bound.

    Curves never fall, so that the steps of a linear go in their order; each drops size / steps.
    """
    steps = [len(curve) for curve in curves]
    low = [max(0, math.ceil((sparsity - bound) * n - 1e-6)) for n in steps]
    low = [min(k, math.floor(sparsity * n + 1e-6)) for k, n in zip(low, steps, strict=True)]
    high = [min(n, math.floor((sparsity + bound) * n + 1e-6)) for n in steps]
    free = [curve[a:b] for curve, a, b in zip(curves, low, high, strict=True)]
    owner = torch.repeat_interleave(torch.tensor([len(part) for part in free]))
    drops = torch.tensor(sizes, dtype=torch.float64) / torch.tensor(steps)
    order = torch.cat(free).argsort(stable=True)
    left = sparsity * sum(sizes) - (drops * torch.tensor(low)).sum()
    taken = order[drops[owner[order]].cumsum(dim=0) <= left + 1e-6 * drops.min()]
    more = torch.bincount(owner[taken], minlength=len(curves)).tolist()
    return [(a + k) / n for a, k, n in zip(low, more, steps, strict=True)]


def _pairs(shapes: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return all pairs of linears of one shape, in both orders."""
    alike = defaultdict(list)
    for i, shape in enumerate(shapes):
        alike[shape].append(i)
    return [(a, b) for own in alike.values() for a in own for b in own if a != b]


def _moved(
    shares: list[float],
    pairs: list[tuple[int, int]],
    budget: Budget,
    bound: float,
    draw: random.Random,
) -> list[float]:
    """Return shares moved between linears one to three times, few moves being likelier."""
    new, step = list(shares), 1 / budget.window if budget.window else MOVED
    low, high = (budget.sparsity + side * budget.reach(bound) for side in (-1, 1))
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        a, b = draw.choice(pairs)
        if new[a] + step <= min(high, 1) + 1e-6 and new[b] - step >= max(low, 0) - 1e-6:
            new[a], new[b] = new[a] + step, new[b] - step
    return new


def _counts(linears: Sequence[Weighed], shares: list[float], budget: Budget) -> list[int]:
    """Return how many weights of each comparison group of a linear go, the total kept.

    All shares are moved by the largest amount at which what they drop, rounded down, is within the
    budget; then linears nearest to their next step take one more, as long as one fits.
    """
    widths = [budget.width(linear.weight) for linear in linears]
    sizes = [linear.weight.numel() for linear in linears]
    drops = [size // width for size, width in zip(sizes, widths, strict=True)]
    least = 1 if budget.window else 0
    total = math.floor(budget.sparsity * sum(sizes) + 1e-6)

    def counts_at(moved: float) -> list[int]:
        exact = [(s + moved) * width + 1e-6 for s, width in zip(shares, widths, strict=True)]
        return [max(least, min(math.floor(k), n - 1)) for k, n in zip(exact, widths, strict=True)]

    def left(counts: list[int]) -> int:
        return total - sum(k * drop for k, drop in zip(counts, drops, strict=True))

    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if left(counts_at(middle)) >= 0 else (low, middle)
    counts = counts_at(low)

    def distance(i: int) -> tuple[float, str]:
        return (counts[i] + 1) / widths[i] - shares[i], linears[i].name

    room = left(counts)
    while fits := [i for i, n in enumerate(widths) if drops[i] <= room and counts[i] < n - 1]:
        nearest = min(fits, key=distance)
        counts[nearest] += 1
        room -= drops[nearest]
    return counts


def _outliers(block: list[Weighed], m: float) -> float:
    """Return the share of the scores |W|·‖X‖₂ of a block that lie above m times their mean."""
    values = [scores.wanda(*linear.values()) for linear in block]
    size = sum(score.numel() for score in values)
    threshold = m * sum(score.sum(dtype=torch.float64).item() for score in values) / size
    return sum((score > threshold).sum().item() for score in values) / size


def budget_of(pattern: Pattern) -> Budget:
    """Return the budget that a pattern names; raises `GblmError` where it names none."""
    patterns.parse(pattern.name)
    if pattern.window and pattern.kept:
        return Budget((pattern.window - pattern.kept) / pattern.window, window=pattern.window)
    sparsity, _, group = pattern.name.partition("/")
    return Budget(float(sparsity), group or "row")


def _check(allocation: Allocation, linear: Weighed, pattern: Pattern) -> None:
    """Raise `GblmError` where a linear lacks a statistic or cannot have the pattern."""
    where = f"{linear.name} {list(linear.weight.shape)}, {allocation.name}, {pattern.name}"
    if missing := sorted(allocation.needs - set(linear.statistics.sums)) if not linear.read else []:
        raise GblmError(f"{where}: no {', '.join(missing)} of it; collect what `needs` names")
    try:
        pattern.check(linear.weight.shape)
    except GblmError as error:
        raise GblmError(f"{where}: {error}") from None
