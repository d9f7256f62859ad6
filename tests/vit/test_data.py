"""Sources, choice and pre-processing of images, on tiny files made here."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from gblm.base import GblmError
from gblm.vit.data import calibration, evaluation, fitting, open_images, preprocessing
from gblm.vit.sources import Classes, class_map

ASSETS = Path(os.environ.get("GBLM_ASSETS", "missing"))
SYNSETS = ("n01440764", "n01443537", "n02123045")  # of classes 0, 1 and 281


@pytest.fixture(scope="module")
def ten() -> nn.Module:
    """A model of ten classes, which are called a to j."""
    model = tiny(10)
    model.pretrained_cfg["label_names"] = list("abcdefghij")
    return model


def tiny(classes: int, **options) -> nn.Module:
    plain = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 8, "num_heads": 1}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **plain | options)


def folder(root: Path, *classes: str, each: int = 2) -> Path:
    for rank, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (40, 50), (rank, i, 0)).save(root / name / f"{i}.png")
    return root


def labels(source: Path, model: nn.Module, **options) -> list[int]:
    images = open_images(str(source), model, "evaluation", workers=0, **options)
    return torch.cat([batch["labels"] for batch in evaluation(images)]).tolist()


def test_class_of_a_synset_is_its_own(tmp_path: Path) -> None:
    assert labels(folder(tmp_path, *SYNSETS), tiny(1000)) == [0, 0, 1, 1, 281, 281]


CLASSES = {  # names of folders, those of the model, and the class of each in their order
    "the model's names": (["b", "A", "j"], list("abcdefghij"), [1, 0, 9]),
    "nine of ten": (list("abcdefghj"), list("abcdefghij"), [*range(8), 9]),
    "in other letters": (["tiger_cat", "Snow-Fox"], ["snow fox", "x", "Tiger Cat"], [2, 0]),
    "numbers": (["3", "10", "2"], [], [3, 10, 2]),
    "numbers of a model with names": (["3", "1"], list("abcd"), [3, 1]),
    "ranks": (["c10", "c2", "c1"], [], [2, 1, 0]),
    "synsets of no ImageNet": (SYNSETS, [], [0, 1, 2]),
}


@pytest.mark.parametrize("case", CLASSES)
def test_class_of_a_folder(case):
    folders, names, expected = CLASSES[case]
    assert Classes(len(names) or len(folders), names).indices(folders, "here") == expected


def test_a_map_says_the_class_of_a_folder(tmp_path):
    forms = {
        "a.txt": "fox\ncat\n",
        "a.json": '["fox", "cat"]',
        "b.json": '{"fox": 0, "cat": 1}',
        "c.json": '{"0": "fox", "1": "cat"}',
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert class_map(tmp_path / name) == {"fox": 0, "cat": 1}
    source = folder(tmp_path / "images", "cat", each=1)
    assert labels(source, tiny(2), names=tmp_path / "a.txt") == [1]
    (tmp_path / "b.json").write_text('{"fox": "x"}')
    with pytest.raises(GblmError, match=r"class map .*b.json cannot be read"):
        class_map(tmp_path / "b.json")


MISMATCHES = {
    "one name too few": (["c1", "c2"], [], "2 class folders .* model of 3 classes .*--class-map"),
    "another name": (["cat", "fix"], ["cat", "dog", "fox"], "fix is no class.*did you mean 'fox'"),
    "one of all": (["cat", "dog", "fix"], ["cat", "dog", "fox"], "fix is no class of the model"),
    "a number too high": (["0", "3"], [], "label 3, outside the model's 3 classes"),
    "splits": (["train", "val"], [], "splits and no classes; give one of them, such as .*val"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_folders_that_are_no_classes_are_refused(case, tmp_path):
    folders, names, message = MISMATCHES[case]
    model = tiny(3)
    model.pretrained_cfg["label_names"] = names
    with pytest.raises(GblmError, match=message):
        labels(folder(tmp_path, *folders, each=1), model)


def test_a_folder_without_pictures_is_no_class(tmp_path):
    source = folder(tmp_path, *SYNSETS, each=1)
    (source / "@eaDir").mkdir()
    (source / "0").mkdir()
    (source / "0" / "Thumbs.db").touch()
    assert labels(source, tiny(1000)) == [0, 1, 281]


def test_pre_processing_is_that_of_timm(tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model("vit_tiny_patch16_224")
    noise = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    expected = create_transform(**resolve_data_config({}, model=model))(picture)
    torch.testing.assert_close(preprocessing(model)(picture), expected)
    assert preprocessing(model)(picture.convert("LA")).shape == (3, 224, 224)
    assert preprocessing(tiny(10, in_chans=1))(picture).shape[0] == 1


def test_calibration_is_stratified_and_the_same_each_time(tmp_path: Path, ten: nn.Module) -> None:
    source = str(folder(tmp_path, *"abcd", each=5))
    first = calibration(open_images(source, ten, "calibration", workers=0), 10)
    before = torch.random.get_rng_state()
    again = calibration(open_images(source, ten, "calibration", workers=2), 10)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["images"].shape[0] == 10
    assert sorted(torch.bincount(first["labels"]).tolist()) == [2, 2, 3, 3]
    fewer = calibration(open_images(source, ten, "calibration", workers=0), 4)
    assert torch.equal(fewer["images"], first["images"][:4])
    assert sorted(fewer["labels"].tolist()) == [0, 1, 2, 3]
    other = calibration(open_images(source, ten, "calibration", workers=0), 10, seed=1)
    assert not torch.equal(other["images"], first["images"])


def test_workers_read_many_batches(tmp_path: Path, ten: nn.Module) -> None:
    source = folder(tmp_path, *"abc", each=7)
    images = open_images(str(source), ten, "evaluation", workers=2)
    loader = evaluation(images, size=4)
    assert [len(batch["labels"]) for batch in loader] == [4, 4, 4, 4, 4, 1]
    assert len(loader) == 6
    assert torch.cat([batch["labels"] for batch in loader]).tolist() == [0] * 7 + [1] * 7 + [2] * 7
    few = evaluation(images, limit=3)
    assert sorted(torch.cat([batch["labels"] for batch in few]).tolist()) == [0, 1, 2]


def test_images_are_decoded_once_where_they_fit(
    tmp_path: Path, ten: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(str(folder(tmp_path, *"abc")), ten, "evaluation", workers=0)
    opened: list[int] = []
    own = images.source.open
    images.source.open = lambda index: opened.append(index) or own(index)

    loader = evaluation(images, size=4)
    next(iter(loader))  # a pass that is broken off keeps nothing
    first, again = list(loader), list(loader)
    assert opened == [*range(4), *range(6)]
    assert [batch["labels"].tolist() for batch in again] == [[0, 0, 1, 1], [2, 2]]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["images"], other["images"])

    held = 2 * sum(value.nbytes for value in first[0].values())
    for free, passes in ((4 * held, 1), (4 * held - 1, 2)):
        monkeypatch.setattr("gblm.vit.data.free_memory", lambda device, free=free: free)
        opened.clear()
        loader = evaluation(images, size=4)
        assert len(list(loader)) == len(list(loader)) == 2
        assert opened == passes * list(range(6))


def test_unlabelled_folder(tmp_path: Path, ten: nn.Module) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(GblmError, match=r"lies in no class folder.*--unlabelled"):
        open_images(str(tmp_path), ten, "calibration")
    images = open_images(str(tmp_path), ten, "calibration", labelled=False)
    assert list(calibration(images, 1)) == ["images"]


def test_broken_images_are_skipped_and_named(tmp_path: Path, ten: nn.Module) -> None:
    folder(tmp_path, *"ab", each=60)
    (tmp_path / "a" / "7.png").write_bytes(b"no image")
    images = open_images(str(tmp_path), ten, "calibration", workers=0)
    batch = calibration(images, 119)
    assert len(batch["images"]) == len(batch["labels"]) == 119  # the next took its place
    assert len(calibration(images, 120)["images"]) == 119
    assert list(images.broken) == ["a/7.png"]
    assert "1 broken and skipped: a/7.png (UnidentifiedImageError" in images.notes[-1]
    (tmp_path / "b" / "3.png").write_bytes(b"")
    with pytest.raises(GblmError, match=r"2 of 120 images are broken, more than 1 %.*repair"):
        list(evaluation(open_images(str(tmp_path), ten, "evaluation", workers=0)))
    few = folder(tmp_path / "few", *"ab", each=10)
    (few / "a" / "7.png").write_bytes(b"no image")
    assert sum(len(b["images"]) for b in evaluation(open_images(str(few), ten, "evaluation"))) == 19


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_arrays(tmp_path: Path, ten: nn.Module, ending: str) -> None:
    def write(**arrays: np.ndarray) -> str:
        path = tmp_path / f"x.{ending}"
        if ending == "npz":
            np.savez(path, **arrays)
        else:
            save_file({name: torch.from_numpy(value) for name, value in arrays.items()}, path)
        return str(path)

    ready = np.random.default_rng(0).normal(size=(6, 3, 32, 32)).astype(np.float32)
    source = write(images=ready, labels=np.arange(6))
    batch = next(iter(evaluation(open_images(source, ten, "evaluation"))))
    assert torch.equal(batch["images"], torch.from_numpy(ready))
    assert batch["labels"].tolist() == list(range(6))
    for shape in ((6, 40, 40, 3), (6, 3, 40, 40), (6, 40, 40)):
        pixels = np.full(shape, 255, dtype=np.uint8)
        source = write(images=pixels, labels=np.arange(6))
        batch = next(iter(evaluation(open_images(source, ten, "evaluation"))))
        torch.testing.assert_close(batch["images"], torch.ones(6, 3, 32, 32))
    with pytest.raises(GblmError, match="`images` is int64"):
        open_images(write(images=np.zeros((2, 3, 4, 4), dtype=np.int64)), ten, "x", labelled=False)
    with pytest.raises(GblmError, match="has no `labels`, only images"):
        open_images(write(images=ready), ten, "evaluation")
    with pytest.raises(GblmError, match="for 6 images; give one integer for each"):
        open_images(write(images=ready, labels=np.arange(5)), ten, "evaluation")
    with pytest.raises(GblmError, match="image 5 has label 10, outside the model's 10 classes"):
        open_images(write(images=ready, labels=np.arange(6) * 2), ten, "evaluation")


def test_parquet(tmp_path: Path, ten: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    pictures = [Image.new("RGB", (40, 40), (i, 0, 0)) for i in range(4)]
    names = datasets.ClassLabel(names=["x", "y", "z"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    rows = {"image": pictures, "label": [2, 0, 1, 2]}
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    assert labels(file, ten) == [2, 0, 1, 2]
    assert labels(tmp_path, ten) == [2, 0, 1, 2]
    with pytest.raises(GblmError, match=r"did you mean .*a\.parquet"):
        open_images(str(tmp_path / "b.parquet"), ten, "evaluation")
    without = tmp_path / "without.parquet"
    datasets.Dataset.from_dict({"n": [1]}).to_parquet(without)
    with pytest.raises(GblmError, match="no column of images, only n"):
        open_images(str(without), ten, "evaluation")


def test_shards_of_webdataset(
    tmp_path: Path, ten: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wds").mkdir()
    for shard, given in enumerate([[2, 0, 1], [9, 3]]):
        with tarfile.open(tmp_path / "wds" / f"{shard:03}.tar", "w") as tar:
            for i, label in enumerate(given):
                picture = io.BytesIO()
                Image.new("RGB", (40, 40), (i, 0, 0)).save(picture, "JPEG")
                files = {f"{shard}{i}.jpg": picture.getvalue(), f"{shard}{i}.cls": b"%d" % label}
                for name, held in files.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(held)
                    tar.addfile(entry, io.BytesIO(held))
    assert labels(tmp_path / "wds" / "000.tar", ten) == [2, 0, 1]
    assert labels(tmp_path / "wds", ten) == [2, 0, 1, 9, 3]
    (tmp_path / "junk.tar").write_bytes(b"no shard")
    with pytest.raises(GblmError, match=r"junk.tar cannot be read"):
        open_images(str(tmp_path / "junk.tar"), ten, "evaluation")


def test_a_data_set_of_the_hub(ten: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.new("RGB", (40, 40))] * 2, "label": [4, 9]}
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    for source, split in (("one/digits", "evaluation"), ("one/digits:few", "evaluation")):
        images = open_images(source, ten, split, workers=0)
        assert [batch["labels"].tolist() for batch in evaluation(images)] == [[4, 9]]
    assert (
        len(calibration(open_images("one/digits", ten, "calibration", workers=0), 2)["labels"]) == 2
    )
    assert asked == [("one/digits", "test"), ("one/digits", "few"), ("one/digits", "train")]


def test_bad_sources(tmp_path: Path, ten: nn.Module) -> None:
    with pytest.raises(GblmError, match="no image in it"):
        open_images(str(tmp_path), ten, "calibration")
    with pytest.raises(GblmError, match="is empty; give"):
        open_images("", ten, "calibration")
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(GblmError, match="is no source of images"):
        open_images(str(tmp_path / "x.txt"), ten, "calibration")
    (tmp_path / "x.npz").write_text("text")
    with pytest.raises(GblmError, match="cannot be read"):
        open_images(str(tmp_path / "x.npz"), ten, "calibration")
    source = folder(tmp_path / "many", *"abcdefghijkl", each=1)
    with pytest.raises(GblmError, match=r"k is no class of the model; .*--class-map"):
        open_images(str(source), ten, "calibration")
    images = open_images(str(folder(tmp_path / "few", "a")), ten, "calibration")
    with pytest.raises(GblmError, match="2 images there, 3 asked for; use --samples 2 or less"):
        calibration(images, 3)
    synsets = folder(tmp_path / "synsets", "n01440764", "n99999999", each=1)
    with pytest.raises(GblmError, match="n99999999 is no class of the synsets of imagenet-1k"):
        open_images(str(synsets), tiny(1000), "calibration")


def test_images_of_a_wrong_size(ten: nn.Module) -> None:
    fitting(ten, {"images": torch.zeros(2, 3, 32, 32)}, "x.npz")
    with pytest.raises(
        GblmError, match=r"x.npz: its images are 3×40×40 and the model takes 3×32×32"
    ):
        fitting(ten, {"images": torch.zeros(2, 3, 40, 40)}, "x.npz")
    with pytest.raises(GblmError, match="1×32×32"):
        fitting(ten, {"images": torch.zeros(2, 1, 32, 32)}, "x.npz")
    any_size = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    fitting(any_size, {"images": torch.zeros(2, 3, 64, 64)}, "x.npz")


@pytest.mark.skipif(not ASSETS.is_dir(), reason="GBLM_ASSETS is no folder")
def test_imagenet_mini() -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    images = open_images(str(ASSETS / "imagenet-mini" / "train"), model, "calibration")
    assert sorted(images.source.labels or []) == list(range(1000))
    batch = calibration(images, 40)
    assert batch["images"].shape == (40, 3, 224, 224)
    assert len(batch["labels"].unique()) == 40
    assert not images.notes
