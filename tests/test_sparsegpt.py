"""SparseGPT equals the paper's algorithm written plainly, and beats pruning without repair."""

import pytest
import torch
from torch import Tensor

from gblm import methods
from gblm.base import GblmError, Pattern, Statistics
from gblm.maths import patterns, sparsegpt, stats

OUT, IN, SAMPLES = 6, 40, 30
PATTERNS = ["0.5", "0.3", "0.5/layer", "2:4", "4:8", "1:4"]


def draw(positions: int = 8, dead: list[int] | None = None) -> tuple[Tensor, Tensor, Statistics]:
    """Return a weight, correlated inputs `[positions, in]` and their statistics, in float64."""
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=made, dtype=torch.float64)
    mix = torch.randn(IN, IN, generator=made, dtype=torch.float64) / IN**0.5
    x = torch.randn(SAMPLES * positions, IN, generator=made, dtype=torch.float64)
    x = (
        x
        @ (mix + 0.5 * torch.eye(IN, dtype=x.dtype))
        * torch.rand(IN, generator=made, dtype=torch.float64)
    )
    x[:, dead or []] = 0
    statistics = stats.zeros({"input_gram"}, weight)
    stats.add_inputs(statistics, x, SAMPLES)
    return weight, x, statistics


def plain(
    weight: Tensor, x: Tensor, pattern: Pattern, columns: int, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (weight, keep) by the paper's algorithm 1, with no Cholesky and no lazy updates.

    For each column the inverse of what is left of H is computed anew; removing a weight w of it
    costs w² / [H⁻¹]₀₀ and moves the weights after it by −w / [H⁻¹]₀₀ · [H⁻¹]₀ (optimal brain
    surgeon). The mask is chosen when its window begins, with the weights as they are then, if none
    is given.
    """
    weight = weight.clone()
    keep = torch.ones_like(weight, dtype=torch.bool) if given is None else given
    hessian = 2 * x.T @ x / SAMPLES
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    hessian += torch.diag(dead.double())
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(IN, dtype=x.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(IN)]
    window = pattern.window or columns
    for j in range(IN):
        if given is None and j % window == 0:
            chosen = range(j, min(j + window, IN))
            cost = torch.stack([weight[:, c] ** 2 / inverses[c][0, 0] for c in chosen], dim=1)
            keep[:, list(chosen)] = pattern.keep(cost)
        for row in range(OUT):
            if not keep[row, j]:
                move = weight[row, j] / inverses[j][0, 0] * inverses[j][0]
                weight[row, j:] -= move
                weight[row, j] = 0
    return weight, keep


def check_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Fail where weights or masks differ."""
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("columns", [8, 16, 128])  # 16 leaves a shorter last block
@pytest.mark.parametrize("name", PATTERNS)
def test_equals_the_paper(name, columns):
    weight, x, statistics = draw()
    pattern = patterns.parse(name)
    found = sparsegpt.solve(weight, statistics, pattern, columns=columns)
    check_equal(found, plain(weight, x, pattern, columns))


@pytest.mark.parametrize("name", ["3:5", "1:10"])
def test_equals_the_paper_where_m_does_not_divide_the_column_blocks(name):
    weight, x, statistics = draw()
    pattern = patterns.parse(name)
    found = sparsegpt.solve(weight, statistics, pattern, columns=16)
    check_equal(found, plain(weight, x, pattern, IN))


@pytest.mark.parametrize("name", PATTERNS)
def test_makes_up_for_a_mask_that_is_given(name):
    weight, x, statistics = draw()
    pattern = patterns.parse(name)
    given = pattern.keep(weight.square())
    found = sparsegpt.solve(weight, statistics, pattern, given, columns=16)
    assert not torch.equal(sparsegpt.solve(weight, statistics, pattern)[1], given)
    check_equal(found, plain(weight, x, pattern, 16, given))


def test_a_mask_is_chosen_for_128_columns_at_a_time():
    made = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 200, generator=made, dtype=torch.float64) for n in (OUT, 300))
    statistics, pattern = stats.zeros({"input_gram"}, weight), patterns.parse("0.5")
    stats.add_inputs(statistics, x, 300)
    _, keep = sparsegpt.solve(weight, statistics, pattern)
    assert (keep[:, :128].sum(dim=1) == 64).all()


