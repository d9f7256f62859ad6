"""The pages: what they say, that nothing given can break out, that they need nothing else."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gblm.base import GblmError
from gblm.report import Example, Gain, Mask, Report
from gblm.report.page import common, comparison_page, folded, run_page, write_pages

HOSTILE = "<script>alert(1)</script>\"'&"


class Parsed(HTMLParser):
    """The text of a page, its tags, and whatever it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.loads, self.links = "", [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
                (self.links if tag == "a" else self.loads).append(value)
            if name == "style":
                self.loads += re.findall(r"url\((.*?)\)", value)

    def handle_data(self, data):
        self.loads += re.findall(r"url\((.*?)\)|@import\s+(\S+)", data)
        self.text += data


class Said(str):
    """The text of a page, in which white space makes no difference."""

    def __contains__(self, words: str) -> bool:
        return self.index(words, must=False) >= 0

    def index(self, words: str, must: bool = True) -> int:
        found = "".join(self.split()).find("".join(words.split()))
        assert found >= 0 or not must, words
        return found


def said(page: str) -> Said:
    return Said(Parsed(page).text)


def test_a_run_is_told(make_report):
    text = said(run_page(make_report()))
    for words in (
        "tiny-llama, pruned to 50.0 % sparsity with the method gblm(alpha=100, norm=l1):",
        "perplexity 48.6 → 49.3 (+1.4 %), almost unchanged",
        "Measured on notes.txt. Lower is better.",
        "12,288 weights are zero, 0.2 % of the model's 5.83 million",
        "12 linear layers pruned, in 6 blocks",
        "embeddings, head, norms, biases; 1 linear layer: excluded (layers.0.mlp.up_proj)",
        "16 windows of 256 from notes.txt",
        "1.23 GB peak memory",
        "Once upon",
        "a time there lived",
        "python -m gblm.llm --model models/tiny-llama",
        "Seed 7",
        "Add --output DIR to the command",
    ):
        assert words in text


def test_the_worst_linears_come_first(make_report):
    page = run_page(make_report())
    table = page[page.index("Layers with the largest error</h2>") :].split("</table>")[0]
    errors = [float(x) for x in re.findall(r'%">([\d.]+)\u00a0%', table)]
    assert len(errors) == 10
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == 6.1


def test_vision_shows_images_and_all_metrics(vision):
    page = Parsed(run_page(vision))
    assert page.tags.count("img") == 1
    text = said(run_page(vision))
    assert "top-1 89.2 % → 82.6 % (−6.6 points), clearly worse" in text
    assert "dense: goldfish ✓ pruned: tench" in text
    assert "Quality before and after" in text


def test_standard_errors_are_shown(make_report):
    value = {"metric": "acc", "dense": 0.62, "pruned": 0.6, "dense_stderr": 0.011}
    text = said(run_page(make_report(evaluation={"boolq acc": value})))
    assert "accuracy 62.0 ± 1.1 % → 60.0 % (−2.0 points), no significant change" in text


def test_a_result_says_how_it_is_loaded(make_report):
    page = run_page(make_report(loading="model = load('a & b')"))
    assert "<pre>model = load(&#39;a &amp; b&#39;)</pre>" in page


def test_speed_and_size_are_shown_and_no_gain_is_said(make_report):
    speed = {
        "forward of 1": {"unit": "s", "dense": 0.05, "pruned": 0.0505},
        "file": {"unit": "B", "dense": 2e6, "pruned": 1e6},
    }
    text = said(run_page(make_report(speed=speed)))
    assert "forward of 1 50\u00a0ms 50.5\u00a0ms no gain" in text
    assert "file 2\u00a0MB 1\u00a0MB × 0.50" in text


def test_what_zeros_buy_is_shown(make_report):
    own = Gain([8, 4], 3, 128, "bfloat16", {"bfloat16": 0.01, "int8": 0.005, "CSR": 0.05})
    text = said(run_page(make_report(gains=[own])))
    assert "layers vectors bfloat16 int8 CSR 3 of 8 × 4 128 10\u00a0ms × 0.50 no gain" in text


def test_an_uneven_allocation_is_told(make_report):
    report = make_report(allocation="owl(m=5, lam=0.08)")
    assert "the same sparsity in every layer" in said(run_page(report))
    report.linears[0].sparsity, report.linears[3].sparsity = 0.3, 0.7
    text = said(run_page(report))
    assert "from 30.0 % in layers.0.self_attn.q_proj to 70.0 % in layers.1.mlp.down_proj" in text


def test_a_map_of_one_colour_is_left_out(make_report):
    report = make_report()
    assert "Sparsity by layer" not in run_page(report)
    report.linears[0].sparsity = 0.3
    assert "Sparsity by layer" in run_page(report)


def test_where_when_and_on_what_it_ran(make_report):
    value = {"metric": "perplexity", "dense": 48.6, "pruned": 49.3}
    value |= {"count": 1060, "of": "windows of 256 tokens"}
    report = make_report(
        evaluation={"notes.txt": value},
        device="cuda:0, a GPU",
        dtype="bfloat16",
        date="2030-01-02 03:04",
        architecture="LlamaForCausalLM",
        file_bytes=269_000_000,
        file_zeros=0.39,
        program="gblm llm",
    )
    text = said(run_page(report))
    for words in (
        "Measured on notes.txt, 1,060 windows of 256 tokens.",
        "1.23 GB peak memory, on cuda:0, a GPU, weights in bfloat16",
        "Date 2030-01-02 03:04",
        "pruning report · LlamaForCausalLM",
        "LlamaForCausalLM with 5.83 million parameters",
        "Size on disk 269 MB of weights; 39.0 % of the numbers are zeros",
        "gblm llm --config config.toml --output DIR",
    ):
        assert words in text


def test_of_n_and_m_single_weights_are_seen(make_report):
    kept = base64.b64encode(bytes([255, 255, 0, 0] * 64)).decode()
    corner = {"layers.5.mlp.down_proj": Mask(16, 16, kept, corner=True)}
    text = said(run_page(make_report(pattern="2:4", pictures=corner)))
    assert "Each cell is one of the first weights" in text
    assert "Of the 4 between two lines, 2 stay." in text


def test_a_long_command_is_broken_before_its_flags():
    command = "gblm llm --model a/b --calibration c --evaluate d --sparsity 0.5,2:4 --output DIR"
    lines = folded(command).split(" \\\n    ")
    assert " ".join(lines) == command
    assert len(lines) == 2
    assert all(line.startswith("-") for line in lines[1:])


def test_little_is_enough(make_report):
    empty = {"evaluation": {}, "pictures": {}, "examples": [], "examples_note": ""}
    report = make_report(**empty, model="", seconds={}, parameters=0)
    report.blocks = []
    assert "Add --evaluate with a data set" in said(run_page(report))
    assert "Add --evaluate with a data set" in said(comparison_page({"a": report}))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0, 1e30])
