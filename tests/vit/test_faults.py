"""What is damaged, lies or is hostile ends in an error that names it, and writes nothing."""

import io
import json
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gblm import METHODS
from gblm.vit import data
from gblm.vit.__main__ import main
from tests.forked import COMMAND, ended, start

WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
FIRST = "class0/0.png"
EVERY = ",".join([*METHODS, "gblm+repair", "wanda+sparsegpt"])
Damage = Callable[[Path], object]


@pytest.fixture
def model(vit: list[str], sealed: Any) -> Path:
    """A copy of the tiny ViT, to be damaged."""
    folder = sealed.root / "here" / "deep" / "model"
    shutil.copytree(vit[vit.index("--model") + 1], folder)
    return folder


@pytest.fixture
def images(vit: list[str], sealed: Any) -> Path:
    """A copy of the noisy pictures, to be damaged."""
    folder = sealed.root / "here" / "images"
    shutil.copytree(vit[vit.index("--calibration") + 1], folder)
    return folder


@pytest.fixture
def run(sealed: Any, model: Path, images: Path) -> Callable[..., tuple[int, str]]:
    """Run the command on those copies, with an output."""
    output = sealed.root / "out"

    def run(*more: str) -> tuple[int, str]:
        return sealed.run(main, [*command(model, images), "--output", str(output), *more], output)

    return run


def command(model: Path, images: Path) -> list[str]:
    sources = ["--calibration", str(images), "--evaluate", str(images), "--workers", "1"]
    return ["--model", str(model), *sources, "--samples", "4", "--device", "cpu"]


