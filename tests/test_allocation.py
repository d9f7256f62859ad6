"""The laws of allocations: the count of the whole model, and which linears pay for it."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gblm.base import GblmError, Statistics
from gblm.maths import allocation, patterns
from gblm.maths.allocation import Budget, Weighed

# Two kinds of blocks: attention with fewer keys, and a wide feed-forward part.
SHAPES = [(256, 256), (64, 256), (64, 256), (256, 256), (768, 256), (256, 768)]
BUDGETS = ["0.3", "0.42", "0.5", "0.666", "0.8", "0.3/layer", "0.4321/layer", "0.8/layer"]
WINDOWS = ["2:4", "1:4", "4:8", "5:8", "3:16"]
STATED = [name for name in allocation.ALLOCATIONS if name != "search"]  # which draws, and tries
few = settings(max_examples=10)
seeds = st.integers(0, 2**31)


def draw(seed: int = 0, blocks: int = 3, shapes: list[tuple[int, int]] = SHAPES) -> list[Weighed]:
    """Return the linears of some blocks, of very different sizes and gradients."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64)

    def linear(block: int, i: int, shape: tuple[int, int]) -> Weighed:
        sums = {
            "grad_abs": normal(*shape).abs() * normal(1).exp(),
            "grad_sq": normal(*shape).square() * normal(1).exp(),
            "input_sq": (normal(shape[1]) * (1 + block)).exp(),
        }
        weight = normal(*shape) * normal(1).exp()
        return Weighed(f"blocks.{block}.{i}", weight, Statistics(sums, 4, 16), f"blocks.{block}")

    return [linear(block, i, shape) for block in range(blocks) for i, shape in enumerate(shapes)]


def sparsity(pattern: str) -> float:
    n, _, m = pattern.partition(":")
    return 1 - int(n) / int(m) if m else float(pattern.partition("/")[0])


def loss_of(linears: list[Weighed]) -> allocation.Loss:
    """Return a loss of the shares of linears, in which every other one counts three times."""
    sizes = [linear.weight.numel() * (1 + 2 * (i % 2)) for i, linear in enumerate(linears)]
    return lambda shares, fewer: sum(
        size * share**2 for size, share in zip(sizes, shares, strict=True)
    )


def dropped(linears: list[Weighed], found: dict[str, patterns.Pattern]) -> list[int]:
    """Return how many weights of each linear its pattern drops."""
    return [
        int((~found[x.name].keep(x.weight.float())).sum()) if x.name in found else 0
        for x in linears
    ]


def step(linear: Weighed, pattern: str) -> int:
    """Return the fewest weights that a linear can drop more under a pattern."""
    _, _, m = pattern.partition(":")
    if m:
        return linear.weight.numel() // int(m)
    return 1 if "/" in pattern else linear.weight.shape[0]


def check_count(linears: list[Weighed], pattern: str, counts: list[int]) -> None:
    """Fail unless the count is the budget's, short of it by less than the smallest step."""
    total = sum(linear.weight.numel() for linear in linears)
    short = math.floor(sparsity(pattern) * total + 1e-6) - sum(counts)
    assert 0 <= short < min(step(linear, pattern) for linear in linears)
    assert ":" in pattern or short <= 0.001 * total


@pytest.mark.parametrize("pattern", ["0.42", "0.666", "0.4321/layer", "0.8/layer", "2:4", "3:16"])
@pytest.mark.parametrize("name", allocation.ALLOCATIONS)
def test_the_count_of_the_model_is_the_budget(name, pattern):
    linears, made = draw(blocks=2), allocation.make(name)
    found = allocation.patterns_for(made, linears, patterns.parse(pattern), loss_of(linears))
    check_count(linears, pattern, dropped(linears, found))
    assert made.name.startswith(name)


@pytest.mark.parametrize("pattern", ["0.42", "0.4321/layer"])
def test_the_checker_sees_shares_rounded_down(pattern):
    linears, group = draw(), patterns.parse(pattern)
    counts = dropped(linears, {linear.name: group for linear in linears})
    with pytest.raises(AssertionError):
        check_count(linears, pattern, counts)