def test_metrics_beyond_measure(make_report, value: float):
    evaluation = {"text": {"metric": "perplexity", "dense": 48.6, "pruned": value}}
    report = make_report(evaluation=evaluation)
    assert "perplexity 48.6 →" in said(run_page(report))
    assert "perplexity" in said(comparison_page({"a": report, "b": make_report()}))


def hostile(report: Report) -> Report:
    """Return a report whose every name is hostile."""
    for linear in report.linears:
        linear.name += HOSTILE
    report.model = report.method = report.examples_note = report.command = report.loading = HOSTILE
    report.calibration = report.allocation = HOSTILE
    report.notes, report.dense, report.seconds = [HOSTILE], {HOSTILE: HOSTILE}, {HOSTILE: 1.0}
    report.evaluation = {HOSTILE: {"metric": HOSTILE, "dense": 1.0, "pruned": 2.0}}
    report.pictures = {report.linears[0].name: next(iter(report.pictures.values()))}
    report.examples.append(Example(HOSTILE, HOSTILE, HOSTILE))
    report.versions = {HOSTILE: HOSTILE}
    return report


def test_hostile_names_stay_names(make_report, vision):
    vision.examples[0] = Example(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    one, two = hostile(make_report()), hostile(vision)
    runs = {HOSTILE: one, "b": two}
    links = dict.fromkeys(runs, HOSTILE)
    for page in (run_page(one), run_page(two), comparison_page(runs, links)):
        assert "alert(1)" in page
        assert "script" not in Parsed(page).tags
    dollars = make_report(method="$x_$")  # a name is no formula
    assert "$x_$" in comparison_page({"a": dollars})


def test_pages_need_no_other_file(make_report, vision):
    for page in (run_page(make_report()), run_page(vision), comparison_page({"a": vision})):
        loads = Parsed(page).loads
        assert loads
        assert all(re.match(r"data:|#", load) for load in loads)
        assert "script" not in Parsed(page).tags


def test_the_check_sees_what_a_page_would_load():
    page = "<img src='http://a/b.png'><style>@import x; p {background: url(y)}</style>"
    assert len(Parsed(page).loads) == 3


def test_a_page_is_the_same_every_time(make_report):
    assert run_page(make_report()) == run_page(make_report())


def test_runs_are_compared(make_report):
    def run(method: str, pattern: str, sparsity: float, value: float) -> Report:
        evaluation = {"notes.txt": {"metric": "perplexity", "dense": 48.6, "pruned": value}}
        report = make_report(method=method, pattern=pattern, evaluation=evaluation)
        for linear in report.linears:
            linear.sparsity = sparsity
        return report

    runs = {
        "a": run("wanda", "0.5", 0.5, 60.0),
        "b": run("best", "0.5", 0.5, 50.0),
        "c": run("best", "0.7", 0.7, 55.0),
        "d": run("best", "2:4", 0.5, 58.0),
    }
    runs["e"] = run("wanda", "2:4", 0.5, 57.0)
    page = comparison_page(runs, {"a": "a/report.html"})
    text = said(page)
    assert (
        "5 runs of tiny-llama: the method best leads at 0.5, perplexity 48.6 → 50.0 (+2.9 %); "
        "the method wanda leads at 2:4, perplexity 48.6 → 57.0 (+17.3 %)"
    ) in text
    rows = re.findall(r"<tr(?: class=\"(\w+)\")?>\s*<th scope=\"row\">", page)
    assert rows == ["dense", "", "front", "", "", "front"]
    assert Parsed(page).links == ["a/report.html"]
    for series in ("wanda", "best", "best, n:m", "dense"):
        assert f">{series}</text>" in page


def test_models_are_told_apart(make_report):
    runs = {f"{n} {i}": make_report(model=n) for n in ("small", "large") for i in range(2)}
    page = comparison_page(runs)
    assert page.count('<tr class="dense">') == 2
    assert page.count('class="front"') == 2
    assert "leads at 0.5 of large, " in page
    assert ">small, dense</text>" in page


def test_what_was_measured_otherwise_is_not_ranked(make_report, vision):
    page = comparison_page({"a": make_report(), "b": vision})
    assert "leads, " not in page
    assert ">dense</text>" in page
    assert "tiny-llama, dense" not in page  # one model in a plot needs no name there


def test_pages_are_written_run_by_run(make_report, vision, tmp_path: Path):
    write_pages(tmp_path / "several", ["a", "b"], [make_report()])
    assert (tmp_path / "several" / "a" / "report.html").exists()
    assert "1 run of tiny-llama" in said((tmp_path / "several" / "report.html").read_text())
    write_pages(tmp_path / "several", ["a", "b"], [make_report(), make_report()])
    assert "2 runs of tiny-llama" in said((tmp_path / "several" / "report.html").read_text())
    write_pages(tmp_path / "one", ["a"], [vision])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"report.html", "report.json"}
    assert json.loads((tmp_path / "one" / "report.json").read_text())["model"] == "vit_tiny"


def test_a_report_is_read_as_it_was_written(make_report, tmp_path: Path):
    report = make_report()
    report.write(tmp_path)
    assert Report.read(tmp_path) == report


def test_a_page_that_cannot_be_written_says_so(make_report, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GblmError, match="cannot be written"):
        make_report().write(tmp_path / "file" / "folder")


def test_common_start_ends_with_a_word():
    assert common("a time there was", "a time there lived") == len("a time there ")
    assert common("same", "same") == 4
    assert common("other", "words") == 0
