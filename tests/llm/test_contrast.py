"""CLIP and SigLIP: the gradients of a loss that compares samples, and top-1 of classes by text."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

import gblm
from gblm.base import GblmError
from gblm.llm import contrast, pairs
from gblm.llm.__main__ import main
from gblm.llm.adapters import adapter
from gblm.walk.survey import survey

SAMPLES, LENGTH = 6, 9
END = 2  # the id whose position CLIP reads
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
TEXT = SIZES | {"vocab_size": 256, "max_position_embeddings": 32}
VISION = SIZES | {"image_size": 8, "patch_size": 4}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def clip() -> nn.Module:
    text = TEXT | {"eos_token_id": END, "bos_token_id": 1, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return transformers.CLIPModel(config)


def siglip() -> nn.Module:
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    model = transformers.SiglipModel(config)
    with torch.no_grad():
        model.logit_bias.fill_(-1)
        model.logit_scale.fill_(1)
    return model


def altclip() -> nn.Module:
    text = TEXT | {"project_dim": 16, "pad_token_id": 0}
    config = transformers.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return transformers.AltCLIPModel(config)


def chinese_clip() -> nn.Module:
    towers = {"text_config": TEXT, "vision_config": VISION}
    config = transformers.ChineseCLIPConfig(**towers, projection_dim=16)
    return transformers.ChineseCLIPModel(config)  # its tower of texts pools nothing


MODELS = {"clip": clip, "siglip": siglip}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {"altclip": altclip, "chinese": chinese_clip, **MODELS}[name]().eval()


def batch_of(name: str) -> dict[str, torch.Tensor]:
    """Return pairs, whose texts have several lengths where the model has a mask."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 256, (SAMPLES, LENGTH), generator=draw)
    pixels = torch.randn(SAMPLES, 3, 8, 8, generator=draw)
    ids[:, -1] = END
    batch = {"input_ids": ids, "pixel_values": pixels}
    if name == "siglip":
        return batch
    ids[1:3, -3:] = torch.tensor([END, 0, 0])
    return batch | {"attention_mask": (ids != 0).long()}


def batch_gradients(model: nn.Module, batch: dict, linears: list) -> dict[str, torch.Tensor]:
    """Return the gradients of the model's own loss of the batch, summed over its pairs."""
    model.zero_grad()
    (SAMPLES * model(**batch, return_loss=True).loss).backward()
    return {own.name: own.matrix.view(own.parameter.grad).clone() for own in linears}


def pooled(model: nn.Module, batch: dict) -> dict[nn.Module, torch.Tensor]:
    """Return what the towers give."""
    found = {}
    for tower in (model.text_model, model.vision_model):
        tower.register_forward_hook(
            lambda module, args, output: found.update({module: output.pooler_output})
        )
    model(**batch)
    for tower in found:
        tower._forward_hooks.clear()
    return found


def loss(model: nn.Module, batch: dict, given: dict | None = None) -> torch.Tensor:
    """Return the model's own loss, summed over the pairs; given: what the towers give."""
    with contrast.replayed({m: {"pooler_output": own} for m, own in (given or {}).items()}):
        return SAMPLES * model(**batch, return_loss=True).loss


def gradients(model: nn.Module, total: torch.Tensor, linears: list) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {own.name: own.matrix.view(own.parameter.grad).clone() for own in linears}


@pytest.mark.parametrize("name", MODELS)
def test_a_samples_gradient_is_what_goes_through_its_own_activations(name):
    model = make(name).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(name).items()}
    linears = [x for block in survey(model, batch, adapter(model)) for x in block.linears]
    with torch.no_grad():
        dense = pooled(model, batch)
    samples = []
    for i in range(SAMPLES):  # sample i alone has a graph, what the others give are numbers
        live = pooled(model, {key: value[i : i + 1] for key, value in batch.items()})
        given = {m: torch.cat([own[:i], live[m], own[i + 1 :]]) for m, own in dense.items()}
        samples.append(gradients(model, loss(model, batch, given), linears))
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    for key, value in gradients(model, loss(model, batch), linears).items():
        close(sum(one[key] for one in samples), value)
    for backward, micro in (("blocks", 2), ("model", 3), ("blocks", 1)):
        options = {"backward": backward, "micro_batch": micro}
        found = gblm.gradient_sums(model, batch, ["grad_abs"], **options)
        for own in linears:
            close(found[own.name]["grad_abs"], sum(one[own.name].abs() for one in samples))


