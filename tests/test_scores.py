"""The laws of the scores: what each is, and how they are related."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gblm import methods
from gblm.base import GblmError, Statistics
from gblm.maths import patterns, scores, stats

OUT, IN = 6, 8
PATTERNS = ["0.5", "0.3/layer", "2:4"]
few = settings(max_examples=20)
seeds = st.integers(0, 2**31)


def draw(seed: int, samples: int = 5) -> tuple[Tensor, Statistics]:
    """Return a weight and all its statistics, of inputs of very different sizes."""
    made = torch.Generator().manual_seed(seed)
    sizes = torch.rand(IN, generator=made, dtype=torch.float64) * 4
    x = torch.randn(samples, 3, IN, generator=made, dtype=torch.float64) * sizes
    dy = torch.randn(samples, 3, OUT, generator=made, dtype=torch.float64)
    weight = torch.randn(OUT, IN, generator=made, dtype=torch.float64)
    return weight, statistics_of(weight, x, dy)


def statistics_of(weight: Tensor, x: Tensor, dy: Tensor) -> Statistics:
    inputs, gradients = stats.zeros(stats.INPUT, weight), stats.zeros(stats.GRADIENT, weight)
    stats.add_inputs(inputs, x.flatten(0, 1), len(x))
    stats.add_gradients(gradients, x, dy)
    return Statistics({**inputs.sums, **gradients.sums}, len(x), inputs.positions, len(x))


def keep(method: methods.Method, weight: Tensor, statistics: Statistics, pattern: str) -> Tensor:
    return method.solve(weight, statistics, patterns.parse(pattern))[1]


def test_scores_are_their_formulas():
    weight = torch.tensor([[3.0, -1.0]])
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # two samples of one position
    dy = torch.tensor([[[1.0]], [[-1.0]]])  # so that g is (1, 2) and (-3, -4)
    found = statistics_of(weight, x, dy)
    norm = torch.tensor([[5.0, 10.0]]).sqrt()  # √((1 + 9) / 2), √((4 + 16) / 2)
    l1, l2 = torch.tensor([[4.0, 6.0]]), torch.tensor([[10.0, 20.0]]).sqrt()
    w = torch.tensor([[3.0, 1.0]])
    close = torch.testing.assert_close
    close(scores.magnitude(weight, found), w)
    close(scores.wanda(weight, found), w * norm)
    close(scores.gradient(weight, found, "l1"), w * l1)
    close(scores.gradient(weight, found, "l2"), w * l2)
    close(scores.gblm(weight, found), w * (norm + 100 * l1))
    close(scores.gradient(weight, found), w * l1)
    close(scores.pruner_zero(weight, found), scores.pruner_zero(weight, found, "l2"))
    close(scores.ria(weight, found), scores.ria(weight, found, 0.5))
    close(scores.wanda_plus(weight, found), scores.wanda_plus(weight, found, 100))
    close(scores.gblm(weight, found, alpha=2, norm="l2"), w * (norm + 2 * l2))


def test_ria_is_its_formula_cell_by_cell():
    weight, found = draw(3)
    weight[2], weight[:, 5] = 0, 0
    weights, squares = weight.tolist(), found["input_sq"].tolist()
    for power in (0.5, 1.0):
        score = scores.ria(weight, found, power)
        for i, row in enumerate(weights):
            for j, w in enumerate(row):
                of_row = sum(abs(other) for other in row)
                of_column = sum(abs(other[j]) for other in weights)
                relative = abs(w) / of_column + abs(w) / of_row if w else 0.0
                norm = math.sqrt(squares[j] / found.samples)
                assert score[i, j].item() == pytest.approx(relative * norm**power, rel=1e-12)


@pytest.mark.parametrize("norm", scores.NORMS)
def test_pruner_zero_is_its_formula_cell_by_cell(norm):
    weight, found = draw(4)
    rows = found["grad_abs"].tolist()
    if norm == "l2":
        rows = [[math.sqrt(cell) for cell in row] for row in found["grad_sq"].tolist()]
    low, high = min(map(min, rows)), max(map(max, rows))
    score = scores.pruner_zero(weight, found, norm)
    for i, row in enumerate(weight.tolist()):
        for j, w in enumerate(row):
            expected = abs(w * w) * (rows[i][j] - low) / (high - low)
            assert score[i, j].item() == pytest.approx(expected, rel=1e-12)


def test_wanda_plus_is_its_formula_cell_by_cell():
    weight, found = draw(6)
    score = scores.wanda_plus(weight, found, alpha=100)
    squares = found["input_sq"].tolist()
    for i, row in enumerate(found["grad_sq"].tolist()):
        for j, g in enumerate(row):
            norms = 100 * math.sqrt(g / found.differentiated) + math.sqrt(
                squares[j] / found.samples
            )
            expected = abs(weight[i, j].item()) * norms
            assert score[i, j].item() == pytest.approx(expected, rel=1e-12)


def test_wanda_plus_of_a_linear_that_no_gradient_reaches_is_wanda():
    weight, found = draw(6)
    sums = {**found.sums, "grad_sq": torch.zeros_like(weight)}
    none = Statistics(sums, found.samples, found.positions)
    torch.testing.assert_close(scores.wanda_plus(weight, none), scores.wanda(weight, found))


@pytest.mark.parametrize(("norm", "factor"), [("l1", 2), ("l2", 2**0.5)])
def test_gradients_of_half_of_the_samples_stand_for_all(norm, factor):
    _, found = draw(6)
    half = replace(found, samples=8, differentiated=4)
    whole = replace(found, samples=8, differentiated=8)
    norms = [scores.gradient_norm(own, norm) for own in (half, whole)]
    torch.testing.assert_close(norms[0], norms[1] * factor)


@pytest.mark.parametrize("samples", [1, 2])
def test_wanda_plus_divides_by_the_samples_of_the_gradients(samples):
    """Which are fewer than those of the inputs where a sample does not come to the linear."""
    weight, found = draw(6)
    few = Statistics(found.sums, found.samples, found.positions, samples)
    mean = (found["grad_sq"] / samples).sqrt()
    expected = weight.abs() * (100 * mean + scores.input_norm(found))
    torch.testing.assert_close(scores.wanda_plus(weight, few), expected)


def test_pruner_zero_with_equal_gradients_is_magnitude():
    weight, found = draw(5)
    flat = Statistics({"grad_sq": torch.full_like(weight, 3.0)}, found.samples)
    torch.testing.assert_close(scores.pruner_zero(weight, flat), weight.square())


@pytest.mark.parametrize("power", [-1, math.nan, math.inf])
def test_a_power_below_0_is_refused(power):
    with pytest.raises(GblmError, match="is no number of 0 or more"):
        methods.ria(power)


@few
@given(seed=seeds, scale=st.integers(-20, 20))
def test_ria_and_pruner_zero_know_no_scale(seed, scale):
    weight, found = draw(seed)
    other = Statistics({k: v * 4.0**scale for k, v in found.sums.items()}, found.samples)
    for pattern in PATTERNS:
        for method in (methods.ria(), methods.pruner_zero()):
            kept = keep(method, weight, found, pattern)
            assert torch.equal(keep(method, weight * 2.0**scale, other, pattern), kept)


def check_same_choice(one: methods.Method, other: methods.Method, seed: int, pattern: str) -> None:
    """Fail where two methods keep different weights."""
    weight, found = draw(seed)
    assert torch.equal(keep(one, weight, found, pattern), keep(other, weight, found, pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("norm", scores.NORMS)
@few
@given(seed=seeds)
def test_gblm_without_gradients_is_wanda(norm, pattern, seed):
    check_same_choice(methods.gblm(alpha=0, norm=norm), methods.wanda(), seed, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("norm", scores.NORMS)
@few
@given(seed=seeds)
def test_gblm_with_a_huge_alpha_is_gradient(norm, pattern, seed):
    check_same_choice(methods.gblm(1e12, norm), methods.gradient(norm), seed, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_checker_sees_an_alpha(pattern):
    with pytest.raises(AssertionError):
        check_same_choice(methods.gblm(alpha=1), methods.wanda(), 0, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@few
@given(seed=seeds, size=st.floats(0.1, 10))
def test_wanda_with_constant_inputs_is_magnitude(pattern, seed, size):
    weight, _ = draw(seed)
    x = torch.full((4, 3, IN), size, dtype=weight.dtype)
    found = statistics_of(weight, x, x[..., :OUT])
    kept = [keep(m, weight, found, pattern) for m in (methods.wanda(), methods.magnitude())]
    assert torch.equal(*kept)


def test_wanda_with_inputs_of_different_sizes_is_not_magnitude():
    with pytest.raises(AssertionError):
        check_same_choice(methods.wanda(), methods.magnitude(), 0, "0.5")


@pytest.mark.parametrize("pattern", PATTERNS)
@few
@given(seed=seeds, scale=st.integers(-20, 20))
def test_magnitude_wanda_and_gradient_know_no_scale_of_the_weight(pattern, seed, scale):
    weight, found = draw(seed)
    for method in (methods.magnitude(), methods.wanda(), methods.gradient(), methods.gblm()):
        kept = keep(method, weight, found, pattern)
        assert torch.equal(keep(method, weight * 2.0**scale, found, pattern), kept)
        assert torch.equal(keep(method, -weight, found, pattern), kept)


@few
@given(seed=seeds)
def test_the_input_norm_is_a_mean_over_samples_and_the_gradient_norm_a_sum(seed):
    weight, once = draw(seed)
    twice = once + once
    close = torch.testing.assert_close
    close(scores.wanda(weight, twice), scores.wanda(weight, once))
    close(scores.gradient(weight, twice, "l1"), 2 * scores.gradient(weight, once, "l1"))
    close(scores.gradient(weight, twice, "l2"), 2**0.5 * scores.gradient(weight, once, "l2"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_an_error(value):
    weight, found = draw(0)
    weight[2, 3] = value
    for method in map(
        methods.make, ("magnitude", "wanda", "gblm", "gradient", "ria", "pruner-zero")
    ):
        with pytest.raises(GblmError, match="the score holds a NaN or an Inf"):
            keep(method, weight, found, "0.5")


FORMULAS = {
    "magnitude": scores.magnitude,
    "gradient": scores.gradient,
    "wanda": scores.wanda,
    "gblm": scores.gblm,
    "gblm auto": lambda weight, found: scores.gblm(weight, found, alpha="auto"),
    "ria": scores.ria,
    "pruner-zero": scores.pruner_zero,
    "wanda++": scores.wanda_plus,
}


@pytest.mark.parametrize("name", FORMULAS)
@few
@given(seed=seeds, data=st.data())
def test_a_score_is_0_or_more_and_knows_no_order_of_rows_and_columns(name, seed, data):
    weight, found = draw(seed)
    weight[1, 2] = 0
    score = FORMULAS[name](weight, found)
    assert score.shape == weight.shape
    assert (score >= 0).all()
    assert score[1, 2] == 0
    rows = data.draw(st.permutations(range(OUT)))
    columns = data.draw(st.permutations(range(IN)))
    sums = {
        key: value[rows][:, columns]
        if value.shape == weight.shape
        else value[columns][:, columns]
        if value.ndim == 2
        else value[columns]
        if len(value) == IN
        else value
        for key, value in found.sums.items()
    }
    permuted = FORMULAS[name](
        weight[rows][:, columns],
        Statistics(sums, found.samples, found.positions, found.differentiated),
    )
    torch.testing.assert_close(permuted, score[rows][:, columns])


@pytest.mark.parametrize("norm", scores.NORMS)
@few
@given(seed=seeds, scale=st.integers(-20, 20))
def test_an_alpha_of_auto_gives_both_terms_one_median_whatever_the_loss(norm, seed, scale):
    weight, found = draw(seed)
    sums = {**found.sums, "input_sq": found["input_sq"] / 4**10}  # medians below 1, too
    found = Statistics(sums, found.samples)
    sums = dict(sums)
    sums["grad_abs"] = sums["grad_abs"] * 2.0**scale
    sums["grad_sq"] = sums["grad_sq"] * 4.0**scale
    other = Statistics(sums, found.samples)
    ones = torch.ones_like(weight)
    score = scores.gblm(ones, found, alpha="auto", norm=norm)
    torch.testing.assert_close(scores.gblm(ones, other, alpha="auto", norm=norm), score)
    inputs = scores.input_norm(found)
    term = score - inputs
    torch.testing.assert_close(term.median(), inputs.median())


def test_an_alpha_of_auto_takes_means_where_medians_are_0():
    """Most inputs, or most gradients, are 0; or all of them are."""
    weight, found = draw(0)
    dead = {**found.sums, "input_sq": found["input_sq"].clone()}
    dead["input_sq"][: IN // 2 + 1] = 0
    dead["grad_abs"] = found["grad_abs"].clone()
    dead["grad_abs"][: OUT // 2 + 1] = 0
    few = Statistics(dead, found.samples)
    inputs, gradients = scores.input_norm(few), few["grad_abs"]
    assert inputs.median() == gradients.median() == 0
    alpha = inputs.mean() / gradients.mean()
    expected = weight.abs() * (inputs + alpha * gradients)
    torch.testing.assert_close(scores.gblm(weight, few, alpha="auto"), expected)
    none = Statistics({**dead, "grad_abs": 0 * gradients}, found.samples)
    torch.testing.assert_close(scores.gblm(weight, none, alpha="auto"), weight.abs() * inputs)


def test_a_lifted_score_drops_to_exactly_0_and_compares_rows_unless_said():
    weight, found = draw(1)
    method = methods.masked("own", {"input_sq"}, scores.wanda)
    assert (method.name, method.needs, method.group) == ("own", {"input_sq"}, "row")
    new, keep = method.solve(weight, found, patterns.parse("0.5"))
    assert torch.equal(new, torch.where(keep, weight, 0))


def test_the_norms_are_of_statistics_and_no_other_is_known():
    assert set(scores.NORMS.values()) <= set(stats.GRADIENT)
    with pytest.raises(KeyError):
        scores.gradient_norm(draw(0)[1], "l3")


@few
@given(seed=seeds)
def test_the_terms_of_a_score_give_it(seed):
    weight, found = draw(seed)
    close = torch.testing.assert_close
    close(scores.Terms().times(weight), scores.magnitude(weight, found))
    close(scores.gradient_terms(found).times(weight), scores.gradient(weight, found))
    close(scores.gblm_terms(found).times(weight), scores.gblm(weight, found, 100, "l1"))
    doubled = scores.Terms(gradient=found["grad_abs"], alpha=2.0).times(weight)
    close(doubled, 2 * scores.gradient(weight, found))
