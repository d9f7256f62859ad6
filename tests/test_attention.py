"""Attention in plain products: the same as torch's, and torch's wherever it is not meant."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gblm.machine import attention
from gblm.machine.attention import HalfProducts


def drawn(
    heads: int, shared: int, length: int, others: int, samples: int = 3
) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(heads + length)
    shapes = [(heads, length), (heads // shared, others), (heads // shared, others)]
    return [
        torch.randn(samples, n, size, 8, generator=draw, dtype=torch.bfloat16).requires_grad_()
        for n, size in shapes
    ]


def results(inputs: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
    """What attention gives, and its gradients by query, key and value."""
    output = F.scaled_dot_product_attention(*inputs, **options)
    gradient = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    return [output, *torch.autograd.grad(output, inputs, gradient)]


@given(
    st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3)]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.booleans(),
    st.sampled_from([None, 0.1, 1.0]),
    st.sampled_from([1, 400, 1 << 21]),
)
def test_it_is_the_attention_of_torch(heads, length, others, causal, scale, scores):
    inputs = drawn(*heads, length, others)
    options = {"is_causal": causal, "scale": scale, "enable_gqa": heads[1] > 1}
    wanted = results([x.double().detach().requires_grad_() for x in inputs], **options)
    with pytest.MonkeyPatch.context() as patch, HalfProducts():
        patch.setattr(attention, "SCORES", scores)
        patch.setattr(attention, "ROWS", 3)
        found = results(inputs, **options)
        with torch.no_grad():
            found.append(F.scaled_dot_product_attention(*inputs, **options))
    wanted = [x.detach() for x in (*wanted, wanted[0])]
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == torch.bfloat16
        bound = 0.05 * other.abs().max().item() + 1e-3
        torch.testing.assert_close(own.double(), other, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("left", "plain"),
    [
        ({}, True),
        ({"is_causal": True}, True),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, False),
        ({"dropout_p": 0.5}, False),
    ],
)
def test_a_mask_and_dropout_are_left_to_torch(left, plain, monkeypatch):
    inputs = drawn(2, 1, 5, 5)
    assert (attention._Attention(*inputs, **left).plain() is not None) == plain
    assert attention._Attention(*(x.float() for x in inputs), **left).plain() is None
    monkeypatch.setattr(attention, "SCORES", 5 * 5 - 1)
    assert attention._Attention(*inputs, **left).plain() is None


@pytest.mark.parametrize(
    ("dtype", "within"), product([torch.float32, torch.bfloat16], [True, False])
)
def test_autocast_decides_the_dtype(dtype, within):
    inputs = [x.to(dtype).detach() for x in drawn(2, 1, 5, 5)]
    with torch.autocast("cpu", torch.bfloat16, enabled=within):
        found = attention._Attention(*inputs).plain()
    assert (found is not None) == (within or dtype == torch.bfloat16)
    if found is not None:
        assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_in_a_wider_dtype_fills_narrow_scores(dtype):
    scores, mask = torch.zeros(2, 2, dtype=dtype), torch.tensor([[True, False], [False, False]])
    with HalfProducts():
        least = scores.masked_fill(mask, torch.finfo(torch.float32).min)
        none = scores.masked_fill(mask, float("-inf"))
    assert least[0, 0] == torch.finfo(dtype).min
    assert none[0, 0] == -torch.inf
    assert (least[~mask] == 0).all()


def test_long_causal_samples_are_plain_without_gradients(monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 3)
    monkeypatch.setattr(attention, "SCORES", 3 * 8)
    own = attention._Attention(*drawn(2, 1, 8, 8), is_causal=True)
    assert own.plain() is None
    with torch.no_grad():
        assert own.plain() is not None
