"""Every kernel equals its reference; they run by Triton's interpreter where there is no GPU."""

import pytest
import torch

import gblm
from gblm import kernels, methods
from gblm.kernels import gradient_sums, input_gram, nm_keep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 17, 40, 24), (1, 64, 64, 128), (2, 5, 130, 70)]  # samples, positions, in, out


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


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
    assert torch.equal(found, found.T)


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


@pytest.mark.parametrize("name", ["gblm", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
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
