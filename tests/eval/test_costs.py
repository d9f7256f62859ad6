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
    products = {unit: n for (kind, unit), n in timed.work.items() if kind == costs.PRODUCTS}
    assert products == {dtype: 2 * 2 * (14 * 6 * 5)}  # x needs no gradient
    assert timed.seconds[costs.PRODUCTS] > 0


def test_attention_takes_two_products_forward_and_five_backward():
    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    with costs.Timed() as timed:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert timed.work["attention", torch.float32] == (2 + 5) * 2 * (2 * 3 * 8 * 8 * 4)


def test_others_are_counted_by_the_bytes_they_touch():
    x = torch.randn(10, 3)
    with costs.Timed() as timed:
        x.t() + 1  # a view touches nothing
    assert dict(timed.work) == {("elementwise and others", costs.BYTES): 2 * 10 * 3 * 4}


def test_operations_have_a_kind():
    kinds = {name: costs.kind(name) for name in ("addmm_.default", "sort.stable", "copy_.default")}
    assert [*kinds.values()] == [costs.PRODUCTS, "selection of masks", "copies"]
