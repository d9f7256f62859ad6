"""The device: dtypes that "auto" means, how exact products are, and memory."""

import sys

import pytest
import torch
from torch import nn

import gblm
from gblm.machine import device
from gblm.machine.device import (
    exact,
    find_compute_dtype,
    find_dtype,
    free_memory,
    halved,
    has_products,
    peak_memory,
    reset_peak,
)

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """Say what the CPU has, by torch's names."""

    def has(*names: str) -> None:
        there = dict.fromkeys(names, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there, raising=False)
        has_products.cache_clear()

    yield has
    has_products.cache_clear()


@pytest.mark.parametrize(
    ("stored", "names"),
    [
        (torch.bfloat16, ["avx512_bf16"]),
        (torch.bfloat16, ["amx_bf16", "amx_tile"]),
        (torch.bfloat16, ["bf16"]),
        (torch.float16, ["avx512_fp16"]),
    ],
)
def test_auto_keeps_16_bits_where_the_cpu_multiplies_in_them(stored, names, cpu):
    cpu(*names)
    assert find_dtype("auto", CPU, lambda: stored) is None
    cpu("avx2", "avx512_f")
    assert find_dtype("auto", CPU, lambda: stored) == torch.float32
    assert find_dtype("bfloat16", CPU, lambda: stored) == torch.bfloat16
    assert find_dtype("auto", torch.device("cuda"), lambda: stored) is None


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, None])
def test_other_dtypes_are_kept_on_every_cpu(stored, monkeypatch):
    monkeypatch.delattr(device, "has_products")
    assert find_dtype("auto", CPU, lambda: stored) is None


def test_products_are_as_set_or_by_what_the_cpu_has(cpu):
    for names, auto in ((["avx512_bf16"], torch.bfloat16), ([], torch.float32)):
        cpu(*names)
        assert find_compute_dtype("auto", CPU) == auto
        assert find_compute_dtype("float32", CPU) == torch.float32
        assert find_compute_dtype("bfloat16", CPU) == torch.bfloat16
    assert find_compute_dtype("auto", torch.device("meta")) == torch.float32
    with pytest.raises(gblm.GblmError, match="did you mean 'bfloat16'"):
        find_compute_dtype("bfloat", CPU)


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


def test_process_0_decides_for_all(cpu, monkeypatch):
    cpu("avx512_bf16")
    monkeypatch.setattr("gblm.machine.processes.gathered", lambda value: [not value, value])
    assert find_compute_dtype("auto", CPU) == torch.float32


def test_older_torch_is_asked_by_its_own_functions(cpu, monkeypatch):
    cpu()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)
    assert has_products(CPU, torch.bfloat16)
    assert not has_products(CPU, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_products_of_a_module_are_in_that_dtype(dtype, cpu):
    cpu("avx512_bf16")
    module, x = nn.Linear(4, 3), torch.ones(2, 4)
    with halved(module, dtype):
        assert module(x).dtype == (dtype or torch.bfloat16)
    with halved(module.double(), dtype):
        assert module(x.double()).dtype == torch.float64