@pytest.mark.parametrize("name", [*MODELS, "altclip", "chinese"])
def test_the_batch_of_the_loss_is_the_whole_one(name, monkeypatch):
    monkeypatch.setattr(contrast, "TOGETHER", 2)
    model, batch = make(name), batch_of(name)
    output = model(**batch, return_loss=True)
    embeddings = [output.text_embeds, output.image_embeds]
    expected = torch.autograd.grad(SAMPLES * output.loss, embeddings)
    found = adapter(model).coupled(model, batch)
    torch.testing.assert_close(found["gradient_of_text_embeds"], expected[0])
    torch.testing.assert_close(found["gradient_of_image_embeds"], expected[1])


@pytest.mark.parametrize("counts", [(3, 3), (4, 2), (1, 5)])
def test_the_batch_of_the_loss_is_that_of_all_processes(counts, monkeypatch):
    model, batch = clip(), batch_of("clip")
    expected = adapter(model).coupled(model, batch)
    values: list[list] = [[], []]
    for rank in (0, 1, 0):  # the first time, process 0 knows nothing of the other
        at = iter(range(100))

        def gathered(value, rank=rank, at=at):
            i = next(at)
            values[rank][i:] = [value]
            return [own[i] if i < len(own) else value for own in values]

        monkeypatch.setattr("gblm.machine.processes.world", lambda: 2)
        monkeypatch.setattr("gblm.machine.processes.rank", lambda rank=rank: rank)
        monkeypatch.setattr("gblm.machine.processes.gathered", gathered)
        part = slice(0, counts[0]) if rank == 0 else slice(counts[0], SAMPLES)
        found = adapter(model).coupled(model, {key: own[part] for key, own in batch.items()})
        for key, value in expected.items():
            if rank or len(values[1]) > 1:
                torch.testing.assert_close(found[key], value[part], msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_some_of_the_samples_are_compared_with_all(name, monkeypatch):
    monkeypatch.setattr("gblm.walk.gradients.FEWEST", 1)
    model, batch = make(name), batch_of(name)
    own = adapter(model)
    some = {key: value[: SAMPLES // 2] for key, value in own.coupled(model, batch).items()}
    alone = replace(own, coupled=lambda model, batch: batch)
    expected = gblm.gradient_sums(model, some, ["grad_abs"], adapter=alone)
    found = gblm.gradient_sums(model, batch, ["grad_abs"], share=0.5)
    for key, value in expected.items():
        assert found[key].differentiated == SAMPLES // 2
        torch.testing.assert_close(found[key]["grad_abs"], value["grad_abs"])


def words(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with tokens to fill up and to end with."""
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)))
    made.pad_token, made.eos_token = "Ā", "Ă"
    return made


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one colour in a folder for each, and a file of lines of them with texts."""
    where = tmp_path_factory.mktemp("pictures")
    lines = []
    for name, colour in COLOURS.items():
        (where / "shown" / name).mkdir(parents=True)
        for i in range(6):
            path = f"shown/{name}/{i}.png"
            Image.new("RGB", (8, 8), tuple(x * (20 - i) // 20 for x in colour)).save(where / path)
            lines.append({"image": path, "text": f"{name} {i}", "label": name})
    (where / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return where


def save(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    make(name).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    if name == "clip":
        images = transformers.CLIPImageProcessor(size=size, crop_size=size)
        transformers.CLIPProcessor(images, words(tokenizer)).save_pretrained(folder)
    else:
        images = transformers.SiglipImageProcessor(size=size)
        transformers.SiglipProcessor(images, words(tokenizer)).save_pretrained(folder)
    return folder


ALL = ("wanda,gblm,sparsegpt,best", "0.5,2:4")


@pytest.mark.parametrize(
    ("name", "method", "pattern"),
    [
        ("clip", "gblm", "0.5"),
        ("siglip", "best", "2:4"),
        pytest.param("clip", *ALL, marks=pytest.mark.slow),
        pytest.param("siglip", *ALL, marks=pytest.mark.slow),
    ],
)
def test_the_command_prunes_both_towers(name, method, pattern, square, tokenizer, tmp_path):
    model, output = save(tmp_path / "model", name, tokenizer), tmp_path / "pruned"
    source = str(square / "pairs.jsonl")
    flags = ["--model", str(model), "--samples", "16", "--calibration", source]
    flags += ["--evaluate", f"{source},{square / 'shown'}", "--sparsity", pattern]
    assert main([*flags, "--method", method, "--output", str(output)]) == 0
    results = [path.parent for path in output.rglob("report.json")]
    assert len(results) == len(method.split(",")) * len(pattern.split(","))
    for folder in results:
        report = json.loads((folder / "report.json").read_text())
        assert report["calibration"] == f"16 pairs from {source}"
        own = {linear["name"].partition(".")[0] for linear in report["linears"]}
        assert own == {"text_model", "vision_model"}
        pruned = transformers.AutoModel.from_pretrained(folder)
        processor = transformers.AutoProcessor.from_pretrained(folder)
        assert pruned.text_model.encoder.layers[0].mlp.fc1.weight.eq(0).float().mean() > 0.3
        for place in (source, str(square / "shown")):
            entry = report["evaluation"][place]
            known = contrast.classes(place, "a photo of a {}.")
            assert known.texts == [f"a photo of a {name}." for name in sorted(COLOURS)]
            assert entry["metric"] == "top1"
            assert entry["pruned"] == pytest.approx(contrast.top1(pruned, known, processor))


def test_weights_may_be_away(square, tokenizer, tmp_path):
    model, source = save(tmp_path / "model", "siglip", tokenizer), str(square / "pairs.jsonl")
    flags = ["--model", str(model), "--samples", "8", "--calibration", source]
    flags += ["--evaluate", source, "--method", "gblm"]
    results = []
    for offload in ("none", "disk"):
        output = tmp_path / offload
        assert main([*flags, "--offload", offload, "--output", str(output)]) == 0
        results.append((output / "model.safetensors").read_bytes())
        results.append(json.loads((output / "report.json").read_text())["evaluation"])
    assert results[:2] == results[2:]


@pytest.mark.parametrize("name", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_a_dry_run_takes_texts_of_several_lengths(name, square, tokenizer, tmp_path):
    model, source = save(tmp_path / "model", name, tokenizer), str(square / "pairs.jsonl")
    flags = ["--model", str(model), "--samples", "8", "--calibration", source]
    assert main([*flags, "--method", "gblm", "--dry-run"]) == 0


def test_top1_is_by_the_models_own_logits(square, tokenizer, tmp_path):
    save(tmp_path, "siglip", tokenizer)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    known = contrast.classes(str(square / "shown"), "{}")
    assert known.texts == sorted(COLOURS)
    text = pairs.words(known.texts, processor, model.config)
    assert text.keys() == {"input_ids"}
    assert text["input_ids"].shape == (3, 32)  # filled up to what the model takes
    with torch.no_grad():
        said = model(**text, **pairs.pictures(known.images, processor)).logits_per_image
    right = said.argmax(dim=1) == torch.tensor(known.labels)
    assert contrast.top1(model, known, processor) == pytest.approx(100 * right.float().mean())


def test_a_choice_of_pictures_keeps_all_classes(square):
    some = contrast.classes(str(square / "shown"), "{}", limit=5)
    assert len(set(some.images)) == len(some.labels) == 5
    assert some.texts == sorted(COLOURS)
    assert [some.texts[i] for i in some.labels] == [path.parent.name for path in some.images]


def test_what_has_no_classes_is_refused(square, tmp_path):
    with pytest.raises(GblmError, match="no place for a name"):
        contrast.classes(str(square / "shown"), "a photo")
    with pytest.raises(GblmError, match="has no pictures"):
        contrast.classes("c4", "{}")
    with pytest.raises(GblmError, match="holds 0 classes"):
        contrast.classes(str(tmp_path), "{}")
