"""Image classifiers of transformers: loaded, pruned and saved as those of timm are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessor,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from gblm import METHODS, gradient_sums, prune
from gblm.llm.__main__ import main as prune_text
from gblm.vit import adapters, data, models
from gblm.vit.__main__ import main

SQUARE = {"height": 32, "width": 32}
SIZES: dict[str, Any] = {"num_labels": 3, "image_size": 32}
PLAIN: dict[str, Any] = SIZES | {
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
STAGES: dict[str, Any] = SIZES | {"depths": [2, 1], "num_heads": [2, 2], "embed_dim": 16}


def cropped(kind: Callable[..., Any], size: dict[str, int]) -> Any:
    return kind(size=size, do_center_crop=True, crop_size=SQUARE)


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "vit": lambda: (
        ViTForImageClassification(ViTConfig(**PLAIN)),
        ViTImageProcessor(size=SQUARE),
    ),
    "deit": lambda: (
        DeiTForImageClassification(DeiTConfig(**PLAIN)),
        cropped(DeiTImageProcessor, {"height": 36, "width": 36}),
    ),
    "deit distilled": lambda: (
        DeiTForImageClassificationWithTeacher(DeiTConfig(**PLAIN)),
        cropped(DeiTImageProcessor, {"height": 36, "width": 36}),
    ),
    "swin": lambda: (
        SwinForImageClassification(SwinConfig(**STAGES, patch_size=4, window_size=4)),
        ViTImageProcessor(size=SQUARE, image_mean=[0.4, 0.5, 0.6]),
    ),
    "dinov2": lambda: (
        Dinov2ForImageClassification(Dinov2Config(**PLAIN | {"image_size": 56})),
        cropped(BitImageProcessor, {"shortest_edge": 37}),
    ),
    "beit": lambda: (
        BeitForImageClassification(BeitConfig(**PLAIN)),
        cropped(BeitImageProcessor, {"height": 40, "width": 40}),
    ),
    "convnext": lambda: (
        ConvNextForImageClassification(
            ConvNextConfig(**SIZES, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 2, 1])
        ),
        ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    ),
}


@pytest.fixture(scope="module")
def images(noisy_pictures: Callable[[int, int], Path]) -> Path:
    """Pictures that are not square."""
    return noisy_pictures(50, 61)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random image classifier, as transformers saves it."""
    where = tmp_path_factory.mktemp("model") / "tiny"
    save(request.param, where)
    return where


def save(family: str, where: Path) -> None:
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so that the images differ in more than rounding
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(where)
    processor.save_pretrained(where)


def command(folder: Path, images: Path, *more: str) -> list[str]:
    sizes = ["--samples", "8", "--workers", "1", "--device", "cpu"]
    return ["--model", str(folder), "--calibration", str(images), *sizes, *more]


def test_images_and_logits_are_those_of_transformers(folder: Path, images: Path):
    model = models.load(str(folder))
    own = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    opened = data.open_images(str(images), model, "calibration")
    batch = next(opened.batches(range(len(opened)), len(opened)))
    pictures = [opened.source.open(index) for index in range(len(opened))]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["images"], expected)
    assert batch["images"].shape[1:] == data.input_size(model)
    with torch.no_grad():
        logits = own(expected).logits
        torch.testing.assert_close(adapters.logits(model, batch["images"]), logits)
    assert logits.std() > 0.01


def test_gradients_block_by_block_are_those_of_a_plain_backward(folder: Path, images: Path):
    model = models.load(str(folder))
    batch = data.calibration(data.open_images(str(images), model, "calibration"), samples=5)
    own = adapters.adapter(model)
    by_block, plain = (
        gradient_sums(model, batch, {"grad_abs"}, adapter=own, micro_batch=2, backward=way)
        for way in ("blocks", "model")
    )
    assert by_block.keys() == plain.keys()
    for name, statistics in by_block.items():
        torch.testing.assert_close(statistics["grad_abs"], plain[name]["grad_abs"])


@pytest.mark.parametrize("method", ["gblm", "best", pytest.param("wanda", marks=pytest.mark.slow)])
def test_pruned_weights_are_zeros_in_transformers(
    folder: Path, images: Path, tmp_path: Path, method: str
):
    output = tmp_path / "pruned"
    more = ["--method", method, "--evaluate", str(images), "--output", str(output)]
    assert main(command(folder, images, *more)) == 0
    AutoImageProcessor.from_pretrained(output)
    model, dense = (
        AutoModelForImageClassification.from_pretrained(where) for where in (output, folder)
    )
    assert type(model) is type(dense)
    blocks = adapters.blocks(model)
    matrices = {
        f"{block}.{name}": linear.weight
        for block, module in blocks.items()
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    }
    pruned = {name: weight for name, weight in matrices.items() if (weight == 0).any()}
    sizes = [sum(own.numel() for own in some.values()) for some in (pruned, matrices)]
    assert sizes[0] >= 0.95 * sizes[1]
    zeros = sum(int((weight == 0).sum()) for weight in pruned.values())
    assert zeros == pytest.approx(sizes[0] / 2, rel=0.01)
    assert set(pruned) == {
        linear["name"] for linear in json.loads((output / "report.json").read_text())["linears"]
    }
    if method != "best":
        for name, weight in model.named_parameters():
            kept = dense.get_parameter(name)
            assert torch.equal(weight, torch.where(weight == 0, 0, kept))


