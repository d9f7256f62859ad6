"""The laws of every pattern."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gblm.base import GblmError, Pattern
from gblm.maths import patterns

NAMES = [
    "0.5",
    "0.29",
    "0.1",
    "0.999",
    "0.5/layer",
    "0.29/layer",
    "2:4",
    "4:8",
    "1:4",
    "3:5",
    "1:2",
]
INPUTS = 40  # every m above divides it

few = settings(max_examples=20)
scores = st.integers(0, 2**31).flatmap(
    lambda seed: st.sampled_from([2, 5, 2**20]).map(
        # Of few values, so that there are many ties, or of many.
        lambda values: torch.randint(
            values, (6, INPUTS), generator=torch.Generator().manual_seed(seed)
        ).float()
    )
)


def groups(name: str, value: Tensor) -> Tensor:
    """Return a mask or score as its comparison groups `[groups, size]`."""
    if ":" in name:
        return value.reshape(-1, int(name.split(":")[1]))
    return value.reshape(1, -1) if name.endswith("/layer") else value


def dropped(name: str, size: int) -> int:
    """Return how many of a group of that size a pattern of that name drops."""
    if ":" in name:
        n, m = name.split(":")
        return int(m) - int(n)
    return int(round(float(name.split("/")[0]) * 1000) * size // 1000)


# The laws, as checkers of a keep-mask of scores.


def check_count(name: str, keep: Tensor, score: Tensor) -> None:
    """Fail unless every group loses exactly its count."""
    assert keep.dtype == torch.bool
    assert keep.shape == score.shape
    lost = (~groups(name, keep)).sum(dim=1)
    assert (lost == dropped(name, groups(name, keep).shape[1])).all()


def check_order(name: str, keep: Tensor, score: Tensor) -> None:
    """Fail where a weight is dropped though one of its group that stays has a lower score."""
    mask, value = groups(name, keep), groups(name, score)
    highest_dropped = value.masked_fill(mask, -torch.inf).amax(dim=1)
    lowest_kept = value.masked_fill(~mask, torch.inf).amin(dim=1)
    assert (highest_dropped <= lowest_kept).all()


def check_ties(name: str, keep: Tensor, score: Tensor) -> None:
    """Fail unless of equal scores in a group the first go first, as in the published code."""
    for mask, value in zip(groups(name, keep), groups(name, score), strict=True):
        for level in value.unique():
            same = mask[value == level].int()
            assert (same.diff() >= 0).all()


LAWS: list[Callable[[str, Tensor, Tensor], None]] = [check_count, check_order, check_ties]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("law", LAWS)
@few
@given(score=scores)
def test_law(law, name, score):
    law(name, patterns.parse(name).keep(score), score)


odd = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31)).map(
    lambda drawn: torch.randint(
        7, drawn[:2], generator=torch.Generator().manual_seed(drawn[2])
    ).float()
)
sparsities = st.floats(0, 1, exclude_min=True, exclude_max=True)


@pytest.mark.parametrize("group", patterns.GROUPS)
@few
@given(score=odd, sparsity=sparsities)
def test_any_shape_loses_its_count_and_keeps_a_weight(group, score, sparsity):
    keep = patterns.unstructured(sparsity, group).keep(score)
    rows = keep if group == "row" else keep.reshape(1, -1)
    size = rows.shape[1]
    lost = (~rows).sum(dim=1)
    assert (lost == lost[0]).all()
    assert lost[0] < size
    assert lost[0] == min(int(size * sparsity + 1e-6), size - 1)
    check_order("0.5" if group == "row" else "0.5/layer", keep, score)


@pytest.mark.parametrize("group", patterns.GROUPS)
@few
@given(score=odd, two=st.tuples(sparsities, sparsities).map(sorted))
def test_what_a_lower_sparsity_drops_a_higher_one_drops_too(group, score, two):
    less, more = (patterns.unstructured(sparsity, group).keep(score) for sparsity in two)
    assert not (more & ~less).any()


@few
@given(score=scores, m=st.sampled_from([2, 4, 5, 8]))
def test_what_more_of_m_drops_fewer_drop_too(score, m):
    masks = [patterns.nm(n, m).keep(score) for n in range(1, m)]
    for fewer, more in pairwise(masks):
        assert not (fewer & ~more).any()


@pytest.mark.parametrize("name", NAMES)
@few
@given(score=scores, power=st.integers(-30, 30))
def test_only_the_order_of_scores_counts(name, score, power):
    keep = patterns.parse(name).keep
    assert torch.equal(keep(score * 2.0**power), keep(score))
    assert torch.equal(keep((score + 1).log()), keep(score))


@settings(max_examples=50)
@given(text=st.text("0123456789.:/-+einfarowly ½٣", max_size=9) | st.text(max_size=9))
def test_any_text_is_a_pattern_or_refused(text):
    try:
        pattern = patterns.parse(text)
    except GblmError:
        return
    assert patterns.parse(pattern.name).name == pattern.name


@pytest.mark.parametrize("name", NAMES)
@few
@given(score=scores, data=st.data())
def test_permuting_rows_permutes_the_mask(name, score, data):
    score += torch.arange(score.numel()).view_as(score) / 1024  # a layer's ties go by position
    order = data.draw(st.permutations(range(len(score))))
    keep = patterns.parse(name).keep
    assert torch.equal(keep(score[order]), keep(score)[order])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_any_dtype(name, dtype):
    score = torch.randn(6, INPUTS, generator=torch.Generator().manual_seed(0)).abs().to(dtype)
    for law in LAWS:
        law(name, patterns.parse(name).keep(score), score)


def large(kind: str) -> Tensor:
    """Return scores `[600, 610]` of one kind."""
    numbers = torch.rand(600, 610, generator=torch.Generator().manual_seed(0))
    kinds = {
        "any": numbers,
        "few": (numbers * 7).floor(),
        "one": torch.ones_like(numbers),
        "rising": torch.arange(numbers.numel()).view_as(numbers).float(),
        "periodic": torch.arange(numbers.numel()).view_as(numbers) % patterns.STRIDE / 2.0,
    }
    return kinds[kind]


@pytest.mark.parametrize("sparsity", ["0.5", "0.0001", "0.9999"])
@pytest.mark.parametrize("kind", ["any", "few", "one", "rising", "periodic"])
def test_a_large_layer_whatever_a_sample_of_it_says(kind, sparsity):
    score = large(kind)
    keep = patterns.parse(f"{sparsity}/layer").keep(score)
    order = score.flatten().sort(stable=True).indices  # of equal scores the first go first
    expected = torch.ones_like(keep).flatten()
    expected[order[: int(float(sparsity) * score.numel() + 1e-6)]] = False
    assert torch.equal(keep, expected.view_as(keep))


# Each checker fails once, on a planted fault.


def one_too_many(name: str) -> Callable[[Tensor], Tensor]:
    def keep(score: Tensor) -> Tensor:
        mask = patterns.parse(name).keep(score)
        first = groups(name, mask)[0]
        first[first.nonzero()[0]] = False
        return mask

    return keep


def highest(name: str) -> Callable[[Tensor], Tensor]:
    return lambda score: patterns.parse(name).keep(-score)


def last_of_ties(name: str) -> Callable[[Tensor], Tensor]:
    return lambda score: patterns.parse(name).keep(score.flip(1)).flip(1)


@pytest.mark.parametrize("name", ["0.5", "0.5/layer", "2:4"])
@pytest.mark.parametrize(
    ("law", "fault"),
    [(check_count, one_too_many), (check_order, highest), (check_ties, last_of_ties)],
)
def test_the_checker_sees_a_planted_fault(law, fault, name):
    score = torch.randint(3, (6, INPUTS), generator=torch.Generator().manual_seed(0)).float()
    with pytest.raises(AssertionError):
        law(name, fault(name)(score), score)


# Names


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_pattern_gives_it_back(name):
    pattern = patterns.parse(name)
    again = patterns.parse(pattern.name)
    score = torch.randn(6, INPUTS, generator=torch.Generator().manual_seed(0))
    assert pattern.name == again.name == name
    assert pattern.window == again.window
    assert torch.equal(pattern.keep(score), again.keep(score))


def check_name(sparsity: float, group: str) -> None:
    """Fail unless a pattern's name gives it back."""
    pattern = patterns.unstructured(sparsity, group)
    again = patterns.parse(pattern.name)
    score = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    assert again.name == pattern.name
    assert torch.equal(pattern.keep(score), again.keep(score))


