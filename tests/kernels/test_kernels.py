"""Every kernel equals its reference; they run by Triton's interpreter where there is no GPU."""

from types import ModuleType

import pytest
import torch

import gblm
from gblm import kernels, methods
from gblm.kernels import gradient_sums, input_gram, nm_keep, row_keep, score_mask
from gblm.maths import patterns, stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 17, 40, 24), (1, 64, 64, 128), (2, 5, 130, 70)]  # samples, positions, in, out


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def recorded(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[str]:
    """Return a list that will hold the name of every kernel of these modules that is run."""
    calls: list[str] = []
    for module in modules:
        name = module.__name__.rpartition(".")[2]
        kernel = getattr(module, name)

        def run(*args, name=name, kernel=kernel):
            calls.append(name)
            return kernel(*args)

        monkeypatch.setattr(module, name, run)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradient_sums(shape, dtype, wanted):
    samples, positions, inputs, outputs = shape
    x = draw(samples, positions, inputs, dtype=dtype)
    dy = draw(samples, positions, outputs, dtype=dtype, seed=1)
    sums = [[draw(outputs, inputs, seed=2 + i) if w else None for i, w in enumerate(wanted)]]
    sums.append([None if total is None else total.clone() for total in sums[0]])
    gradient_sums.gradient_sums(x, dy, *sums[0])
    gradient_sums.reference(x, dy, *sums[1])
    for found, expected in zip(*sums, strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("positions", "inputs"), [(5, 24), (70, 64), (33, 200), (64, 321)])
def test_input_gram(positions, inputs, dtype):
    x = draw(positions, inputs, dtype=dtype)
    found = draw(inputs, inputs, seed=1)
    found = found + found.T
    expected = found.clone()
    input_gram.input_gram(found, x)
    input_gram.reference(expected, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, found.T, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 5), (15, 16)])
@pytest.mark.parametrize("ties", [False, True])
def test_nm_keep(n, m, ties):
    score = draw(37, 7 * m)
    score = score.round() if ties else score
    found = nm_keep.nm_keep(score, n, m)
    assert torch.equal(found, nm_keep.reference(score, n, m))
    assert (found.reshape(-1, m).sum(dim=1) == n).all()


def test_the_comparison_sees_a_planted_fault():
    x = draw(64, 40)
    found = torch.zeros(40, 40, device=DEVICE)
    input_gram.input_gram(found, x[:-1])
    expected = torch.zeros(40, 40, device=DEVICE)
    input_gram.reference(expected, x)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_kernels_are_for_gpus_and_at_most_32_bits():
    assert not kernels.usable(torch.ones(1))
    if torch.cuda.is_available():
        assert kernels.usable(torch.ones(1).cuda(), torch.ones(1).cuda().bfloat16())
        assert not kernels.usable(torch.ones(1).cuda().double())


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gblm", "2:4"),
        ("sparsegpt", "0.5"),
        pytest.param("gblm", "0.5", marks=pytest.mark.slow),
        *(pytest.param("wanda", pattern, marks=pytest.mark.slow) for pattern in ("2:4", "0.5")),
        pytest.param("sparsegpt", "2:4", marks=pytest.mark.slow),
    ],
)
def test_models_are_pruned_alike_with_and_without(make_llama, batch, name, pattern, monkeypatch):
    plain, quick = make_llama(), make_llama()
    gblm.prune(plain, batch, methods.make(name), pattern)
    calls = []

    def usable(*tensors):
        calls.append(1)
        return True

    monkeypatch.setattr(kernels, "usable", usable)
    monkeypatch.setattr(kernels, "HALVES", (torch.float32,))
    gblm.prune(quick, batch, methods.make(name), pattern)
    assert calls
    for key, value in plain.state_dict().items():
        other = quick.state_dict()[key]
        assert ((value == 0) == (other == 0)).float().mean() >= 0.999
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (15, 16)])
@pytest.mark.parametrize("parts", ["inputs", "gradient", "both", "neither"])
@pytest.mark.parametrize("ties", [False, True])
def test_score_mask(n, m, parts, ties):
    weight, inputs = draw(37, 7 * m), draw(7 * m, seed=1).abs()
    gradient = draw(37, 7 * m, seed=2).abs()
    if ties:  # and exact in fp32, whatever the order of the operations
        weight, inputs, gradient = weight.round(), inputs.round(), gradient.round()
    terms = (
        inputs if parts in ("inputs", "both") else None,
        gradient if parts in ("gradient", "both") else None,
    )
    found = score_mask.score_mask(weight, *terms, 4.0, n, m)
    expected = score_mask.reference(weight, *terms, 4.0, n, m)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (found[1].reshape(-1, m).sum(dim=1) == n).all()
    assert found[2]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_score_mask_sees_what_is_not_finite(wrong):
    weight, inputs = draw(600, 8), draw(8, seed=1).abs()
    weight[599, 7] = wrong
    assert not score_mask.score_mask(weight, inputs, None, 1.0, 2, 4)[2]