def test_blocks_are_layers_also_in_stages(folder: Path):
    model = models.load(str(folder))
    assert (
        2
        <= len(adapters.blocks(model))
        == sum(getattr(model.config, "depths", [model.config.num_hidden_layers]))
    )


def test_both_heads_of_a_distilled_model_are_in_its_loss(tmp_path: Path):
    save("deit distilled", tmp_path)
    model = models.load(str(tmp_path))
    batch = {"images": torch.randn(3, 3, 32, 32), "labels": torch.tensor([0, 1, 2])}
    own = adapters.adapter(model)
    with torch.no_grad():
        losses = own.loss(model, own.trunk(model, batch), batch)
        output = model(batch["images"])
    expected = [
        nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        for logits in (output.cls_logits, output.distillation_logits)
    ]
    torch.testing.assert_close(losses, (expected[0] + expected[1]) / 2)


def test_a_dry_run_and_an_offloaded_one_work_alike(images: Path, tmp_path: Path):
    save("vit", tmp_path / "tiny")
    assert main(command(tmp_path / "tiny", images, "--dry-run")) == 0
    files = []
    for offload in ("none", "cpu", "disk"):
        output = tmp_path / offload
        more = ["--method", "gblm", "--offload", offload, "--output", str(output), "--unlabelled"]
        assert main(command(tmp_path / "tiny", images, *more)) == 0
        files.append((output / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


def test_python_prunes_with_the_adapter(images: Path, tmp_path: Path):
    save("vit", tmp_path / "tiny")
    model = models.load(str(tmp_path / "tiny"))
    batch = data.calibration(data.open_images(str(images), model, "calibration"), samples=8)
    method = METHODS["wanda"]()
    prune(model, batch, method=method, pattern="0.5", adapter=adapters.adapter(model))
    models.save(model, tmp_path / "pruned")
    said: dict[str, Any] = {}
    exec(models.loading(model, tmp_path / "pruned"), said)
    with torch.no_grad():
        expected = model(batch["images"]).logits
        torch.testing.assert_close(said["model"](batch["images"]).logits, expected)
    assert type(said["processor"]) is type(model.image_processor)


def small_llama() -> nn.Module:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (small_llama, "is no image classifier: its config.json names LlamaForCausalLM"),
        (lambda: ViTModel(ViTConfig(**PLAIN)), "is no image classifier"),
        (lambda: ViTForImageClassification(ViTConfig(**PLAIN)), "image processor"),  # has none
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_other_folders_of_transformers_are_refused(
    make: Callable[[], Any],
    says: str,
    more: list[str],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    make().save_pretrained(tmp_path / "other")
    assert main(command(tmp_path / "other", images, *more)) == 2
    assert says in capsys.readouterr().err


def test_names_say_which_library_a_model_is_of(tmp_path: Path):
    save("vit", tmp_path / "tiny")
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=sizes, safe_serialization=True)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("3")
    for own in (str(tmp_path / "tiny"), f"local-dir:{tmp_path / 'tiny'}"):
        assert models.of_transformers(own) == str(tmp_path / "tiny")
    assert models.of_transformers("owner/name") == "owner/name"
    for other in ("vit_tiny_patch16_224", "hf-hub:owner/name", "./owner/name", "a/b/c"):
        assert models.of_transformers(other) is None
    for other in ("timm", "odd"):
        assert models.of_transformers(str(tmp_path / other)) is None


def test_missing_weights_and_a_checkpoint_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save("vit", tmp_path / "tiny")
    file = tmp_path / "tiny" / "model.safetensors"
    assert main(command(tmp_path / "tiny", images, "--checkpoint", str(file))) == 2
    assert "--checkpoint is for models of timm" in capsys.readouterr().err
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    more = json.dumps(config | {"num_hidden_layers": 3})
    (tmp_path / "tiny" / "config.json").write_text(more)
    assert main(command(tmp_path / "tiny", images)) == 2
    assert "weights are missing" in capsys.readouterr().err


def test_llm_refuses_image_classifiers_and_names_vit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save("vit", tmp_path / "vit")
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=sizes, safe_serialization=True)
    text = tmp_path / "notes.txt"
    text.write_text("some text\n" * 100)
    for name in ("vit", "timm"):
        for more in ([], ["--dry-run"]):
            folder = str(tmp_path / name)
            assert prune_text(["--model", folder, "--calibration", str(text), *more]) == 2
            assert "prune it by gblm vit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "crop"), [("vit", 1.0), ("deit", 32 / 36), ("dinov2", 32 / 37), ("convnext", 0.875)]
)
def test_the_crop_is_that_of_the_image_processor(family, crop, tmp_path):
    save(family, tmp_path)
    config = data.config(models.load(str(tmp_path)))
    assert config["crop_pct"] == pytest.approx(crop)
    assert config["interpolation"] in ("bilinear", "bicubic")
