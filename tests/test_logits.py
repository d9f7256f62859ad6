"""Losses of logits: torch's own and their gradients, with few logits in fp32 at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from gblm.llm.loss import window_loss
from gblm.maths import logits as maths

dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
sizes = st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 9))
chunks = st.sampled_from([1, 20, 2**18])


def drawn(size: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator) -> Tensor:
    return (4 * torch.randn(size, generator=draw)).to(dtype).requires_grad_()


def wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def same(made, wanted: Tensor, logits: Tensor, chunk: int) -> Tensor:
    """Fail unless both have the same values and gradients; return those."""
    weights = torch.linspace(1, 2, wanted.numel()).view_as(wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maths, "CHUNK", chunk)
        found = made()
        (own,) = torch.autograd.grad((found * weights).sum(), logits)
    (other,) = torch.autograd.grad((wanted * weights).sum(), logits)
    torch.testing.assert_close(found, wanted)
    assert own.dtype == logits.dtype
    torch.testing.assert_close(own, other)
    return own


@given(sizes, dtypes, chunks, st.integers(0, 99))
def test_the_loss_of_a_window_is_the_mean_of_those_of_torch(size, dtype, chunk, seed):
    draw = torch.Generator().manual_seed(seed)
    logits, (samples, length, classes) = drawn(size, dtype, draw), size
    labels = torch.randint(classes, (samples, length), generator=draw)
    labels[:, 2:] = labels[:, 2:].where(torch.rand(samples, length - 2, generator=draw) < 0.7, -100)
    pairs = zip(wide(logits), labels, strict=True)
    wanted = torch.stack([cross_entropy(own[:-1], label[1:]) for own, label in pairs])
    slope = same(lambda: window_loss(logits, labels), wanted, logits, chunk)
    assert not slope[:, -1].any()


@given(sizes, dtypes, chunks, st.integers(0, 99))
def test_the_divergence_is_that_of_torch(size, dtype, chunk, seed):
    draw = torch.Generator().manual_seed(seed)
    logits, dense = drawn(size, dtype, draw), drawn(size, dtype, draw).detach()
    ours, theirs = (wide(x).log_softmax(dim=-1) for x in (logits, dense))
    wanted = kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)
    same(lambda: maths.divergence(logits, dense), wanted, logits, chunk)
    assert maths.divergence(dense, dense).abs().max() < 1e-6


def test_extreme_logits_are_no_overflow():
    logits = torch.tensor([[[1e4, -1e4, -torch.inf], [0.0, 0.0, 0.0]]], requires_grad=True)
    found = window_loss(logits, torch.tensor([[0, 1]]))
    assert found.item() == pytest.approx(2e4)
    found.sum().backward()
    assert logits.grad[0, 0].tolist() == [1, -1, 0]