def content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def edited(edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        edit(found)
        (folder / "config.json").write_text(json.dumps(found))

    return damage


def sizes(**values: object) -> Damage:
    return edited(lambda found: found["model_args"].update(values))


def changed(edit: Callable[[bytearray], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = bytearray((folder / WEIGHTS).read_bytes())
        edit(found)
        (folder / WEIGHTS).write_bytes(found)

    return damage


def flip(at: int, bit: int) -> Callable[[bytearray], object]:
    return lambda found: found.__setitem__(at, found[at] ^ (1 << bit))


def weight(name: str, change: Callable[[torch.Tensor], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found[name])
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def poisoned(name: str, value: float) -> Damage:
    return weight(name, lambda found: found.view(-1)[:1].fill_(value))


FC1 = "blocks.1.mlp.fc1.weight"
REFUSED: dict[str, tuple[Damage, str]] = {
    "no byte": (content(WEIGHTS, b""), "cannot be read"),
    "half a header": (changed(lambda found: found.__delitem__(slice(1000, None))), "cannot be"),
    "one byte short": (changed(lambda found: found.pop()), "cannot be read"),
    "a length of exabytes": (changed(flip(7, 6)), "cannot be read"),
    "a bit of the header's brace": (changed(flip(8, 4)), "cannot be read"),
    "a bit of a name": (changed(flip(30, 4)), "does not fit"),
    "a NaN in a linear": (poisoned(FC1, float("nan")), FC1),
    "an Inf in a norm": (poisoned("norm.weight", float("inf")), "norm.weight"),
    "a NaN in the head": (poisoned("head.weight", float("nan")), "head.weight"),
    "a NaN in the position embedding": (poisoned("pos_embed", float("nan")), "pos_embed"),
    "a weight that overflows": (poisoned(FC1, 3e38), "the dense model is nan"),
    "wider": (sizes(embed_dim=64), "not [1, 1, 64]"),
    "no width": (sizes(embed_dim=0), "cannot be made"),
    "a negative width": (sizes(embed_dim=-1), "cannot be made"),
    "fewer blocks": (sizes(depth=1), "blocks.1.attn.proj.bias is not of the model"),
    "more blocks": (sizes(depth=3), "blocks.2.norm1.weight is missing"),
    "ten million blocks": (sizes(depth=10**7), "10000000 blocks"),
    "heads that do not divide": (sizes(num_heads=3), "cannot be made"),
    "no head": (sizes(num_heads=0), "cannot be made"),
    "no pixel": (sizes(img_size=0), "cannot be made"),
    "a million pixels": (sizes(img_size=10**6), "cannot be made"),
    "more classes": (sizes(num_classes=4), "head.weight is [3, 32], not [4, 32]"),
    "a trillion classes": (sizes(num_classes=10**12), "cannot be made"),
    "no class": (sizes(num_classes=0), "no head of classes"),
    "an unknown argument": (sizes(nonsense=1), "nonsense"),
    "an unknown family": (edited(lambda found: found.update(architecture="evil")), "evil"),
    "means of text": (
        edited(lambda found: found.update(pretrained_cfg={"mean": ["x"]})),
        "pretrained_cfg",
    ),
    "a config of nothing": (content("config.json", b""), "cannot be made"),
    "a config of no object": (content("config.json", b"[]"), "cannot be made"),
    "a config of bytes": (content("config.json", b"\xff"), "cannot be made"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_lies_or_is_damaged_is_refused(case, model, run, sealed):
    damage, message = REFUSED[case]
    damage(model)
    code, error = run()
    assert code == 2
    assert message in error
    assert not (sealed.root / "out").exists()


@pytest.mark.parametrize("part", range(12))
def test_a_flipped_bit_anywhere_is_an_error_or_another_weight(part, model, run):
    data = (model / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    at = part * header // 8 if part < 8 else header + (part - 8) * (len(data) - header) // 4
    changed(flip(at, 4))(model)
    run("--method", "wanda")


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("plain", [True, False])
def test_a_hostile_pickle_is_never_loaded(plain, flag, model, run, hostile, sealed):
    file = sealed.root / "here" / "evil.pth" if flag else model / PICKLE
    if plain:
        file.write_bytes(pickle.dumps(hostile))
    else:
        torch.save({"state_dict": {"norm.weight": hostile}}, file)
    if not flag:
        (model / WEIGHTS).unlink()
    code, error = run(*(["--checkpoint", str(file)] if flag else []))
    assert code == 2
    assert file.name in error
    assert not hostile.mark.exists()


# What is odd but sound


@pytest.mark.parametrize(
    "zero",
    [
        FC1,  # a weight, and the inputs of another
        "patch_embed.proj.weight",  # inputs
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("head.weight", "norm.weight")),
    ],
)
def test_weights_and_inputs_of_zeros_are_pruned_by_every_method(zero, model, run, sealed):
    weight(zero, lambda found: found.zero_())(model)
    assert run("--method", EVERY)[0] == 0
    for result in sorted((sealed.root / "out").iterdir()):
        report = json.loads((result / "report.json").read_text())
        assert report["sparsity"] >= 0.499
        assert all(torch.isfinite(value).all() for value in load_file(result / WEIGHTS).values())


@pytest.mark.parametrize("sparsity", ["0.999", pytest.param("0.001", marks=pytest.mark.slow)])
def test_extreme_sparsities_run_with_every_method(sparsity, run, sealed):
    assert run("--method", EVERY, "--sparsity", sparsity)[0] == 0
    for result in sorted((sealed.root / "out").iterdir()):
        report = json.loads((result / "report.json").read_text())
        assert report["sparsity"] == pytest.approx(float(sparsity), abs=0.035)


def test_one_sample_and_one_class_are_enough(run, images):
    shutil.rmtree(images / "class1")
    shutil.rmtree(images / "class2")
    (images / "class0").rename(images / "0")
    assert run("--method", EVERY)[0] == 0
    assert run("--samples", "1", "--overwrite")[0] == 0


@pytest.mark.parametrize("value", [0, pytest.param(255, marks=pytest.mark.slow)])
def test_pictures_of_one_colour_are_enough(value, run, images):
    for file in images.rglob("*.png"):
        Image.new("RGB", (40, 40), (value, value, value)).save(file)
    assert run("--method", EVERY)[0] == 0


# Pictures


def png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds no pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "a header of 60000 by 60000": (lambda: png(60000, 60000), "DecompressionBombError"),
    "a header of exabytes": (lambda: png(2**31 - 1, 2**31 - 1), "DecompressionBombError"),
    "a bomb": (lambda: encoded(Image.new("1", (10000, 10000)), "PNG"), "10000×10000"),
    "a line": (lambda: encoded(Image.new("L", (60000, 1)), "PNG"), "60000×1"),
    "a header without pixels": (lambda: png(40, 40), "OSError"),
    "no pixel": (lambda: png(0, 0), "UnidentifiedImageError"),
    "half a JPEG": (lambda: encoded(noise(40, 40, 3), "JPEG")[:400], "OSError"),
    "text": (lambda: b"no picture", "UnidentifiedImageError"),
    "nothing": (lambda: b"", "UnidentifiedImageError"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BROKEN)
def test_broken_pictures_and_bombs_are_refused_by_their_name(case, run, images):
    make, message = BROKEN[case]
    (images / FIRST).write_bytes(make())
    code, error = run()
    assert code == 2
    assert FIRST in error
    assert message in error


FORMS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "one pixel": ("png", lambda: encoded(Image.new("RGB", (1, 1), (9, 80, 200)), "PNG")),
    "CMYK": ("jpg", lambda: encoded(noise(40, 40, 4).convert("CMYK"), "JPEG")),
    "grey with alpha": ("png", lambda: encoded(noise(40, 40, 3).convert("LA"), "PNG")),
    "black and white": ("png", lambda: encoded(noise(40, 40).convert("1"), "PNG")),
    "a .jfif": ("jfif", lambda: encoded(noise(40, 40, 3), "JPEG")),
    "an .avif": ("avif", lambda: encoded(noise(40, 40, 3), "AVIF")),
    "a palette": ("gif", lambda: encoded(noise(40, 40, 3).convert("P"), "GIF")),
    "an animation": (
        "gif",
        lambda: encoded(
            noise(40, 40, 3), "GIF", save_all=True, append_images=[noise(40, 40, 3).rotate(90)]
        ),
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_odd_pictures_are_read(case, run, images):
    ending, make = FORMS[case]
    for file in sorted(images.rglob("*.png")):
        file.unlink()
        file.with_suffix(f".{ending}").write_bytes(make())
    assert run()[0] == 0


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight_and_not_cut_off(form, tmp_path):
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=3
    )
    grey = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    files = {"narrow": grey, "wide": grey.astype(np.uint16) * 257}
    found = {}
    for name, pixels in files.items():
        file = tmp_path / name / "0" / f"0.{form.lower()}"
        file.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(file, form)
        source = data.open_images(str(tmp_path / name), model, "evaluation", workers=0)
        found[name] = next(iter(data.evaluation(source)))["images"]
    assert torch.equal(found["wide"], found["narrow"])


# Arrays and tables


def npz(**arrays: Any) -> Callable[[Path], object]:
    return lambda file: np.savez(file, **arrays)


def ready(value: float = 0.0, dtype: Any = np.float32) -> np.ndarray:
    return np.full((4, 3, 32, 32), value, dtype)


LABELS = np.zeros(4, int)
SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "zeros.npz": (npz(images=ready(), labels=LABELS), ""),
    "doubles.npz": (npz(images=ready(0.5, np.float64), labels=LABELS), ""),
    "nan.npz": (npz(images=ready(np.nan), labels=LABELS), "nan"),
    "huge.npz": (npz(images=ready(1e38), labels=LABELS), "nan"),
    "objects.npz": (npz(images=np.array([{}], object), labels=LABELS), "Object arrays"),
    "integers.npz": (npz(images=ready(0, np.int32), labels=LABELS), "int32"),
    "complex.npz": (npz(images=ready(0, np.complex64), labels=LABELS), "complex64"),
    "text.npz": (npz(images=np.array(["a"]), labels=LABELS), "cannot be read"),
    "scalar.npz": (npz(images=np.float32(3), labels=LABELS), "float32 []"),
    "none.npz": (npz(images=ready()[:0], labels=LABELS[:0]), "no image"),
    "halves.npz": (npz(images=ready(), labels=np.full(4, 0.5)), "one integer for each"),
    "nan-labels.npz": (npz(images=ready(), labels=np.full(4, np.nan)), "NaN"),
    "beyond.npz": (npz(images=ready(), labels=np.full(4, 2**40)), "label 1099511627776"),
    "negative.npz": (npz(images=ready(), labels=np.full(4, -1)), "label -1"),
    "few.npz": (npz(images=ready(), labels=LABELS[:3]), "for 4 images"),
    "no-pixel.npz": (npz(images=np.zeros((4, 0, 0, 3), np.uint8), labels=LABELS), "broken"),
    "five.npz": (npz(images=np.zeros((4, 32, 32, 5), np.uint8), labels=LABELS), "broken"),
    "bytes.npz": (lambda file: file.write_bytes(b"PK\x03\x04junk"), "cannot be read"),
    "empty.npz": (lambda file: file.write_bytes(b""), "cannot be read"),
    "bytes.parquet": (lambda file: file.write_bytes(b"PAR1junk"), "cannot be read"),
    "empty.safetensors": (lambda file: file.write_bytes(b""), "cannot be read"),
}


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        *((name, "--calibration") for name in SOURCES),
        *((name, "--evaluate") for name in ("halves.npz", "beyond.npz")),
        *(
            pytest.param(name, "--evaluate", marks=pytest.mark.slow)
            for name in SOURCES
            if name not in ("halves.npz", "beyond.npz")
        ),
    ],
)
def test_garbage_for_images_is_refused_by_its_name(name, flag, run, sealed):
    make, message = SOURCES[name]
    file = sealed.root / "here" / name
    make(file)
    code, error = run(flag, str(file))
    assert code == (2 if message else 0)
    assert message in error
    assert code == 0 or name in error or "calibration sample 0" in error


def test_a_pickle_in_an_array_is_never_loaded(run, sealed, hostile):
    file = sealed.root / "here" / "evil.npz"
    np.savez(file, images=np.array([hostile], dtype=object), labels=LABELS[:1])
    assert run("--calibration", str(file))[0] == 2
    file.write_bytes(pickle.dumps(hostile))
    assert run("--calibration", str(file))[0] == 2
    assert not hostile.mark.exists()


def table(file: Path, cells: list[Any], labels: list[int], **options: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table({"image": cells, "label": labels})
    pyarrow.parquet.write_table(rows, file, **options)


def test_parquet_is_read_where_it_lies(run, images, sealed):
    """Its rows come in groups and files; nothing is copied into a cache."""
    files = sorted(images.rglob("*.png"))
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    labels = [int(file.parent.name[-1]) for file in files]
    folder = sealed.root / "here" / "table"
    folder.mkdir()
    table(folder / "0.parquet", cells[:7], labels[:7], row_group_size=2)
    table(folder / "1.parquet", cells[7:], labels[7:], row_group_size=3)
    assert run("--calibration", str(folder), "--evaluate", str(folder))[0] == 0
    report = json.loads((sealed.root / "out" / "report.json").read_text())
    assert run("--overwrite")[0] == 0
    again = json.loads((sealed.root / "out" / "report.json").read_text())
    pairs = zip(report["evaluation"].values(), again["evaluation"].values(), strict=True)
    for one, other in pairs:
        assert one["dense"] == pytest.approx(other["dense"], rel=1e-6)


def test_a_cell_that_is_no_picture_is_named(run, sealed):
    file = sealed.root / "here" / "cells.parquet"
    table(file, [{"bytes": b"no picture", "path": None}] * 4, [0] * 4)
    code, error = run("--calibration", str(file))
    assert code == 2
    assert "row" in error


# Folders


def test_results_are_the_same_bits_every_time(run, model, images, sealed):
    """The second run is a process of its own, whose hashes, addresses and home are others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run("--method", "gblm,best")[0] == 0
    finally:
        torch.set_num_threads(threads)
    output = sealed.root / "again"
    before = sealed.tree(output)
    flags = [*command(model, images), "--method", "gblm,best", "--output", str(output)]
    said = sealed.root / "said"
    assert ended(start(COMMAND.format(side="vit"), flags, said)) == 0, said.read_text()
    assert sealed.tree(output, said) == before, "nothing is written elsewhere"
    first = sealed.result(sealed.root / "out")
    assert len(first) == 4
    assert sealed.result(output) == first