@pytest.mark.parametrize("name", ["0.5", "2:4"])
def test_the_checker_sees_a_missing_repair(name):
    weight, x, statistics = draw()
    pattern = patterns.parse(name)
    _, keep = sparsegpt.solve(weight, statistics, pattern, columns=16)
    with pytest.raises(AssertionError):
        check_equal((weight * keep, keep), plain(weight, x, pattern, 16))


@pytest.mark.parametrize("name", ["2:4", "4:8"])
def test_column_blocks_only_save_time_where_the_pattern_has_its_own_window(name):
    weight, _, statistics = draw()
    pattern = patterns.parse(name)
    check_equal(
        sparsegpt.solve(weight, statistics, pattern, columns=8),
        sparsegpt.solve(weight, statistics, pattern, columns=IN),
    )


@pytest.mark.parametrize("other", ["magnitude", "wanda"])
@pytest.mark.parametrize("name", PATTERNS)
def test_beats_pruning_without_repair_on_correlated_inputs(name, other):
    weight, x, statistics = draw()
    statistics.sums["input_sq"] = statistics["input_gram"].diagonal()
    pattern = patterns.parse(name)

    def off(method: str) -> float:
        new, _ = methods.make(method).solve(weight, statistics, pattern)
        return torch.linalg.norm(x @ (weight - new).T).item()

    assert off("sparsegpt") < 0.9 * off(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dead", [[0], [4, 5, 6, 7], list(range(0, IN, 2)), list(range(IN))])
def test_dead_inputs_lose_their_weights_and_disturb_nothing(name, dead, dtype):
    weight, x, statistics = draw(dead=dead)
    pattern = patterns.parse(name)
    narrow = Statistics({"input_gram": statistics["input_gram"].to(dtype)}, SAMPLES)
    new, keep = sparsegpt.solve(weight.to(dtype), narrow, pattern)
    assert torch.isfinite(new).all()
    assert not new[:, dead].any()
    if dtype == torch.float64:
        check_equal((new, keep), plain(weight, x, pattern, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PATTERNS)
def test_fewer_inputs_than_columns(name, dtype):
    """A gram of rank 1 to 30 of 40: the damping alone makes it invertible."""
    weight, x, _ = draw(positions=1)
    for rank in (1, 5, SAMPLES):
        statistics = stats.zeros({"input_gram"}, weight.to(dtype))
        stats.add_inputs(statistics, x[:rank].to(dtype), rank)
        assert torch.linalg.matrix_rank(statistics["input_gram"].double(), rtol=1e-5) == rank
        new, keep = sparsegpt.solve(weight.to(dtype), statistics, patterns.parse(name))
        assert torch.isfinite(new).all()
        assert not new[~keep].any()
        assert torch.equal(keep.sum(), patterns.parse(name).keep(weight).sum())


def test_what_cannot_be_factored_is_an_error():
    gram = torch.eye(4)
    gram[0, 1] = gram[1, 0] = 2  # no sum of squares
    with pytest.raises(GblmError, match="too badly conditioned"):
        sparsegpt.solve(torch.ones(2, 4), Statistics({"input_gram": gram}, 1), patterns.nm(2, 4))


def test_a_weight_that_is_not_finite_is_an_error():
    weight, _, statistics = draw()
    weight[2, 3] = torch.nan
    with pytest.raises(GblmError, match="the score holds a NaN or an Inf"):
        sparsegpt.solve(weight, statistics, patterns.nm(2, 4))