@pytest.mark.parametrize(
    ("rows", "size", "kept"), [(5, 100, 37), (3, 5000, 2500), (2, 4096, 1), (2, 9001, 9000)]
)
@pytest.mark.parametrize("kind", ["random", "ties", "zeros of both signs", "infinite"])
def test_row_keep(rows, size, kept, kind):
    score = draw(rows, size)
    if kind == "ties":
        score = score.round()
    elif kind == "zeros of both signs":
        score = torch.zeros_like(score).copysign(score)
    elif kind == "infinite":
        score[:, ::3] = torch.inf
    found = row_keep.row_keep(score, kept)
    assert torch.equal(found, row_keep.reference(score, kept))
    assert (found.sum(dim=1) == kept).all()


@pytest.mark.parametrize(
    ("pattern", "dtype", "taken"),
    [
        ("2:4", torch.float32, ["nm_keep"]),
        ("20:32", torch.float32, ["nm_keep"]),
        ("20:64", torch.float32, ["row_keep"]),
        ("0.5", torch.float32, ["row_keep"]),
        ("0.9", torch.float32, ["row_keep"]),
        ("0.5", torch.float64, []),
        ("0.5/layer", torch.float32, []),
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_patterns_choose_alike_with_and_without(pattern, dtype, taken, ties, monkeypatch):
    score = draw(6, 64, dtype=dtype)
    score = score.round() if ties else score
    calls = recorded(monkeypatch, nm_keep, row_keep)
    monkeypatch.setattr(patterns, "KERNEL_ROWS", 6)
    keep = patterns.parse(pattern).keep
    monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    expected = keep(score)
    assert not calls
    monkeypatch.setattr(kernels, "usable", lambda *tensors: True)
    assert torch.equal(keep(score), expected)
    assert calls == taken


@pytest.mark.parametrize(
    ("names", "x", "dy", "taken"),
    [
        ({"input_gram"}, torch.bfloat16, None, True),
        ({"input_gram"}, torch.float32, None, False),
        ({"grad_abs", "grad_sq"}, torch.bfloat16, torch.bfloat16, True),
        ({"grad_abs"}, torch.float16, torch.float16, True),
        ({"grad_sq"}, torch.float16, torch.float16, True),
        ({"grad_sq", "grad_position"}, torch.float16, torch.float16, False),
        ({"grad_sq"}, torch.bfloat16, torch.float16, False),
        ({"grad_sq"}, torch.float32, torch.float32, False),
    ],
)
def test_statistics_are_summed_alike_with_and_without(names, x, dy, taken, monkeypatch):
    inputs = draw(3, 5, 24, dtype=x)

    def summed() -> gblm.Statistics:
        found = stats.zeros(names, draw(16, 24), positions=5)
        if dy:
            stats.add_gradients(found, inputs, draw(3, 5, 16, dtype=dy, seed=1))
        else:
            stats.add_inputs(found, inputs.flatten(0, 1), 3)
        return found

    expected, calls = summed(), recorded(monkeypatch, input_gram, gradient_sums)
    monkeypatch.setattr(kernels, "usable", lambda *tensors: True)
    found = summed()
    assert len(calls) == taken
    assert (found.samples, found.positions) == (expected.samples, expected.positions)
    rtol = 2**-7 if dy == torch.bfloat16 else 1e-4  # one rounds the gradient of a sample to dY's
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("name", ["wanda", "gblm", "gradient"])
def test_methods_fuse_score_and_mask(name, monkeypatch):
    method, pattern = methods.make(name), patterns.parse("2:4")
    weight = draw(16, 32)
    sums = {"input_sq": draw(32, seed=1).square(), "grad_abs": draw(16, 32, seed=2).abs()}
    statistics = gblm.Statistics(sums, samples=4, positions=9)
    expected = method.solve(weight, statistics, pattern)
    calls = recorded(monkeypatch, score_mask)
    monkeypatch.setattr(kernels, "usable", lambda *tensors: True)
    found = method.solve(weight, statistics, pattern)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(calls) == 1
    sums["input_sq"][3] = torch.inf
    sums["grad_abs"][3, 3] = torch.inf
    with pytest.raises(gblm.GblmError, match="the score holds a NaN or an Inf"):
        method.solve(weight, statistics, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("pattern", "taken"),
    [("2:4", True), ("20:32", True), ("20:64", False), ("3:5", False), ("0.5", False)],
)
def test_score_and_mask_are_one_for_windows_of_a_power_of_2(pattern, taken, dtype, monkeypatch):
    allowed, calls = patterns.parse(pattern), recorded(monkeypatch, score_mask)
    weight = draw(4, allowed.window or 8, dtype=dtype)
    statistics = gblm.Statistics({"input_sq": draw(weight.shape[1]).square()}, samples=1)
    monkeypatch.setattr(kernels, "usable", lambda *tensors: True)
    _, keep = methods.wanda().solve(weight, statistics, allowed)
    assert len(calls) == (taken and dtype == torch.float32)
    monkeypatch.undo()
    assert torch.equal(keep, methods.wanda().solve(weight, statistics, allowed)[1])
