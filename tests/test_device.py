"""The device: what "auto" means for the dtype of a model, and for that of its products."""

import pytest
import torch
from torch import nn

import gblm
from gblm.machine import device
from gblm.machine.device import find_compute_dtype, find_dtype, halved, has_products

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
