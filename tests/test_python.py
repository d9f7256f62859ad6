"""Pruning from Python as people try it first: names, data in any form, wrappers, masks."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import gblm
from gblm import GblmError, llm
from gblm.report import versions

WINDOWS = {"input_ids": torch.randint(3, 60, (6, 12), generator=torch.Generator().manual_seed(0))}


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: own == 0 for name, own in model.named_parameters() if own.ndim > 1}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(zeros(one).values(), zeros(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def pruned(make_llama):
    model = make_llama()
    gblm.prune(model, WINDOWS, "wanda", "2:4")
    return model


METHODS = {
    "names": ("wanda", "2:4"),
    "values": (gblm.METHODS["wanda"](), gblm.nm(2, 4)),
    "a dict": ("wanda", {"*": "2:4"}),
}


@pytest.mark.parametrize("form", METHODS)
def test_methods_and_patterns_by_name_or_value(form, make_llama, pruned):
    model = make_llama()
    gblm.prune(model, WINDOWS, *METHODS[form])
    assert same(model, pruned)


def test_the_method_is_best_and_half_is_pruned(llama):
    report = gblm.prune(llama, WINDOWS)
    assert report.method == "best"
    assert abs(report.sparsity - 0.5) < 0.01
    assert repr(report) == f"<best, 0.5/layer: {report.sparsity:.4f} of {report.weights:,} weights>"


class Rows(list):
    """What a `datasets.Dataset` of token ids or texts looks like."""

    def __init__(self, **columns: list) -> None:
        super().__init__(
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        )
        self.columns, self.column_names = columns, list(columns)

    def __getitem__(self, name):
        return self.columns[name] if isinstance(name, str) else super().__getitem__(name)


IDS = WINDOWS["input_ids"]
PADDED = torch.cat([torch.zeros(6, 5, dtype=torch.long), IDS], dim=1)
MASK = torch.cat([torch.zeros(6, 5), torch.ones(6, 12)], dim=1).long()
DATA = {
    "a tensor": IDS,
    "int32": {"input_ids": IDS.int()},
    "int16": {"input_ids": IDS.short()},
    "lists": {"input_ids": IDS.tolist()},
    "padding on the left": {"input_ids": PADDED, "attention_mask": MASK},
    "padding on the right": {"input_ids": PADDED.roll(-5, 1), "attention_mask": MASK.roll(-5, 1)},
    "batches": [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}],
    "a DataLoader": DataLoader([{"input_ids": ids} for ids in IDS], batch_size=4),
    "a DataLoader of tensors": DataLoader(IDS, batch_size=4),
    "a data set": Rows(input_ids=IDS.tolist(), number=[*range(6)]),
}


@pytest.mark.parametrize("form", DATA)
def test_data_in_every_form_give_the_same_masks(form, make_llama, pruned):
    model = make_llama()
    gblm.prune(model, DATA[form], "wanda", "2:4")
    assert same(model, pruned)


def test_texts_are_samples_with_their_tokenizer(llm, tokenizer):
    texts = ["a short text", "another one, which is longer", "and a third"]
    model, _ = gblm.llm.load(llm[llm.index("--model") + 1])
    other, _ = gblm.llm.load(llm[llm.index("--model") + 1])
    tokenizer.pad_token = "!"
    gblm.prune(model, texts, "gblm", "0.5", tokenizer=tokenizer)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        padded = tokenizer(texts, padding=True, return_tensors="pt")
        gblm.prune(other, padded, "gblm", "0.5")
        assert same(model, other)
        other, _ = gblm.llm.load(llm[llm.index("--model") + 1])
    gblm.prune(other, Rows(text=texts), "gblm", "0.5", tokenizer=tokenizer, progress=True)
    assert same(model, other)


def test_some_linears_have_patterns_of_their_own(llama):
    patterns = {"*.down_proj": 0.25, "*.q_proj": None, "*.up_proj": "2:4", "*": "0.5"}
    report = gblm.prune(llama, WINDOWS, "wanda", patterns)
    shares = {linear.name.rpartition(".")[2]: linear.sparsity for linear in report.linears}
    assert shares["down_proj"] == 0.25
    assert shares["up_proj"] == shares["k_proj"] == 0.5
    assert "q_proj" not in shares
    up = llama.model.layers[0].mlp.up_proj.weight.reshape(-1, 4)
    assert ((up == 0).sum(dim=1) == 2).all()


def test_linears_are_chosen_by_name(llama):
    report = gblm.prune(llama, WINDOWS, "wanda", include="*.mlp.*", exclude=["*.up_proj"])
    kinds = {linear.name.rpartition(".")[2] for linear in report.linears}
    assert kinds == {"gate_proj", "down_proj"}
    with pytest.raises(GblmError, match=r"did you mean '\*.down_proj'"):
        gblm.prune(llama, WINDOWS, "wanda", exclude="down_proj")


WRONG = {
    "an uncalled factory": ((WINDOWS, gblm.METHODS["wanda"]), {}, "call its factory"),
    "a misspelt method": ((WINDOWS, "wnda"), {}, "did you mean 'wanda'"),
    "a pattern that is none": ((WINDOWS, "wanda", [2, 4]), {}, r"give 0.5, '2:4' or gblm.nm"),
    "another word": ((WINDOWS, "wanda"), {"sparsity": 0.5}, "prune takes no sparsity= "),
    "texts alone": ((["a text"], "wanda"), {}, "pass tokenizer="),
    "nothing": (([], "wanda"), {}, "hold no sample"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_says_the_way_out(case, llama):
    given, options, message = WRONG[case]
    with pytest.raises(GblmError, match=message):
        gblm.prune(llama, *given, **options)


def test_wrapped_models_are_unwrapped(make_llama, pruned):
    for wrap in (nn.DataParallel, torch.compile):
        model = make_llama()
        gblm.prune(wrap(model), WINDOWS, "wanda", "2:4")
        assert same(model, pruned)


def test_images_in_every_form(vit):
    from gblm import vit as side

    name = vit[vit.index("--model") + 1]
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    own = side.models.predicted(side.models.load(name), {"images": images})["labels"]
    forms = {
        "a pair": (images, own),
        "pixel_values": {"pixel_values": images, "labels": own},
        "a DataLoader": DataLoader(list(zip(images, own, strict=True)), batch_size=4),
        "no labels": images,
    }
    expected = side.models.load(name)
    gblm.prune(expected, {"images": images, "labels": own}, "gblm")
    for form, data in forms.items():
        model = side.models.load(name)
        gblm.prune(model, data, "gblm")
        assert same(model, expected), form
    with pytest.raises(GblmError, match="no images"):
        gblm.prune(expected, {"labels": labels}, "gblm")


# Masks, and zeros that stay


def test_masks_of_a_report_and_of_a_model(llama):
    report = gblm.prune(llama, WINDOWS, "wanda", "0.5", include="*.mlp.*")
    masks = report.masks()
    assert {f"{name}.weight" for name in masks} == set(gblm.masks(llama))
    for name, keep in masks.items():
        assert torch.equal(keep, llama.get_submodule(name).weight != 0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(**WINDOWS, labels=IDS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("by", ["optimizer", "gradients"])
def test_zeros_stay_while_a_model_is_trained(kind, by, pruned):
    before = gblm.masks(pruned)
    dense = pruned.model.layers[0].mlp.up_proj.weight.clone()
    optimizer = kind(pruned.parameters(), lr=0.01)
    with gblm.frozen_zeros(pruned, optimizer if by == "optimizer" else None) as keep:
        train(pruned, optimizer)
    assert keep.keys() == before.keys()
    assert all(((pruned.get_parameter(name) == 0) >= ~own).all() for name, own in before.items())
    assert not torch.equal(dense, pruned.model.layers[0].mlp.up_proj.weight)
    train(pruned, optimizer)  # no longer
    assert not any((pruned.get_parameter(name) == 0)[~own].all() for name, own in before.items())


def test_zeros_stay_under_a_trainer(pruned, tmp_path):
    before = gblm.masks(pruned)
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    options = {"num_train_epochs": 1, "learning_rate": 0.1, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), **options, save_strategy="no")
    dense = pruned.model.layers[0].mlp.up_proj.weight.clone()
    Trainer(pruned, arguments, train_dataset=rows, callbacks=[llm.FrozenZeros()]).train()
    assert all(((pruned.get_parameter(name) == 0) >= ~own).all() for name, own in before.items())
    assert not torch.equal(dense, pruned.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("method", ["sparsegpt", "best", "admm"])
def test_a_pruned_model_keeps_its_zeros(method, make_llama, pruned):
    before = gblm.masks(pruned)
    report = gblm.prune(pruned, WINDOWS, method, "0.25")
    assert all(((pruned.get_parameter(name) == 0) >= ~own).all() for name, own in before.items())
    assert report.sparsity >= 0.5
    assert any("zeros were kept" in linear.note for linear in report.linears)


def test_adapters_of_peft_are_never_pruned(make_llama):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_llama(), config)
    report = gblm.prune(model, WINDOWS, "wanda", "0.5")
    assert not any("lora" in linear.name for linear in report.linears)
    own = {name: x for name, x in model.named_parameters() if "lora" in name}
    assert own
    assert all((x != 0).all() for x in own.values())
    q = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert (q == 0).float().mean() == 0.5


def test_the_package_has_a_version():
    assert gblm.__version__ == versions()["gblm"]
    assert not hasattr(gblm, "nothing")
