"""What zeros buy, by trial: every way multiplies, and 2:4 is taken where it is quicker alone."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gblm
from gblm import GblmError, gains
from gblm.command import measure
from gblm.gains.__main__ import main
from gblm.report import Gain

module = sys.modules["gblm.gains"]  # in gblm the name is that of its function
RANDOM = torch.Generator().manual_seed(0)


def weight(pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a pruned weight [64, 128]."""
    own = torch.randn(64, 128, generator=RANDOM) / 12
    return torch.where(gblm.parse(pattern, "row").keep(own.abs()), own, 0).to(dtype)


@pytest.mark.parametrize(("way", "most"), [("int8", 0.02), ("int4", 0.15), ("CSR", 1e-3)])
def test_every_way_multiplies_by_the_weight(way: str, most: float):
    own, x = weight(), torch.randn(5, 128, generator=RANDOM).bfloat16()
    wanted = x.float() @ own.float().T
    got = module.WAYS[way](own, x)().float()
    got = got.T if way == "CSR" else got
    assert (got - wanted).norm() <= most * wanted.norm()


def test_shapes_are_tried_once_each_in_every_way_of_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SECONDS", 0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 64), nn.ReLU())
    found = gains(model, positions=(1,))
    assert [(own.shape, own.number) for own in found] == [([64, 32], 2), ([32, 64], 1)]
    for own in found:
        assert own.base == "float32"
        assert {"float32", "int8", "int4", "CSR"} <= own.seconds.keys()
        assert not {"2:4", "FP8 2:4"} & own.seconds.keys()
        assert own.ratio("float32") == 1


def test_a_way_that_cannot_be_had_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SECONDS", 0)
    (own,) = gains(nn.Linear(30, 8), positions=(1,))  # 30 is no multiple of int4's group
    assert not {"int4", "int8"} & own.seconds.keys()  # nor of 16, beyond which int8's reads
    assert "CSR" in own.seconds


def test_no_gain_is_said():
    own = Gain([8, 4], 3, 1, "bfloat16", {"bfloat16": 0.01, "int8": 0.005, "CSR": 0.02})
    head, line = module.said([own, Gain([8, 4], 3, 128, "bfloat16", {"bfloat16": 0.02})])[:2]
    assert head.split() == ["layers", "shape", "vectors", "bfloat16", "int8", "CSR"]
    assert line.split() == "3 8 × 4 1 10\u00a0ms × 0.50 no gain".replace("\u00a0", " ").split()


@pytest.mark.parametrize(("pattern", "fits"), [("2:4", True), ("0.5", False), ("1:4", True)])
def test_two_of_four_is_seen(pattern: str, fits: bool):
    assert module.two_of_four(weight(pattern)) == fits


def test_on_a_cpu_nothing_is_gained_and_nothing_done():
    model = nn.Linear(128, 64)
    model.weight.data = weight()
    assert "torch has 2:4 products on CUDA alone" in gblm.accelerate(model)
    assert type(model.weight) is nn.Parameter


@pytest.mark.parametrize("quick", [(64, 128), (128, 64), ()])
def test_shapes_are_swapped_where_the_trial_says_so(quick, monkeypatch: pytest.MonkeyPatch):
    """On a device that is said to have 2:4 products, with a trial that says what is quick."""
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128), nn.Linear(128, 64)).bfloat16()
    for own in model[:2]:
        own.weight.data = weight().reshape(own.weight.shape)
    swapped: list[tuple[int, ...]] = []

    def sparse(own: torch.Tensor) -> torch.Tensor:
        swapped.append(tuple(own.shape))
        return own.clone()

    def trial(weights, positions, among):
        assert len(weights) == 2  # the third is dense
        shapes = {tuple(own.shape) for own in weights.values()}
        return [
            Gain([*shape], 1, 9, "bfloat16", {"bfloat16": 1.0, "2:4": 0.7 if shape == quick else 1})
            for shape in shapes
        ]

    monkeypatch.setattr(module, "_can", module.two_of_four)
    monkeypatch.setattr(module, "trial", trial)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", sparse)
    said = gblm.accelerate(model, positions=9)
    assert swapped == ([quick] if quick else [])
    expected = (
        "1 of 3 linear layers run by 2:4" if quick else "no gain: 2:4 products are not quicker"
    )
    assert said.startswith(expected)
    assert "at 9 vectors" in said


def test_products_on_a_gpu_by_fake_tensors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    with FakeTensorMode():
        own = torch.empty(128, 256, device="cuda", dtype=torch.float16)
        y = module.semi_structured(own, torch.empty(32, 256, device="cuda"))()
        sparse = torch.sparse.to_sparse_semi_structured(own)
        held = measure.weight_bytes(nn.ParameterList([nn.Parameter(sparse, requires_grad=False)]))
    assert (y.shape, y.dtype, y.device.type) == ((32, 128), torch.float16, "cuda")
    assert held == (1 / 2 + 1 / 16) * own.nbytes  # the values that stay, two bits for each


def test_other_outputs_are_not_taken(monkeypatch: pytest.MonkeyPatch):
    own = weight()
    assert module._agree(own, own.clone(), 4)
    assert not module._agree(own, own * 1.1, 4)


def test_the_command_tries_the_pruned_linears(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "SECONDS", 0)
    monkeypatch.setattr(module, "POSITIONS", (1,))
    tensors = {f"layers.{i}.up.weight": weight() for i in range(3)} | {"head.weight": weight()}
    (tmp_path / "pruned").mkdir()
    save_file(tensors, tmp_path / "pruned" / "model.safetensors")
    gblm.pack(tmp_path / "pruned", tmp_path / "small")
    for folder in ("pruned", "small"):
        assert main([str(tmp_path / folder), "--device", "cpu"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split()[:3] == ["layers", "shape", "vectors"]
        assert lines[2].split()[:4] == ["3", "64", "×", "128"]
    assert main([str(tmp_path), "--device", "cpu"]) == 2
    assert "holds no .safetensors" in capsys.readouterr().err


def test_a_report_keeps_its_gains(tmp_path: Path):
    linear = gblm.report.LinearReport("blocks.0.up", [8, 4], 0.5, 0.1, 0.1)
    own = Gain([8, 4], 3, 1, "float32", {"float32": 0.01})
    report = gblm.Report("wanda", "0.5", linears=[linear], gains=[own])
    report.write(tmp_path)
    assert gblm.Report.read(tmp_path).gains == [own]
    report.gains[0].base = "int8"
    report.write(tmp_path)
    with pytest.raises(GblmError, match="is no report"):
        gblm.Report.read(tmp_path)
