"""Where tensors live: the same bits come back from wherever they rest, and files go."""

import gc
from pathlib import Path

import pytest
import torch

from gblm.machine import placement
from gblm.machine.placement import CPU, PART, Placement

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def placed(place: str, folder: Path | None, device: torch.device = CPU) -> Placement:
    made = Placement(device, folder)
    made.place = place
    return made


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        x = torch.randn(shape, generator=draw).to(dtype)
        return x.index_fill(0, torch.tensor([0]), torch.nan)
    return torch.randint(-9, 9, shape, generator=draw).to(dtype)


def bits(x: torch.Tensor) -> list[int]:
    return x.contiguous().view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["device", "memory", "file"])
def test_what_rests_wakes_with_the_same_bits(place, dtype, tmp_path):
    own = placed(place, tmp_path)
    for x in (
        drawn(dtype, 5, 3, 4),
        drawn(dtype, 4, 6).T,
        drawn(dtype, 6, 4)[1:3],
        drawn(dtype, 2, 1).expand(2, 3),
    ):
        before = bits(x)
        rest = own.rest(x)
        awake = own.wake(rest)
        assert (awake.dtype, awake.shape, awake.device) == (x.dtype, x.shape, x.device)
        assert bits(awake) == before
        assert bits(own.wake(rest)) == before, "as often as it is asked for"


def test_on_the_device_a_tensor_rests_as_it_is(tmp_path):
    x = drawn(torch.float32, 3, 4)
    assert placed("device", tmp_path).rest(x) is x
    assert placed("memory", tmp_path).rest(x) is x  # main memory is where it is
    assert placed("file", None).rest(x).data_ptr() != 0
    assert not list(tmp_path.iterdir())


def test_a_tensor_in_a_file_is_no_copy_in_memory_and_its_file_goes(tmp_path):
    own = placed("file", tmp_path)
    x = drawn(torch.bfloat16, 64, 1024)
    rest = own.rest(x)
    assert rest.data_ptr() != x.data_ptr()
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) in maps.read()
    x.zero_()
    assert rest[1].any(), "it does not follow what it was made of"
    del rest
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_knows_its_gradient_rests_without_it(tmp_path):
    x = torch.ones(3, requires_grad=True)
    assert not placed("file", tmp_path).rest(x * 2).requires_grad


def test_tensors_rest_as_near_as_there_is_room(monkeypatch, tmp_path):
    gpu = torch.device("cuda")
    free = {"cpu": 1000 * PART, "cuda": 100 * PART}
    monkeypatch.setattr(placement, "free_memory", lambda device: free[device.type])

    def chosen(size: int, device: torch.device, folder: Path | None, to_file: bool = False) -> str:
        own = Placement(device, folder)
        assert own.place == "device"
        own.plan(size, to_file)
        return own.place

    assert [chosen(size, gpu, tmp_path) for size in (100, 101, 1000, 1001)] == [
        "device",
        "memory",
        "memory",
        "file",
    ]
    assert [chosen(size, CPU, tmp_path) for size in (1000, 1001)] == ["device", "file"]
    assert [chosen(size, gpu, None) for size in (100, 101, 1001)] == ["device", "memory", "memory"]
    assert chosen(1001, CPU, None) == "memory"
    assert chosen(1, gpu, tmp_path, to_file=True) == "file"
    assert chosen(1, gpu, None, to_file=True) == "device"
