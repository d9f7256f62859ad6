"""Packed checkpoints: what comes out is what went in, bit for bit, or the damage is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gblm
from gblm import GblmError
from gblm.packed import decode, encode, read_packed
from gblm.packed.__main__ import main

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)


def pruned(pattern: str, shape: tuple[int, int] = (256, 512)) -> Tensor:
    """Return Gaussian weights in bfloat16, of which the smallest are 0."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 32
    return torch.where(gblm.parse(pattern, "row").keep(weight.abs()), weight, 0).bfloat16()


def odd() -> dict[str, Tensor]:
    """Return tensors of every kind that a checkpoint may hold."""
    noise = torch.randint(256, (64 * 8,), dtype=torch.uint8)
    bits = {
        str(dtype): noise.view(dtype).clone() for dtype in DTYPES
    }  # NaN with payloads, subnormals
    return bits | {
        "dense": pruned("0.01"),
        "zeros": torch.zeros(33, 7, dtype=torch.float16),
        "minus zeros": torch.full((40,), -0.0),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
        "bool": torch.tensor([True, False, False]),
        "transposed": pruned("0.7").T,
    }


def same(one: Tensor, other: Tensor) -> bool:
    """Say whether tensors have the same dtype, shape and bits."""
    flat = [x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other)]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(*flat)


@pytest.mark.parametrize("name", odd())
def test_a_tensor_comes_back_bit_for_bit(name: str):
    tensor = odd()[name]
    assert same(decode(encode(name, tensor)[0], name), tensor)


@pytest.mark.parametrize(("pattern", "most"), [("0.5", 0.40), ("2:4", 0.40), ("0.7", 0.26)])
def test_pruned_weights_are_as_small_as_promised(pattern: str, most: float):
    weight = pruned(pattern)
    packed, masked = encode("w", weight)
    assert masked
    assert packed.nbytes <= most * weight.nbytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two shards with an index, a config and another file."""
    where = tmp_path / "model"
    where.mkdir()
    shards = {"model-1.safetensors": odd(), "model-2.safetensors": {"w": pruned("2:4")}}
    for name, tensors in shards.items():
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, where / name, metadata={"format": "pt", "from": "elsewhere"})
    index = {key: name for name, tensors in shards.items() for key in tensors}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (where / "model.safetensors.index.json").write_text(text)
    (where / "config.json").write_bytes(b'{\r\n  "model_type": "llama"}')
    (where / "vocabulary.txt").write_text("a b")
    return where


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_comes_back_byte_for_byte(folder: Path, tmp_path: Path):
    small, again = tmp_path / "small", tmp_path / "again"
    sizes = gblm.pack(folder, small)
    assert sizes.pruned_packed < 0.4 * sizes.pruned_dense
    assert not list(small.glob("model-?.safetensors"))
    index = json.loads((small / "model.safetensors.index.packed.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in small.glob("*.packed.*")} - {
        "model.safetensors.index.packed.json"
    }
    assert json.loads((small / "config.json").read_text())["quantization_config"]
    gblm.unpack(small, again)
    assert contents(again) == contents(folder)
    gblm.pack(again, tmp_path / "small again")
    assert contents(tmp_path / "small again") == contents(small)


def test_a_changed_byte_is_found_and_named(tmp_path: Path):
    (tmp_path / "model").mkdir()
    tensors = {"layer.weight": pruned("0.5", (16, 64)), "bias": torch.zeros(16)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    gblm.pack(tmp_path / "model", tmp_path / "small")
    file = tmp_path / "small" / "model.packed.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    named = 0
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(changed)
        try:
            found, said = read_packed(file), str(file)
        except GblmError as error:
            found, said = tensors, str(error)
        named += "tensor layer.weight is damaged" in said
        assert str(file) in said
        assert all(same(found[name], own) for name, own in tensors.items())  # a space, say
    assert named > 0.9 * (len(whole) - start) * 0.9 / 5


@pytest.mark.parametrize("what", ["pack", "unpack"])
def test_the_command_says_what_it_did_and_what_is_wrong(
    what: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = tmp_path / "small"
    assert main(["pack", str(folder), str(small)]) == 0
    assert "weights with zeros to" in capsys.readouterr().out
    given = {"pack": small, "unpack": folder}[what]
    assert main([what, str(given), str(tmp_path / "out")]) == 2
    assert f"to {what}" in capsys.readouterr().err
    assert main([what, str({"pack": folder, "unpack": small}[what]), str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_quantised_is_not_packed(folder: Path, tmp_path: Path):
    (folder / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(GblmError, match="quantised"):
        gblm.pack(folder, tmp_path / "small")