@pytest.mark.parametrize("pattern", ["0.5", "0.3", "0.7/layer"])
@few
@given(seed=seeds, data=st.data())
def test_odd_shapes_keep_the_count(pattern, seed, data):
    side = st.integers(3, 40)
    shapes = data.draw(st.lists(st.tuples(side, side), min_size=1, max_size=5))
    linears = draw(seed, 2, shapes)
    total = sum(linear.weight.numel() for linear in linears)
    for name in allocation.ALLOCATIONS:
        made, loss = allocation.make(name), loss_of(linears)
        found = allocation.patterns_for(made, linears, patterns.parse(pattern), loss)
        counts = dropped(linears, found)
        assert 0 <= math.floor(sparsity(pattern) * total + 1e-6) - sum(counts) < 40
        assert all(
            count < linear.weight.numel() for count, linear in zip(counts, linears, strict=True)
        )


@pytest.mark.parametrize("pattern", BUDGETS + WINDOWS)
def test_uniform_gives_every_linear_the_budget(pattern):
    linears = draw(blocks=2)
    found = allocation.patterns_for(allocation.uniform(), linears, patterns.parse(pattern))
    if ":" in pattern:
        assert {kept.name for kept in found.values()} == {pattern}
    for kept in found.values():
        narrowest = 16384 if "/" in pattern else 256
        assert abs(sparsity(kept.name) - sparsity(pattern)) <= 2 / narrowest


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_linear_whose_weights_cost_more_goes_less(norm, group):
    linears = draw(blocks=1, shapes=[(64, 64)] * 4)
    sums = linears[0].statistics.sums
    linears = [
        replace(x, weight=linears[0].weight, statistics=Statistics(scaled(sums, 2.0**i), 4))
        for i, x in enumerate(linears)
    ]
    for made in (allocation.gradient(norm, 0.2), allocation.global_(norm)):
        shares = made.shares(linears, Budget(0.5, group))
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 0.5 > shares[-1]


