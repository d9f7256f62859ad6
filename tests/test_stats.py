"""The laws of every statistic: sums, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gblm.base import Statistics
from gblm.maths import stats

OUT, IN, POSITIONS = 5, 6, 4
ALL = [*stats.INPUT, *stats.GRADIENT]
few = settings(max_examples=25)


def draw(seed: int, samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return inputs `[samples, positions, in]` and output gradients `[samples, positions, out]`."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, POSITIONS, IN, dtype=torch.float64, generator=made)
    dy = torch.randn(samples, POSITIONS, OUT, dtype=torch.float64, generator=made)
    return x.to(dtype), dy.to(dtype)


def of(name: str, x: Tensor, dy: Tensor) -> Statistics:
    """Return one statistic of some samples."""
    found = stats.zeros([name], torch.empty(OUT, IN, dtype=x.dtype), POSITIONS)
    if name in stats.INPUT:
        stats.add_inputs(found, x.flatten(0, 1), len(x))
    else:
        stats.add_gradients(found, x, dy)
    return found


def check_additive(name: str, of, x: Tensor, dy: Tensor, cut: int) -> None:
    """Fail unless stats(a ++ b) = stats(a) + stats(b), counts too."""
    whole = of(name, x, dy)
    parts = of(name, x[:cut], dy[:cut]) + of(name, x[cut:], dy[cut:])
    torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)
    assert counts(parts) == counts(whole)
    assert counts(whole) == (len(x), len(x) * POSITIONS, len(x) * (name in stats.GRADIENT))


def counts(statistics: Statistics) -> tuple[int, int, int]:
    return statistics.samples, statistics.positions, statistics.differentiated


@pytest.mark.parametrize("name", ALL)
@few
@given(seed=st.integers(0, 2**31), samples=st.integers(1, 6), cut=st.integers(0, 6))
def test_statistics_of_two_sets_add_up(name, seed, samples, cut):
    check_additive(name, of, *draw(seed, samples), cut)


@pytest.mark.parametrize("name", ALL)
def test_the_checker_sees_a_mean(name):
    def mean(name: str, x: Tensor, dy: Tensor) -> Statistics:
        found = of(name, x, dy)
        return Statistics({name: found[name] / len(x)}, found.samples, found.positions)

    with pytest.raises(AssertionError):
        check_additive(name, mean, *draw(0, 4), 2)


@pytest.mark.parametrize("name", ALL)
def test_no_samples_are_zero(name):
    found = stats.zeros([name], torch.empty(OUT, IN))
    assert not found[name].any()
    assert counts(found) == (0, 0, 0)


FORMULAS = {
    "input_sq": lambda x, gradients, dy: sum(row * row for row in x.flatten(0, 1)),
    "input_gram": lambda x, gradients, dy: sum(torch.outer(row, row) for row in x.flatten(0, 1)),
    "cross_gram": lambda x, gradients, dy: sum(torch.outer(row, row) for row in x.flatten(0, 1)),
    "grad_abs": lambda x, gradients, dy: sum(g.abs() for g in gradients),
    "grad_sq": lambda x, gradients, dy: sum(g * g for g in gradients),
    "grad_position": lambda x, gradients, dy: sum((one * one).sum(1) for one in dy),
}


@pytest.mark.parametrize("name", ALL)
def test_a_statistic_is_its_formula(name):
    x, dy = draw(0, 3)
    gradients = [sample_dy.T @ sample_x for sample_x, sample_dy in zip(x, dy, strict=True)]
    torch.testing.assert_close(of(name, x, dy)[name], FORMULAS[name](x, gradients, dy))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_fp32_whatever_the_inputs_are(name, dtype):
    x, dy = draw(0, 64, dtype)
    found = of(name, x, dy)[name]
    assert found.dtype == torch.float32
    # Summed in the inputs' own dtype they would be off by far more. The gradient of one sample is
    # rounded to bfloat16, as autograd's is.
    rounded = dtype == torch.bfloat16 and name in ("grad_abs", "grad_sq")
    torch.testing.assert_close(
        found.double(),
        of(name, x.double(), dy.double())[name],
        rtol=2**-8 if rounded else 1e-4,
        atol=1e-4,
    )


def test_half_precision_inputs_do_not_overflow():
    x = torch.full((1, POSITIONS, IN), 6e4, dtype=torch.float16)
    assert torch.isfinite(of("input_sq", x, x[..., :OUT])["input_sq"]).all()


def test_linears_of_one_input_need_no_output():
    found = stats.zeros(stats.INPUT, torch.empty(OUT, IN))
    assert {name: tuple(value.shape) for name, value in found.sums.items()} == {
        "input_sq": (IN,),
        "input_gram": (IN, IN),
        "cross_gram": (IN, IN),
    }


def test_what_the_dense_model_has_stands_beside_the_inputs():
    x, _ = draw(0, 3)
    dense, _ = draw(1, 3)
    x, dense = x.flatten(0, 1), dense.flatten(0, 1)
    found = stats.zeros(stats.INPUT, torch.empty(OUT, IN, dtype=x.dtype))
    stats.add_inputs(found, x, 3, dense)
    torch.testing.assert_close(found["cross_gram"], dense.T @ x)


def test_position_weights_have_mean_one_and_follow_the_gradients():
    x, dy = draw(0, 3)
    dy[:, 1:] /= 10
    weights = stats.position_weights([of("grad_position", x, dy)], focus=0.5)
    assert weights.mean().item() == pytest.approx(1)
    assert weights[0] > 2
    assert (weights >= 0.5).all()
    torch.testing.assert_close(
        stats.position_weights([of("grad_position", x, dy)], focus=0), torch.ones(4).double()
    )
    assert stats.position_weights([of("grad_position", x, 0 * dy)], focus=0.5) is None
    found = stats.zeros(["input_gram"], torch.empty(OUT, IN, dtype=x.dtype))
    stats.add_inputs(found, x.flatten(0, 1), 3, weights=weights)
    expected = torch.einsum("spi,spj,p->ij", x, x, weights)
    torch.testing.assert_close(found["input_gram"], expected)


@few
@given(seed=st.integers(0, 2**31), samples=st.integers(1, 6), data=st.data())
def test_sums_know_no_order_of_the_samples(seed, samples, data):
    x, dy = draw(seed, samples)
    order = data.draw(st.permutations(range(samples)))
    for name in ALL:
        torch.testing.assert_close(of(name, x[order], dy[order])[name], of(name, x, dy)[name])


@few
@given(seed=st.integers(0, 2**31), samples=st.integers(1, 6))
def test_what_sums_of_squares_and_of_sizes_are_to_each_other(seed, samples):
    x, dy = draw(seed, samples)
    found = {name: of(name, x, dy)[name] for name in ALL}
    gram = found["input_gram"]
    torch.testing.assert_close(gram, gram.T)
    assert torch.linalg.eigvalsh(gram)[0] > -1e-9
    torch.testing.assert_close(gram.diagonal(), found["input_sq"])
    torch.testing.assert_close(found["cross_gram"], gram)  # where the dense inputs are the same
    # (Σ|g|)² / samples ≤ Σ g² ≤ (Σ|g|)²
    size, square = found["grad_abs"].square(), found["grad_sq"]
    assert (square <= size * (1 + 1e-9)).all()
    assert (size <= samples * square * (1 + 1e-9)).all()


@pytest.mark.parametrize(("inputs", "most"), [(160, 1e-6), (stats.WIDE, 2**-9)])
def test_wide_products_beside_a_dense_stream_are_rounded_once_for_a_micro_batch(inputs, most):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2048, inputs, generator=draw).bfloat16()
    dense = (x + 0.1 * torch.randn(x.shape, generator=draw)).bfloat16()
    found = stats.zeros(["input_gram", "cross_gram"], torch.empty(1, inputs))
    for part, other in zip(x.split(512), dense.split(512), strict=True):
        stats.add_inputs(found, part, 1, other)
    for name, left in {"input_gram": x, "cross_gram": dense}.items():
        exact = left.double().T @ x.double()
        off = torch.linalg.norm(found[name].double() - exact) / torch.linalg.norm(exact)
        assert most / 100 < off < most
    torch.testing.assert_close(found["input_gram"], found["input_gram"].T, rtol=0, atol=0)


@pytest.mark.parametrize("inputs", [6, 128, 200, 1100])
def test_a_gram_matrix_is_the_same_in_strips(inputs):
    x = torch.randn(50, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = stats.zeros(["input_gram"], torch.empty(1, inputs, dtype=torch.float64))
    for part in x.split(20):
        stats.add_inputs(found, part, 1)
    torch.testing.assert_close(found["input_gram"], x.T @ x)
    torch.testing.assert_close(found["input_gram"], found["input_gram"].T)


@few
@given(seed=st.integers(0, 2**31), focus=st.floats(0, 1), power=st.integers(-30, 30))
def test_weights_of_positions_have_mean_one_whatever_the_focus_and_the_loss(seed, focus, power):
    gradients = [of("grad_position", *draw(seed + i, 2)) for i in range(2)]
    weights = stats.position_weights(gradients, focus)
    louder = [Statistics({"grad_position": g["grad_position"] * 2.0**power}, 2) for g in gradients]
    assert torch.equal(stats.position_weights(louder, focus), weights)
    assert weights.mean().item() == pytest.approx(1)
    assert (weights >= 1 - focus - 1e-9).all()
    total = gradients[0]["grad_position"] + gradients[1]["grad_position"]
    assert torch.equal(weights.argsort(stable=True), total.argsort(stable=True)) or focus < 1e-6


@pytest.mark.parametrize("name", stats.GRADIENT)
def test_a_factor_on_the_loss_can_be_taken_out_of_the_sums(name):
    x, dy = draw(0, 3)
    found = of(name, x, 8 * dy)
    stats.unscale(found, 8)
    torch.testing.assert_close(found[name], of(name, x, dy)[name])


def test_samples_and_gradients_come_in_pairs():
    x, dy = draw(0, 3)
    with pytest.raises(ValueError, match="shorter"):
        stats.add_gradients(stats.zeros(["grad_sq"], torch.empty(OUT, IN)), x, dy[:2])


def test_a_sample_with_fewer_positions_adds_to_the_first_and_one_with_more_to_none():
    x, dy = draw(0, 3)
    found = stats.zeros(["grad_position"], torch.empty(OUT, IN, dtype=x.dtype), POSITIONS + 1)
    stats.add_gradients(found, x, dy)
    torch.testing.assert_close(found["grad_position"][:POSITIONS], dy.square().sum(dim=(0, 2)))
    assert found["grad_position"][POSITIONS] == 0
    fewer = stats.zeros(["grad_position"], torch.empty(OUT, IN, dtype=x.dtype), POSITIONS - 1)
    stats.add_gradients(fewer, x, dy)
    assert not fewer["grad_position"].any()
    none = stats.zeros(["grad_position"], torch.empty(OUT, IN, dtype=x.dtype))
    assert none["grad_position"].shape == (0,)


def test_weights_of_positions_count_for_the_dense_inputs_too_and_for_no_gradient():
    x, _ = draw(0, 3)
    dense, _ = draw(1, 3)
    weights = torch.tensor([0.5, 1.5, 0.25, 1.75], dtype=x.dtype)
    names = ["cross_gram", "input_sq", "grad_abs"]
    found = stats.zeros(names, torch.empty(OUT, IN, dtype=x.dtype))
    stats.add_inputs(found, x.flatten(0, 1), 3, dense.flatten(0, 1), weights)
    expected = torch.einsum("spi,spj,p->ij", dense, x, weights)
    torch.testing.assert_close(found["cross_gram"], expected)
    torch.testing.assert_close(found["input_sq"], torch.einsum("spi,spi,p->i", x, x, weights))
    assert not found["grad_abs"].any()
    alone = stats.zeros(names, torch.empty(OUT, IN, dtype=x.dtype))
    stats.add_inputs(alone, x.flatten(0, 1), 3, weights=weights)
    torch.testing.assert_close(alone["cross_gram"], torch.einsum("spi,spj,p->ij", x, x, weights))


@pytest.mark.parametrize("samples", [1, 3])
def test_fewer_positions_take_the_first_weights_and_more_take_none(samples):
    x, _ = draw(0, samples)
    for number in (POSITIONS - 1, POSITIONS, POSITIONS + 1):
        weights = torch.arange(1, number + 1, dtype=x.dtype)
        found = stats.zeros(["input_sq"], torch.empty(OUT, IN, dtype=x.dtype))
        stats.add_inputs(found, x.flatten(0, 1), samples, weights=weights)
        taken = weights[:POSITIONS] if number >= POSITIONS else torch.ones(POSITIONS).to(x)
        expected = torch.einsum("spi,spi,p->i", x, x, taken)
        torch.testing.assert_close(found["input_sq"], expected)


def test_positions_that_no_sample_has_in_full_have_no_weights():
    """As those of an expert, which sees the positions it is sent."""
    x, _ = draw(0, 3)
    some = x.flatten(0, 1)[:7]
    found = stats.zeros(["input_sq"], torch.empty(OUT, IN, dtype=x.dtype))
    stats.add_inputs(found, some, 3, weights=torch.full((POSITIONS,), 7.0))
    torch.testing.assert_close(found["input_sq"], some.square().sum(dim=0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_nan_or_inf_is_found_anywhere(dtype, value):
    for size in (1, 2, 33, 1000):
        for place in {0, size // 2, size - 1}:
            x = torch.randn(size, dtype=dtype)
            assert stats.is_finite(x)
            x[place] = value
            assert not stats.is_finite(x)
            assert not stats.is_finite(torch.complex(x.float(), x.float()))
    assert stats.is_finite(torch.empty(0, dtype=dtype))
