"""The device: what "auto" means for the dtype of a model."""

import time

import pytest
import torch

from gblm.machine import device
from gblm.machine.device import find_dtype, quick

CPU = torch.device("cpu")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_auto_keeps_16_bits_where_their_products_are_quick(stored, fast, monkeypatch):
    monkeypatch.setattr(device, "quick", lambda *of: fast)
    assert find_dtype("auto", CPU, lambda: stored) == (None if fast else torch.float32)
    assert find_dtype("bfloat16", CPU, lambda: stored) == torch.bfloat16
    assert find_dtype("auto", torch.device("cuda"), lambda: stored) is None


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, None])
def test_nothing_is_measured_for_other_dtypes(stored, monkeypatch):
    monkeypatch.delattr(device, "quick")
    assert find_dtype("auto", CPU, lambda: stored) is None


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_quick_is_measured(slow, two_threads, monkeypatch):
    product = torch.Tensor.__matmul__

    def planted(x, y):
        if x.dtype == slow:
            time.sleep(0.3)
        return product(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", planted)
    quick.cache_clear()
    assert quick(CPU, torch.bfloat16) == (slow == torch.float32)
    assert torch.get_num_threads() == 2
    quick.cache_clear()