@few
@given(parts=st.integers(1, 9999), group=st.sampled_from(patterns.GROUPS))
def test_a_sparsity_comes_back_from_its_name(parts, group):
    check_name(parts / 10000, group)


def test_a_sparsity_of_many_digits_comes_back_from_its_name():
    check_name(0.9999999, "row")


@few
@given(n=st.integers(1, 16), more=st.integers(1, 16))
def test_any_n_of_m_comes_back_from_its_name(n, more):
    pattern: Pattern = patterns.nm(n, n + more)
    assert patterns.parse(pattern.name).window == pattern.window == n + more
    assert pattern.name == f"{n}:{n + more}"


def test_the_group_of_a_method_is_taken_where_the_name_has_none():
    assert patterns.parse("0.5", "layer").name == "0.5/layer"
    assert patterns.parse("0.5/row", "layer").name == "0.5"
    assert patterns.parse("2:4", "layer").name == "2:4"


@pytest.mark.parametrize("sparsity", [0.29, 0.57, 0.58, 0.07, 0.14, 0.28, 0.55, 0.56])
def test_binary_fractions_do_not_cost_a_weight(sparsity):
    keep = patterns.unstructured(sparsity).keep(torch.rand(3, 100))
    assert (~keep).sum(dim=1).tolist() == [round(100 * sparsity)] * 3


