"""Texts with labels: how rows become samples, and classifiers in the command."""

import csv
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BertConfig, PreTrainedTokenizerFast

from gblm.base import GblmError
from gblm.llm import evaluate, labelled
from gblm.llm.__main__ import main

NAMES = ["low", "middle", "high"]
METHODS = "wanda,gblm,sparsegpt,best"
SIZES = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: i for i, name in enumerate(NAMES)},
    "initializer_range": 0.5,
}
WORDS = [{"tokens": ["ab", "c", "def"], "labels": ["low", 2, "high"]}] * 20
ROWS = [{"text": f"text {'again ' * (i % 3)}{i}", "label": NAMES[i % 3]} for i in range(20)]


def config(kind: str = "Sequence", **more: object) -> BertConfig:
    return BertConfig(architectures=[f"BertFor{kind}Classification"], **SIZES | more)


def save(folder: Path, own: BertConfig, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    getattr(transformers, own.architectures[0])(own).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
        return path
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return path


def batch(row: dict, tokenizer: PreTrainedTokenizerFast, own: BertConfig) -> dict:
    return labelled.batch([("row 7", row)], own, tokenizer)


def test_rows_are_samples_padded_to_the_longest(tokenizer):
    rows = [("row 1", {"text": "ab", "label": "high"}), ("row 2", {"text": "abcd", "label": 1})]
    found = labelled.batch(rows, config(), tokenizer, length=3)
    assert found["labels"].tolist() == [2, 1]
    assert found["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert found["input_ids"][0, :2].tolist() == tokenizer("ab")["input_ids"]


def test_a_words_label_stands_at_its_first_token(tokenizer):
    found = batch(WORDS[0], tokenizer, config("Token"))
    assert found["input_ids"].shape == (1, 6)
    assert found["labels"].tolist() == [[0, -100, 2, 2, -100, -100]]


@pytest.mark.parametrize(
    ("kind", "label", "expected"),
    [
        ("single_label_classification", "2", 2),
        ("multi_label_classification", ["high", 0], [1.0, 0.0, 1.0]),
        ("regression", "0.5", 0.5),
    ],
)
def test_a_label_is_what_the_model_gives(tokenizer, kind, label, expected):
    own = config(problem_type=kind)
    assert batch({"text": "a", "label": label}, tokenizer, own)["labels"].tolist() == [expected]


@pytest.mark.parametrize(
    ("row", "own", "said"),
    [
        ({"text": "a", "label": "hihg"}, {}, "row 7: the model has no label 'hihg'; did you mean"),
        ({"text": "a", "label": 3}, {}, "or 0 to 2"),
        ({"text": "a", "label": -1}, {}, "no label -1"),
        ({"text": "a"}, {}, "row 7 has no `label`; add it, or take .*--unlabelled"),
        ({"label": 1}, {}, "row 7 has no `text`"),
        ({"tokens": ["a", "b"], "labels": [1]}, {"kind": "Token"}, "one for each of its 2"),
        ({"tokens": "a", "labels": [1]}, {"kind": "Token"}, "give `tokens`, a list of words"),
        ({"text": "a", "label": "x"}, {"problem_type": "regression"}, "'x' is no number"),
        (
            {"text": "a", "label": 1},
            {"problem_type": "multi_label_classification"},
            "several labels at once",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_named(tokenizer, row, own, said):
    with pytest.raises(GblmError, match=said):
        batch(row, tokenizer, config(**own))


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_the_accuracy_is_the_share_of_right_labels(tokenizer, kind):
    torch.manual_seed(0)
    own = config(problem_type=kind)
    model = transformers.BertForSequenceClassification(own).eval()
    several = kind.startswith("multi")
    rows = [(f"row {i}", row) for i, row in enumerate(ROWS)]
    if several:
        rows = [(place, row | {"label": [row["label"], 1]}) for place, row in rows]
    found = evaluate.classified(model, labelled.batch(rows, own, tokenizer))
    right, losses = [], []
    for row in [labelled.batch([row], own, tokenizer) for row in rows]:  # without padding
        with torch.no_grad():
            output = model(**row)
        said = output.logits > 0 if several else output.logits.argmax(dim=-1)
        right += (said == row["labels"]).flatten().tolist()
        losses.append(output.loss.item())
    assert found["accuracy"] == pytest.approx(100 * sum(right) / len(right))
    assert found["cross_entropy"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_numbers_are_judged_by_their_squared_error(tokenizer):
    torch.manual_seed(0)
    own = config(problem_type="regression", num_labels=1)
    model = transformers.BertForSequenceClassification(own).eval()
    found = labelled.batch([("row 1", {"text": "abc", "label": 3})], own, tokenizer)
    with torch.no_grad():
        expected = (model(**found).logits - 3).square().item()
    assert evaluate.classified(model, found) == {"squared_error": pytest.approx(expected)}


@pytest.mark.parametrize(
    ("kind", "name", "rows", "loaded"),
    [
        ("Sequence", "rows.csv", ROWS, transformers.AutoModelForSequenceClassification),
        ("Token", "rows.jsonl", WORDS, transformers.AutoModelForTokenClassification),
    ],
)
def test_a_classifier_is_pruned_by_every_method(kind, name, rows, loaded, tokenizer, tmp_path):
    model = save(tmp_path / "model", config(kind), tokenizer)
    source, output = write(tmp_path / name, rows), tmp_path / "pruned"
    flags = ["--model", str(model), "--samples", "16", "--calibration", str(source)]
    flags += ["--evaluate", str(source), "--method", METHODS, "--sparsity", "0.5,2:4"]
    assert main([*flags, "--output", str(output)]) == 0
    for folder in output.iterdir():
        report = json.loads((folder / "report.json").read_text())
        assert report["calibration"] == f"16 texts from {source}"
        metrics = report["evaluation"]
        assert [entry["metric"] for entry in metrics.values()] == ["accuracy", "cross_entropy"]
        pruned = loaded.from_pretrained(folder)
        own = {n: p for n, p in pruned.named_parameters() if "layer.0" in n and p.ndim > 1}
        assert all((p == 0).float().mean() >= 0.3 for p in own.values())
        found = labelled.batch([("", row) for row in rows], pruned.config, tokenizer)
        accuracy = evaluate.classified(pruned.eval(), found)["accuracy"]
        assert accuracy == pytest.approx(metrics[f"{source} accuracy"]["pruned"])


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_predictions_stand_for_labels_where_asked_for(kind, tokenizer, tmp_path, capsys):
    model = save(tmp_path / "model", config(kind), tokenizer)
    notes, output = tmp_path / "notes.txt", tmp_path / "pruned"
    notes.write_text("some words of text. " * 60)
    flags = ["--model", str(model), "--samples", "8", "--length", "16", "--method", "gblm"]
    flags += ["--calibration", str(notes), "--output", str(output)]
    assert main(flags) == 2
    assert "is no table of texts with labels" in capsys.readouterr().err
    assert main([*flags, "--unlabelled"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["notes"] == ["the calibration labels are the model's own predictions"]
    rows = [{"text": "a b"}] * 8 if kind == "Sequence" else [{"tokens": ["a", "b"]}] * 8
    flags[flags.index(str(notes))] = str(write(tmp_path / "rows.jsonl", rows))
    assert main([*flags, "--unlabelled", "--overwrite"]) == 0


def test_predictions_are_labels_of_classifiers_alone(tokenizer, tmp_path, capsys):
    own = BertConfig(architectures=["BertForMaskedLM"], **SIZES)
    model = save(tmp_path / "model", own, tokenizer)
    assert main(["--model", str(model), "--unlabelled"]) == 2
    assert "--unlabelled is for classifiers" in capsys.readouterr().err
