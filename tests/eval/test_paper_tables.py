"""The tables of the paper: what is published, what is measured, and what stands beside what."""

import json
import sys
from pathlib import Path

import paper_tables
import published
import pytest
import quality
import torch

import gblm
from gblm import GblmError
from gblm.llm import zero_shot

L1 = "gblm(alpha=100, norm=l1)"


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for the zero-shot harness: accuracies that follow from the weights; its calls."""
    calls = []

    def open_tasks(names, data=None, limit=None):
        assert all(name in zero_shot.PAPER for name in names)
        return tuple(names), data, limit

    def accuracy(model, tokenizer, tasks):
        calls.append(tasks)
        weights = [own for own in model.parameters() if own.dim() == 2]
        zeros = sum((own == 0).sum().item() for own in weights)
        acc = 1 - zeros / sum(own.numel() for own in weights)
        found = {"acc": acc, "acc_stderr": 0.1}
        return {task: found | ({"acc_norm": 0.5} if task == "rte" else {}) for task in tasks[0]}

    monkeypatch.setattr(zero_shot, "open_tasks", open_tasks)
    monkeypatch.setattr(zero_shot, "accuracy", accuracy)
    return calls


def flags(arguments: list[str], tmp_path, *more: str) -> list[str]:
    """Return the arguments of the script for the model that those of quality.py name."""
    given = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    places = ["--store", str(tmp_path / "paper.json"), "--write", str(tmp_path / "paper.md")]
    return [given.pop("--model"), *(x for pair in given.items() for x in pair), *places, *more]


def call(monkeypatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["eval/paper_tables.py", *arguments])
    paper_tables.main()


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """Return the cells of the table below a heading, by row."""
    table = text.split(f"{heading}:\n\n")[1].split("\n\n")[0].splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {line[0]: line[1:] for line in lines if line[0] != "---"}


# --- what is published ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-2-7b-hf", "LLaMA-2-7B"),
        ("huggyllama/llama-7b", "LLaMA-1-7B"),
        ("models/Llama-2-70b-hf/", "LLaMA-2-70B"),
        ("meta-llama/Llama-2-7b-chat-hf", None),
        ("novels-6M", None),
    ],
)
def test_a_model_is_known_by_the_last_part_of_its_name(model, name):
    assert published.theirs(model) == name


def test_a_figure_is_of_one_window_pattern_and_method():
    model = "meta-llama/Llama-2-7b-hf"
    assert published.look_up(model, "perplexity", 2048, "0.5", L1) == 6.86
    assert published.look_up(model, "perplexity", 2048, "", "dense") == 5.47
    assert published.look_up("huggyllama/llama-7b", "perplexity", 2048, "2:4", L1) == 11.33
    assert published.look_up("huggyllama/llama-13b", "zero-shot", 2048, "0.5", "wanda") == 66.45
    assert published.look_up(model, "perplexity", 4096, "0.5", L1) is None
    assert published.look_up(model, "perplexity", 2048, "0.5/layer", L1) is None
    assert published.look_up(model, "perplexity", 2048, "0.5", "best") is None


def test_every_published_figure_has_a_known_source_model_and_method():
    found = published.published()
    methods = {quality.named(text, "llm")[1].name for text in gblm.METHODS}
    methods |= {"dense", "gradient(norm=l2)", "gradient(accumulated)"}
    for group in found["figures"]:
        assert group["source"] in found["sources"]
        assert group["metric"] in published.TITLES
        assert set(group["values"]) <= methods
        for values in group["values"].values():
            assert set(values) <= set(found["models"])
    names = [name for known in found["models"].values() for name in known]
    assert len(names) == len(set(names))
    text = published.text()
    assert "| wanda | 7.26 | 6.15 | 5.24 | 6.92 | 5.97 | 4.22 |" in text
    assert found["note"] in text


# --- what stands beside it ------------------------------------------------------------------------


def model_of(monkeypatch, tmp_path, *more: str) -> paper_tables.Model:
    """Return a LLaMA-2-7B whose runs are in the store, though never made."""
    args = paper_tables.parser().parse_args(
        ["x/Llama-2-7b-hf", "--methods", "wanda,gblm", "--store", str(tmp_path / "s.json"), *more]
    )
    own = paper_tables.setting(args, args.models[0], paper_tables.lengths(args.length)[0])
    runs, asked = quality.wanted(own), paper_tables.tests(args)
    for run in (None, *runs):
        for test in asked:
            metrics = {"acc": 0.25} if test.task else {"perplexity": 7.5}
            quality.add(own.store, {**test.key(own, run), "metrics": metrics})
    monkeypatch.setattr(quality, "OPEN", {})  # all is there: no model is opened
    return own, runs, asked, paper_tables.measure(own, runs, asked)


def test_published_figures_stand_beside_ours(monkeypatch, tmp_path):
    model = model_of(monkeypatch, tmp_path)
    text = paper_tables.markdown({"Llama-2-7b-hf": model}, 2048)
    found = rows(text, "Perplexity on wikitext2, window 2048, 0.5")
    assert found == {
        "method": ["Llama-2-7b-hf", "Llama-2-7b-hf, published"],
        "dense": ["7.50", "5.47"],
        "wanda": ["7.50", "6.92"],
        "gblm:alpha=100": ["7.50", "6.86"],
    }
    found = rows(text, "Perplexity on wikitext2, window 2048, 2:4")
    assert found["dense"] == ["7.50", "5.47"]
    assert found["wanda"] == ["7.50", ""]  # nobody has published it
    found = rows(text, "Zero-shot accuracy in %, mean of 6 tasks, 0.5")
    assert found["wanda"] == ["25.00", "25.00"]  # published for LLaMA-1 alone


@pytest.mark.parametrize(
    "more",
    [
        ("--length", "4096"),
        ("--windows", "8"),
        ("--evaluate", "ptb"),
        ("--patterns", "0.5/layer"),
        ("--methods", "gblm:alpha=10"),
    ],
)
def test_other_windows_tests_or_methods_stand_alone(monkeypatch, tmp_path, more):
    model = model_of(monkeypatch, tmp_path, "--patterns", "0.5", *more)
    values = paper_tables.beside(model, "perplexity", model[1][0].column)
    assert set(values) <= {quality.DENSE}
    if more[0] in ("--length", "--windows", "--evaluate"):
        assert values == {}


def test_a_mean_of_other_tasks_or_of_a_few_items_stands_alone():
    args = paper_tables.parser().parse_args(["huggyllama/llama-7b"])
    assert paper_tables.comparable(args, "zero-shot", paper_tables.tests(args))
    args.limit = 5
    assert not paper_tables.comparable(args, "zero-shot", paper_tables.tests(args))
    args.limit, args.tasks = None, "boolq,rte"
    assert not paper_tables.comparable(args, "zero-shot", paper_tables.tests(args))


# --- what is measured -----------------------------------------------------------------------------


def test_ours_are_those_of_the_api_and_are_measured_once(llm, tmp_path, monkeypatch, harness):
    more = ["--methods", "wanda,gblm", "--patterns", "0.5", "--tasks", "boolq,rte"]
    asked = flags(llm, tmp_path, *more, "--task-data", "items", "--limit", "7")
    call(monkeypatch, asked)
    once = [((task,), Path("items"), 7) for task in ("boolq", "rte")]
    assert harness == once * 3  # dense and two methods
    page = (tmp_path / "paper.md").read_text()
    model, tokenizer = gblm.llm.load(llm[2], device="cpu")
    batch = gblm.llm.windows(llm[4], model.config, tokenizer, samples=6, length=16)
    windows = gblm.llm.evaluation(llm[4], tokenizer, 16, 8)
    dense = gblm.llm.perplexity(model, windows)
    gblm.prune(model, batch, gblm.METHODS["wanda"](), "0.5")
    found = rows(page, "Perplexity on notes.txt, window 16, 0.5")
    assert found["method"] == ["tiny"]
    assert found["dense"] == [f"{dense:.2f}"]
    assert found["wanda"] == [f"{gblm.llm.perplexity(model, windows):.2f}"]
    zeros = sum((p == 0).sum().item() for p in model.parameters() if p.dim() == 2)
    acc = 100 - 100 * zeros / sum(p.numel() for p in model.parameters() if p.dim() == 2)
    found = rows(page, "Zero-shot accuracy in %, mean of 2 tasks, 0.5")
    assert found["method"] == ["tiny, acc", "tiny, acc_norm"]
    assert found["wanda"] == [f"{acc:.2f}", f"{(acc + 50) / 2:.2f}"]
    found = rows(page, "tiny, acc by task in %, the first 7 items of each")
    assert found["wanda, 0.5"] == [f"{acc:.2f}"] * 2
    assert "## Published figures" in page
    entries = json.loads((tmp_path / "paper.json").read_text())
    assert {entry["evaluate"] for entry in entries} == {llm[4], "items/boolq", "items/rte"}
    call(monkeypatch, asked)
    assert len(harness) == 6
    assert (tmp_path / "paper.md").read_text() == page


def test_tasks_are_those_of_the_harness(llm, tmp_path, monkeypatch, assets):
    name = str(assets / "llama" / "stories260K")
    more = ["--methods", "wanda", "--patterns", "0.5", "--tasks", "openbookqa", "--limit", "4"]
    own = [*llm[:2], name, *llm[3:], *more]
    call(monkeypatch, flags(own, tmp_path, "--task-data", str(assets / "zeroshot")))
    model, tokenizer = gblm.llm.load(name, device="cpu")
    found = zero_shot.zero_shot(model, tokenizer, ["openbookqa"], assets / "zeroshot", 4)
    entries = json.loads((tmp_path / "paper.json").read_text())
    dense, pruned = (e for e in entries if e["evaluate"].endswith("zeroshot/openbookqa"))
    assert dense["metrics"] == found["openbookqa"]
    assert (dense["windows"], pruned["method"], pruned["sparsity"]) == (4, "wanda", 0.5)


def test_a_second_call_does_what_is_missing(llm, tmp_path, monkeypatch, harness):
    base = ["--methods", "wanda", "--patterns", "0.5"]
    call(monkeypatch, flags(llm, tmp_path, *base, "--tasks", "none"))
    assert harness == []
    call(monkeypatch, flags(llm, tmp_path, *base, "--tasks", "boolq"))
    call(monkeypatch, flags(llm, tmp_path, *base, "--tasks", "boolq,rte"))
    assert [tasks for (tasks,), _, _ in harness] == ["boolq"] * 2 + ["rte"] * 2
    assert len(json.loads((tmp_path / "paper.json").read_text())) == 2 * 3


def test_the_text_is_kept_when_a_task_fails(llm, tmp_path, monkeypatch, harness):
    def failing(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(zero_shot, "accuracy", failing)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, flags(llm, tmp_path, "--methods", "wanda", "--tasks", "boolq"))
    (entry,) = json.loads((tmp_path / "paper.json").read_text())
    assert (entry["method"], list(entry["metrics"])) == ("dense", ["perplexity"])


def test_a_task_that_cannot_be_had_ends_before_work(llm, tmp_path, monkeypatch):
    more = ["--methods", "wanda", "--tasks", "boolq", "--task-data", str(tmp_path / "items")]
    with pytest.raises(GblmError, match="boolq"):
        call(monkeypatch, flags(llm, tmp_path, *more))
    assert list(tmp_path.iterdir()) == []


def test_windows_of_two_lengths_are_two_sections(llm, tmp_path, monkeypatch):
    arguments = [x if x != "16" else "12,16" for x in flags(llm, tmp_path, "--tasks", "none")]
    call(monkeypatch, [*arguments, "--methods", "magnitude", "--patterns", "0.5"])
    page = (tmp_path / "paper.md").read_text()
    assert "## tiny, window 12" in page
    assert "## tiny, window 16" in page
    one, two = (rows(page, f"Perplexity on notes.txt, window {n}, 0.5") for n in (12, 16))
    assert one["dense"] != two["dense"]


def test_a_length_that_is_none_is_an_error():
    for text in ("", "long", "2048,1"):
        with pytest.raises(GblmError, match="--length"):
            paper_tables.lengths(text)


def test_the_model_is_dense_again_between_methods(llm, tmp_path):
    args = quality.parser().parse_args([*llm, "--store", str(tmp_path / "s.json")])
    bench = quality.OPEN["llm"](args)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    draw = quality.prepare(bench, 0, frozenset())
    _, wanda = quality.named("wanda", "llm")
    with quality.pruning(bench, draw, wanda, gblm.maths.patterns.parse("0.5")) as done:
        assert done["sparsity"] == 0.5
        assert any((p == 0).float().mean() == 0.5 for p in bench.model.parameters())
    for name, value in bench.model.state_dict().items():
        assert torch.equal(value, before[name])
