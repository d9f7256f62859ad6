"""The script of costs counts what products take, forward and backward, by their dtype."""

import costs
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_counted_forward_and_backward(dtype):
    linear = torch.nn.Linear(6, 5, dtype=dtype)
    x = torch.randn(2, 7, 6, dtype=dtype)
    with costs.Timed() as timed:
        linear(x).sum().backward()
    assert timed.flops == {dtype: 2 * 2 * (14 * 6 * 5)}  # x needs no gradient
    assert timed.seconds[costs.PRODUCTS] > 0


def test_operations_have_a_kind():
    kinds = {name: costs.kind(name) for name in ("addmm_.default", "sort.stable", "copy_.default")}
    assert [*kinds.values()] == [costs.PRODUCTS, "selection of masks", "copies"]