def scaled(sums: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {k: v * factor if k.startswith("grad") else v for k, v in sums.items()}


@pytest.mark.parametrize("budget", [Budget(0.5), Budget(0.6, "layer"), Budget(0.5, window=8)])
@pytest.mark.parametrize("name", STATED)
@few
@given(seed=seeds, data=st.data(), factor=st.integers(-20, 20))
def test_shares_know_no_order_of_the_linears_and_no_scale_of_the_loss(
    name, budget, seed, data, factor
):
    linears = draw(seed, 2, [(16, 32), (24, 16)])
    shares = allocation.make(name).shares(linears, budget)
    order = data.draw(st.permutations(range(len(linears))))
    permuted = allocation.make(name).shares([linears[i] for i in order], budget)
    assert permuted == pytest.approx([shares[i] for i in order], abs=1e-12)
    other = [
        replace(x, statistics=Statistics(scaled(x.statistics.sums, 2.0**factor), 4))
        for x in linears
    ]
    assert allocation.make(name).shares(other, budget) == shares


@pytest.mark.parametrize("bound", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("group", ["row", "layer"])
@few
@given(seed=seeds)
def test_shares_stay_within_the_bound_and_reach_it_where_they_would_go_further(group, bound, seed):
    linears = draw(seed, 3, [(64, 64), (48, 128)])

    def furthest(made: allocation.Allocation) -> float:
        return max(abs(share - 0.55) for share in made.shares(linears, Budget(0.55, group)))

    for make in (allocation.gradient, partial(allocation.global_, "l2")):
        assert furthest(make(bound=bound)) <= bound + 1e-9
        step = 1 / 64  # of a row
        assert furthest(make(bound=bound)) >= min(bound, furthest(make(bound=1))) - step


@pytest.mark.parametrize("budget", [Budget(0.5), Budget(0.7, "layer"), Budget(0.5, window=8)])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@few
@given(seed=seeds)
def test_no_exchange_between_linears_lowers_the_loss(norm, budget, seed):
    linears, bound = draw(seed, 2, [(16, 32), (24, 16)]), 0.25
    shares = allocation.gradient(norm, bound).shares(linears, budget)
    last, following = [], []
    for linear, share in zip(linears, shares, strict=True):
        curve = allocation.loss_curve(linear, norm, budget.width(linear.weight))
        taken, most = round(share * len(curve)), (budget.sparsity + bound) * len(curve)
        if taken - 1 >= (budget.sparsity - bound) * len(curve):
            last.append(curve[taken - 1].item())
        if taken + 1 <= most:
            following.append(curve[taken].item())
    assert max(last, default=0) <= min(following, default=math.inf)


@pytest.mark.parametrize("budget", [Budget(0.5), Budget(0.7, "layer"), Budget(0.5, window=8)])
def test_a_search_lowers_the_loss_it_is_given_within_the_bound(budget):
    linears = draw(2, 3)
    loss, start = loss_of(linears), allocation.gradient().shares(linears, budget)
    asked = [0, 0]

    def counted(shares: list[float], fewer: bool) -> float:
        asked[not fewer] += 1
        return loss(shares, fewer)

    made = allocation.search(generations=20)
    found = made.shares(linears, replace(budget, loss=counted))
    assert loss(found, False) < loss(start, False)
    assert max(abs(share - budget.sparsity) for share in found) <= 0.15 + 1e-6
    sizes = [linear.weight.numel() for linear in linears]
    for shape in {linear.weight.shape for linear in linears}:  # budget stays with its shape
        own = [i for i, linear in enumerate(linears) if linear.weight.shape == shape]
        spent = [sum(shares[i] * sizes[i] for i in own) for shares in (found, start)]
        assert spent[0] == pytest.approx(spent[1])
    assert tuple(asked) == made.trials
    near = allocation.search(generations=5, bound=0.02).shares(linears, replace(budget, loss=loss))
    assert max(abs(share - budget.sparsity) for share in near) <= budget.reach(0.02) + 1e-6
    with pytest.raises(GblmError, match="give 1 or more"):
        allocation.search(children=0)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@few
@given(seed=seeds)
def test_the_loss_curve_is_what_a_pattern_drops(norm, seed):
    linear = draw(seed, 1, [(6, 16)])[0]
    grad = linear.statistics["grad_abs"] if norm == "l1" else linear.statistics["grad_sq"]
    loss = linear.weight.abs() ** (1 if norm == "l1" else 2) * grad
    for width, pattern in [(16, "0.25"), (96, "0.25/layer"), (4, "3:4")]:
        curve = allocation.loss_curve(linear, norm, width)
        assert (curve.diff() >= 0).all()
        lost = loss[~patterns.parse(pattern).keep(loss)].sum()
        per_step = loss.numel() / width
        torch.testing.assert_close(curve[: width // 4].sum() * per_step, lost)


def test_a_long_loss_curve_is_read_at_fewer_points():
    linear = draw(0, 1, [(100, 300)])[0]
    curve = allocation.loss_curve(linear, "l1", 30000)
    whole = (linear.weight.abs() * linear.statistics["grad_abs"]).flatten().sort().values
    assert len(curve) == allocation.STEPS
    assert curve.mean().item() == pytest.approx(whole.mean().item(), rel=1e-3)


def test_global_is_one_threshold_for_the_whole_model():
    linears = draw(1, 2, [(16, 32), (24, 16)])
    loss = [x.weight.abs() * x.statistics["grad_abs"] for x in linears]
    ordered = torch.cat([x.flatten() for x in loss]).sort().values
    threshold = ordered[int(0.6 * len(ordered)) - 1]
    expected = [(x <= threshold).double().mean().item() for x in loss]
    assert allocation.global_().shares(linears, Budget(0.6, "row")) == pytest.approx(expected)


def test_owl_is_its_formula():
    linears = draw(2, 3, [(16, 32), (24, 16)])
    ratios = []
    for block in range(3):
        values = []
        for x in linears[2 * block : 2 * block + 2]:
            for row in x.weight.tolist():
                for w, square in zip(row, x.statistics["input_sq"].tolist(), strict=True):
                    values.append(abs(w) * math.sqrt(square / 4))
        threshold = 3 * sum(values) / len(values)
        ratios.append(100 * sum(value > threshold for value in values) / len(values))
    low, high = min(ratios), max(ratios)
    kept = [(ratio - low) / (high - low) * 0.1 * 2 for ratio in ratios]
    kept = [k - sum(kept) / 3 + (1 - 0.7) for k in kept]
    shares = allocation.owl(m=3, lam=0.1).shares(linears, Budget(0.7))
    assert shares == pytest.approx([1 - kept[i // 2] for i in range(6)])
    assert max(shares) - min(shares) == pytest.approx(0.2)


def test_owl_of_blocks_that_are_alike_is_uniform():
    one = draw(0, 1)
    linears = [replace(x, name=f"{i}{x.name}", block=f"{i}") for i in range(3) for x in one]
    assert allocation.owl().shares(linears, Budget(0.5)) == pytest.approx([0.5] * len(linears))


def test_every_linear_keeps_its_kind_of_pattern():
    linears = draw()
    for text in ("2:4", "4:8"):
        found = allocation.patterns_for(allocation.global_(), linears, patterns.parse(text))
        m = int(text[2:])
        assert found.keys() == {linear.name for linear in linears}
        assert all(pattern.window == m for pattern in found.values())
        assert len({pattern.name for pattern in found.values()}) > 1
    found = allocation.patterns_for(allocation.gradient(), linears, patterns.parse("0.5/layer"))
    assert all(pattern.name.endswith("/layer") for pattern in found.values())


def test_a_linear_of_which_nothing_goes_stays_dense():
    linears = draw(blocks=1, shapes=[(8, 16), (8, 16)])
    dear = Statistics(scaled(linears[0].statistics.sums, 1e9), 4)
    linears[0] = replace(linears[0], statistics=dear)
    found = allocation.patterns_for(allocation.global_(), linears, patterns.parse("0.25"))
    assert list(found) == [linears[1].name]
    assert dropped(linears, found) == [0, 64]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: allocation.make("gradients"), "unknown allocation 'gradients'; did you mean"),
        (lambda: allocation.gradient("l3"), "unknown norm 'l3'"),
        (lambda: allocation.gradient(bound=0), "bound 0 is outside"),
        (lambda: allocation.global_(bound=1.5), "bound 1.5 is outside"),
        (lambda: allocation.owl(m=0), "owl needs m > 0"),
        (lambda: allocation.owl(lam=-1), "owl needs m > 0"),
    ],
)
def test_what_is_no_allocation_is_refused(make, message):
    with pytest.raises(GblmError, match=message):
        make()


def test_make_hands_on_the_options_an_allocation_takes():
    made = allocation.make("gradient", norm="l2", bound=0.1, alpha=3)
    assert made.name == "gradient(norm=l2, bound=0.1)"
    assert made.needs == {"grad_sq"}
    assert allocation.make("uniform", norm="l2").name == "uniform"


def test_a_missing_statistic_and_an_impossible_pattern_name_the_linear():
    linears = draw(blocks=1, shapes=[(8, 10)])
    bare = [replace(linears[0], statistics=Statistics({}, 4))]
    with pytest.raises(GblmError, match=r"blocks\.0\.0 \[8, 10\], owl.*no input_sq"):
        allocation.patterns_for(allocation.owl(), bare, patterns.parse("0.5"))
    odd = replace(patterns.parse("0.5"), name="odd")
    with pytest.raises(GblmError, match="pattern 'odd' is neither"):
        allocation.patterns_for(allocation.uniform(), linears, odd)
    with pytest.raises(GblmError, match=r"blocks\.0\.0 .*2:4: in=10 is not divisible by 4"):
        allocation.patterns_for(allocation.uniform(), linears, patterns.parse("2:4"))
