"""Numbers and verdicts for a person."""

import pytest

from gblm.report import merged, wording
from gblm.report.wording import Change, metric


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((48.62, "48.6"), (1234.5, "1,234"), (0.0123, "0.0123"), (5.716, "5.72"), (0, "0")),
        *((1e9, "1.00e+09"), (float("inf"), "∞"), (float("nan"), "not a number"), (-3.0, "-3.00")),
    ],
)
def test_numbers(value: float, said: str):
    assert wording.number(value) == said


def test_sizes_and_times():
    sizes = [wording.size(value) for value in (0, 999, 1000, 1_234_567_890, 5e15)]
    assert [size.replace("\u00a0", " ") for size in sizes] == [
        *("0 B", "999 B", "1 kB", "1.23 GB", "5e+03 TB")
    ]
    times = [wording.time(value).replace("\u00a0", " ") for value in (1.23, 100, 3599.6, 7200)]
    assert times == ["1.2 s", "1 min 40 s", "1 h 00 min", "2 h 00 min"]
    assert wording.count(1234) == "1,234"
    assert wording.counted(1, "run") == "1 run"


@pytest.mark.parametrize(
    ("name", "dense", "pruned", "difference", "verdict"),
    [
        ("perplexity", 50.0, 49.0, "−2.0 %", "as good as before"),
        ("perplexity", 50.0, 50.5, "+1.0 %", "almost unchanged"),
        ("perplexity", 50.0, 54.0, "+8.0 %", "slightly worse"),
        ("perplexity", 50.0, 70.0, "+40.0 %", "clearly worse"),
        ("perplexity", 50.0, 700.0, "+1,300.0 %", "much worse"),
        ("perplexity", 50.0, float("nan"), "not finite", "broken"),
        ("top1", 80.0, 82.0, "+2.0 points", "as good as before"),
        ("top1", 80.0, 30.0, "−50.0 points", "much worse"),
        ("cross_entropy", 0.0, 0.0, "0.000", "as good as before"),
        ("unheard of", 1.0, 2.0, "+100.0 %", ""),
    ],
)
def test_verdicts(name: str, dense: float, pruned: float, difference: str, verdict: str):
    change = Change("data", metric(name), dense, pruned)
    assert change.difference.replace("\u00a0", " ") == difference
    assert change.verdict == verdict


def test_a_change_within_the_error_is_none():
    assert Change("rte", metric("acc"), 60.0, 55.0, 3.0, 3.0).verdict == "no significant change"
    assert Change("rte", metric("acc"), 60.0, 50.0, 3.0, 3.0).verdict == "clearly worse"
    assert Change("rte", metric("acc"), 60.0, 55.0).verdict == "clearly worse"


def test_percentages_are_judged_by_points_and_others_by_ratio():
    points = {
        0.9: "almost unchanged",
        2.9: "slightly worse",
        9.2: "clearly worse",
        11: "much worse",
    }
    for loss, words in points.items():
        assert Change("val", metric("top1"), 92.0, 92 - loss).verdict == words
        assert Change("val", metric("top1"), 20.0, 20 - loss).verdict == words
    shares = {
        1.01: "almost unchanged",
        1.09: "slightly worse",
        1.4: "clearly worse",
        2: "much worse",
    }
    for ratio, words in shares.items():
        assert Change("text", metric("perplexity"), 30.0, 30 * ratio).verdict == words


def test_answers_have_the_standard_error_of_their_number():
    before = {"val": {"top1": 80.0, "cross_entropy": 1.0}, "rte": {"acc": 0.5, "acc_stderr": 0.1}}
    after = {"val": {"top1": 50.0, "cross_entropy": 2.0}, "rte": {"acc": 0.4, "acc_stderr": 0.2}}
    found = merged(before, after, {"val": (101, "images")})
    assert found["val top1"] == {
        "metric": "top1",
        "count": 101,
        "of": "images",
        "dense": 80.0,
        "pruned": 50.0,
        "dense_stderr": pytest.approx(100 * (0.8 * 0.2 / 100) ** 0.5),
        "pruned_stderr": pytest.approx(5.0),
    }
    assert "dense_stderr" not in found["val cross_entropy"]
    assert found["rte"] == {
        "metric": "acc",
        "dense": 0.5,
        "dense_stderr": 0.1,
        "pruned": 0.4,
        "pruned_stderr": 0.2,
    }


def test_a_run_is_told_in_a_line(make_report):
    assert wording.outcome(make_report()) == "perplexity 48.6 → 49.3"
    assert wording.outcome(make_report(evaluation={})) == "50.0\u00a0% of the pruned weights are 0"


def test_data_sets_of_one_name_are_told_apart(make_report):
    value = {"metric": "perplexity", "dense": 1.0, "pruned": 2.0}
    names = ["a/text.txt", "b/text.txt", "c/other.txt"]
    found = wording.changes(make_report(evaluation=dict.fromkeys(names, value)))
    assert [change.data for change in found] == ["a/text.txt", "b/text.txt", "other.txt"]
