"""The commands on the second device: they give what they give on the CPU, from any offload."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gblm.llm.__main__ import main as prune_llm
from gblm.vit.__main__ import main as prune_vit
from gblm.walk.journal import GradientFolder, Journal

MAIN = {"llm": prune_llm, "vit": prune_vit}


def arguments(fixture: list[str], device: str, output: Path, *more: str) -> list[str]:
    """Return the arguments of a command, of those of a script of eval/."""
    found = [flag.replace("--windows", "--evaluate-windows") for flag in fixture[1:]]
    found[found.index("--device") + 1] = device
    return [*found, "--sparsity", "0.5", "--backward", "blocks", "--output", str(output), *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= load_file(file)
    return found


def check_alike(one: Path, other: Path) -> None:
    """Fail unless the zeros of two results are alike, but for what rounding may move."""
    here, there = weights(one), weights(other)
    assert set(here) == set(there)
    apart = sum(int(((value == 0) != (there[name] == 0)).sum()) for name, value in here.items())
    zeros = sum(int((value == 0).sum()) for value in here.values())
    assert zeros > 5000
    assert apart <= zeros / 500


@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
@pytest.mark.parametrize("side", MAIN)
def test_a_command_gives_the_masks_of_the_cpu(side, offload, request, tmp_path):
    given, more = request.getfixturevalue(side), ("--method", "gblm")
    assert MAIN[side](arguments(given, "cpu", tmp_path / "cpu", *more)) == 0
    more += ("--offload", offload)
    assert MAIN[side](arguments(given, "second", tmp_path / "second", *more)) == 0
    check_alike(tmp_path / "cpu", tmp_path / "second")


@pytest.mark.parametrize("pattern", ["neurons:0.25/uneven+heads:0.34/uneven", "attention:0.5"])
@pytest.mark.parametrize("side", MAIN)
def test_units_go_on_it(side, pattern, request, tmp_path):
    given = request.getfixturevalue(side)
    for device in ("cpu", "second"):
        flags = arguments(given, device, tmp_path / device, "--method", "wanda")
        flags[flags.index("0.5")] = pattern
        assert MAIN[side](flags) == 0
    here, there = weights(tmp_path / "cpu"), weights(tmp_path / "second")
    assert {name: own.shape for name, own in here.items()} == {
        name: own.shape for name, own in there.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("side", MAIN)
def test_weights_may_live_elsewhere(side, offload, request, tmp_path):
    # Not against the CPU, which may refine in bfloat16.
    given, more = request.getfixturevalue(side), ("--method", "best", "--offload")
    assert MAIN[side](arguments(given, "second", tmp_path / "here", *more, "none")) == 0
    assert MAIN[side](arguments(given, "second", tmp_path / "there", *more, offload)) == 0
    check_alike(tmp_path / "here", tmp_path / "there")


CUTS = {"after a block": (Journal, "finish"), "after gradients": (GradientFolder, "keep")}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("offload", [pytest.param("none", marks=pytest.mark.slow), "disk"])
@pytest.mark.parametrize("side", ["llm", pytest.param("vit", marks=pytest.mark.slow)])
def test_a_command_that_was_cut_off_goes_on(side, offload, cut, request, tmp_path, monkeypatch):
    given = request.getfixturevalue(side)
    folder, name = CUTS[cut]
    write = getattr(folder, name)

    def cut_off(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    more = ("--method", "gblm", "--offload", offload, "--work-dir")
    assert MAIN[side](arguments(given, "cpu", tmp_path / "cpu", *more, str(tmp_path / "a"))) == 0
    flags = arguments(given, "second", tmp_path / "second", *more, str(tmp_path / "b"))
    with monkeypatch.context() as patch:
        patch.setattr(folder, name, cut_off)
        assert MAIN[side](flags) == 130
    assert MAIN[side]([*flags, "--resume"]) == 0
    check_alike(tmp_path / "cpu", tmp_path / "second")