@pytest.mark.parametrize(("size", "most"), [(10, 7), (50, 2), (150, 1)])
def test_rows_are_chosen_from_some_at_a_time(size, most, monkeypatch):
    score = torch.rand(7, size, generator=torch.Generator().manual_seed(0))
    keep, smallest, seen = patterns.parse("0.5").keep, patterns._smallest, []

    def watched(part: Tensor, k: int) -> Tensor:
        seen.append(len(part))
        return smallest(part, k)

    expected = keep(score)
    monkeypatch.setattr(patterns, "_smallest", watched)
    monkeypatch.setattr(patterns, "ROWS", 100)
    assert torch.equal(keep(score), expected)
    assert max(seen) == most


def test_every_score_may_be_equal():
    keep = patterns.nm(2, 4).keep(torch.zeros(2, 8))
    assert keep.tolist() == [[False, False, True, True] * 2] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "outside"),
        ("1", "outside"),
        ("1.5", "outside"),
        ("-0.5", "outside"),
        ("nan", "outside"),
        ("inf", "outside"),
        ("half", "neither a sparsity such as 0.5 nor n:m"),
        ("", "neither"),
        ("2:4:8", "neither"),
        ("0.5/column", "choose from row, layer"),
        ("4:4", "needs 0 < n < m"),
        ("0:4", "needs 0 < n < m"),
        ("5:4", "needs 0 < n < m"),
    ],
)
def test_what_is_no_pattern_is_refused(text, message):
    with pytest.raises(GblmError, match=message):
        patterns.parse(text)


def test_n_of_m_needs_inputs_that_m_divides():
    patterns.nm(2, 4).check((3, 8))
    with pytest.raises(GblmError, match="in=7 is not divisible by 4"):
        patterns.nm(2, 4).check((3, 7))
