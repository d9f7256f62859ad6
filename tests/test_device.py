"""The device: what "auto" means for the dtype of a model, how exact it is, and its memory."""

import sys
import time

import pytest
import torch

from gblm.machine import device
from gblm.machine.device import (
    exact,
    find_dtype,
    free_memory,
    peak_memory,
    quick,
    reset_peak,
)

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


@pytest.fixture
def precision():
    """Leave the precision of products as it was."""
    kinds = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [kind.fp32_precision for kind in kinds]
    yield
    torch.set_float32_matmul_precision("highest")
    for kind, value in zip(kinds, before, strict=True):
        kind.fp32_precision = value


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("usual", ["medium", "high", "highest"])
def test_exact_products_keep_all_bits_for_a_time(usual):
    torch.set_float32_matmul_precision(usual)
    with torch.autocast("cpu", torch.bfloat16), exact(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    assert torch.get_float32_matmul_precision() == usual
    with pytest.raises(ZeroDivisionError), exact(CPU):
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == usual
    assert torch.backends.cuda.matmul.allow_tf32 == (usual != "highest")


@pytest.mark.usefixtures("precision")
def test_exact_products_know_a_precision_that_the_backend_was_given():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with exact(CPU):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.gpu
@pytest.mark.usefixtures("precision")
def test_exact_products_of_a_gpu_are_those_of_fp32():
    device = torch.device("cuda")
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(device)
    right = x.double() @ x.double().T
    torch.set_float32_matmul_precision("high")
    rounded = (x @ x.T - right).abs().max()
    with exact(device):
        assert (x @ x.T - right).abs().max() < rounded / 20


@pytest.mark.skipif(sys.platform != "linux", reason="no other system forgets a peak")
def test_a_peak_is_forgotten():
    large = torch.ones(50_000_000)
    before = peak_memory(CPU)
    del large
    reset_peak(CPU)
    after = peak_memory(CPU)
    assert after < before - 150_000_000
    torch.ones(50_000_000)
    assert peak_memory(CPU) > after + 150_000_000


@pytest.mark.gpu
def test_memory_that_torch_holds_unused_is_free():
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = free_memory(device)
    large = torch.ones(250_000_000, device=device)
    assert free_memory(device) <= before - large.nbytes
    assert peak_memory(device) >= large.nbytes
    del large
    assert free_memory(device) >= before - 10_000_000
    reset_peak(device)
    assert peak_memory(device) < 100_000_000
