"""Models that are not causal, and models that see: their losses, gradients, masks and samples."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import gblm
from gblm import methods
from gblm.base import GblmError
from gblm.llm import heads, pairs
from gblm.llm.adapters import adapter, unpad
from gblm.llm.evaluate import perplexity
from gblm.llm.models import check_causal
from gblm.walk.survey import survey

SAMPLES, LENGTH, VOCABULARY, IMAGE = 5, 8, 64, 3
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART.items()}
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=16, max_position_embeddings=32, **sizes
    )
    return transformers.BartForConditionalGeneration(config)


BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))


def classifier() -> nn.Module:
    config = transformers.BertConfig(**ENCODER, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = transformers.LlamaConfig(**ENCODER, num_key_value_heads=2)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen_vl() -> nn.Module:
    text = {**ENCODER, "num_key_value_heads": 2, "rope_parameters": {"mrope_section": [2, 1, 1]}}
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    vision |= {"out_hidden_size": 16, "patch_size": 4, "window_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=4
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def xlm() -> nn.Module:
    sizes = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
    config = transformers.XLMConfig(vocab_size=VOCABULARY, pad_index=PADDING, **sizes)
    return transformers.XLMWithLMHeadModel(config)


def prophetnet() -> nn.Module:
    sizes = {f"num_{side}_{name}": 2 for side in SIDES for name in ("layers", "attention_heads")}
    sizes |= {f"{side}_ffn_dim": 24 for side in SIDES}
    config = transformers.ProphetNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        max_position_embeddings=32,
        disable_ngram_loss=True,  # of tokens beyond the next one
        **sizes,
    )
    return transformers.ProphetNetForConditionalGeneration(config)


SIDES = ("encoder", "decoder")
PADDING = 20  # an id that XLM takes for padding wherever it stands
MODELS = {f.__name__: f for f in (t5, bart, bert, classifier, llava, qwen_vl, xlm, prophetnet)}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for own in model.parameters():
            own.copy_(torch.randn_like(own) * (0.2 if own.ndim > 1 else 0.05) + (own.ndim < 2))
    return model


def batch_of(name: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (SAMPLES, LENGTH), generator=draw)
    labels = torch.randint(5, VOCABULARY, (SAMPLES, LENGTH), generator=draw)
    if name in ("t5", "bart", "prophetnet"):
        shifted = torch.cat([torch.full((SAMPLES, 1), 2), labels[:, :-1]], dim=1)
        return {"input_ids": ids, "decoder_input_ids": shifted, "labels": labels}
    if name in ("bert", "xlm"):
        ids[:, -1] = PADDING
        labels[:, ::2] = -100
        return {"input_ids": ids, "labels": labels}
    if name == "causal":
        return {"input_ids": ids}
    if name == "classifier":
        return {"input_ids": ids, "labels": torch.arange(SAMPLES) % 3}
    if name == "llava":
        ids[:, 1:5] = IMAGE
        pixels = torch.randn(SAMPLES, 3, 8, 8, generator=draw)
        return {"input_ids": ids, "pixel_values": pixels}
    ids[:, 1:5] = IMAGE
    pixels = torch.randn(SAMPLES, 16, 3 * 2 * 4 * 4, generator=draw)
    grids = torch.tensor([[1, 4, 4]] * SAMPLES)
    kinds = (ids == IMAGE).long()
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": grids,
        "mm_token_type_ids": kinds,
    }


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_plain_autograd(name):
    model, batch = make(name), batch_of(name)
    own = adapter(model)
    linears = [x for block in survey(model, batch, own) for x in block.linears]
    found = gblm.gradient_sums(model, batch, ["grad_abs"], micro_batch=2, backward="blocks")
    expected = {linear.name: torch.zeros(linear.shape) for linear in linears}
    for i in range(SAMPLES):
        model.zero_grad()
        one = {key: value[i : i + 1] for key, value in batch.items()}
        own.loss(model, own.trunk(model, one), one).sum().backward()
        for linear in linears:
            expected[linear.name] += linear.matrix.view(linear.parameter.grad).abs()
    scale = max(total.max().item() for total in expected.values())
    for key, total in expected.items():
        torch.testing.assert_close(found[key]["grad_abs"], total, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("name", [*MODELS])
def test_the_loss_is_the_models_own(name):
    model, batch = make(name), batch_of(name)
    own = adapter(model)
    given = {key: value for key, value in batch.items() if key != "labels"}
    if name == "qwen_vl":
        given["pixel_values"] = given["pixel_values"].flatten(0, 1)
    if name == "xlm":
        given["lengths"] = torch.full((SAMPLES,), LENGTH)
    with torch.no_grad():
        expected = model(**given, labels=batch.get("labels", batch["input_ids"])).loss
        losses = own.loss(model, own.trunk(model, batch), batch)
    assert losses.shape == (SAMPLES,)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-4, atol=1e-5)
    assert perplexity(model, batch) == pytest.approx(expected.exp().item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_the_config_says_what_a_classifier_gives(kind):
    torch.manual_seed(0)
    config = transformers.BertConfig(**ENCODER, num_labels=3, problem_type=kind)
    model = transformers.BertForSequenceClassification(config).eval()
    batch, own = batch_of("classifier"), adapter(model)
    batch["labels"] = torch.randint(2, (SAMPLES, 3)).float()
    with torch.no_grad():
        losses = own.loss(model, own.trunk(model, batch), batch)
        torch.testing.assert_close(losses.mean(), model(**batch).loss)
    del batch["labels"]
    if kind == "regression":
        with pytest.raises(GblmError, match="gives numbers, not classes, and needs labels"):
            gblm.gradient_sums(model, batch, ["grad_abs"])
        gblm.prune(model, batch, methods.make("wanda"), "0.5")
    else:
        assert gblm.gradient_sums(model, batch, ["grad_abs"])


@pytest.mark.parametrize("method", ["wanda", "gblm", "sparsegpt", "best"])
@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_the_blocks_is_pruned(name, method):
    model, batch = make(name), batch_of(name)
    options = {"allocation": None} if method == "best" else {}
    report = gblm.prune(model, batch, methods.make(method, **options), "0.5/row")
    assert report.weights >= 0.95 * report.block_weights, report.dense
    assert all(linear.sparsity == pytest.approx(0.5, abs=0.05) for linear in report.linears)
    assert all(own.isfinite().all() for own in model.parameters())


def test_a_model_without_a_head_is_pruned_by_what_its_blocks_see():
    torch.manual_seed(0)
    model, batch = transformers.BertModel(transformers.BertConfig(**ENCODER)), batch_of("causal")
    report = gblm.prune(model.eval(), batch, methods.make("sparsegpt"), "0.5")
    assert report.weights >= 0.95 * report.block_weights
    for backward in ("blocks", "auto"):
        with pytest.raises(GblmError, match="has no head, and so no loss"):
            gblm.prune(model, batch, methods.make("gblm"), "0.5", backward=backward)


def test_a_class_that_does_something_else_is_refused():
    config = transformers.PreTrainedConfig(architectures=["Speech2TextForConditionalGeneration"])
    with pytest.raises(GblmError, match="does not know what a Speech2TextForConditionalGeneration"):
        heads.head(config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LlamaForCausalLM", heads.CAUSAL),
        ("SiglipModel", heads.BARE),
        ("T5ForConditionalGeneration", heads.TARGET),
        ("BertForMaskedLM", heads.MASKED),
        ("BertForSequenceClassification", heads.CLASSES),
        ("LlavaForConditionalGeneration", heads.PICTURES),
        ("OfNoLibrary", heads.CAUSAL),
    ],
)
def test_the_config_decides_the_class(name, expected):
    assert heads.head(transformers.PreTrainedConfig(architectures=[name])) == expected


class Words:
    mask_token_id = 4


def test_a_masked_model_is_asked_for_what_is_masked():
    ids = torch.arange(100, 180).view(2, 40)
    config = transformers.BertConfig(architectures=["BertForMaskedLM"])
    batch = heads.samples_of(ids, config, Words(), seed=1)
    masked = batch["input_ids"] == 4
    assert masked.any(dim=1).all()
    assert torch.equal(batch["labels"][masked], ids[masked])
    assert (batch["labels"][~masked] == -100).all()
    assert torch.equal(batch["input_ids"][~masked], ids[~masked])


def test_an_encoder_decoder_goes_on_with_the_second_half():
    ids = torch.arange(16).view(2, 8)
    config = transformers.T5Config(
        architectures=["T5ForConditionalGeneration"], decoder_start_token_id=0
    )
    batch = heads.samples_of(ids, config, Words())
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert batch["labels"].tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert batch["decoder_input_ids"].tolist() == [[0, 4, 5, 6], [0, 12, 13, 14]]


def test_a_target_is_cut_by_its_own_mask():
    batch = {
        "input_ids": torch.arange(8).view(2, 4),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "decoder_input_ids": torch.arange(10, 18).view(2, 4),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.arange(20, 28).view(2, 4),
    }
    first, second = unpad(batch)
    assert first["labels"].tolist() == [[20, 21, 22]]
    assert first["decoder_input_ids"].tolist() == [[10, 11, 12]]
    assert second["input_ids"].tolist() == [[4, 5]]
    assert second["labels"].tolist() == [[24, 25, 26, 27]]


# Files of pairs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "text": "what", "answer": "x"}, {"image": "a.png", "text": "y"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_pairs_are_read(source):
    assert pairs.is_pairs(str(source))
    first, second = pairs.read(str(source))
    assert (first.text, first.answer, second.answer) == ("what", "x", "")
    assert first.file.is_file()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"line 1 is no pair"),
        ('{"text": "x"}', r"line 1 is no pair"),
        ('{"image": "b.png", "text": "x"}', r"b\.png is not there"),
    ],
)
def test_a_line_that_is_no_pair_is_named(source, line, said):
    source.write_text(line + "\n")
    with pytest.raises(GblmError, match=said):
        pairs.read(str(source))


def test_a_text_file_holds_no_pairs(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "an image"}\n')
    assert not pairs.is_pairs(str(tmp_path / "text.jsonl"))
    assert not pairs.is_pairs("c4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_looks_at_later_tokens_is_no_causal_model(dtype, make_llama):
    """A masked model whose config names no class is loaded as a causal one."""
    torch.manual_seed(0)
    looks = transformers.BertLMHeadModel(
        transformers.BertConfig(**ENCODER, is_decoder=False, initializer_range=0.2)
    )
    batch = {"input_ids": torch.arange(LENGTH)[None]}
    with pytest.raises(GblmError, match="depends on later ones"):
        check_causal(looks.eval().to(dtype), batch)
    check_causal(make_llama(dtype), batch)
