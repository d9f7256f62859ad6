"""Families that once ended in an error of torch: they are pruned, or refused by name."""

import families
import pytest

CASES = {
    "musicgen": ("causal", "wanda", "does not run on one sample of the batch"),
    "deberta": ("masked", "best", ""),
    "t5gemma2": ("seq2seq", "best", ""),
    "instructblip": ("vision", "gblm", "the head gives 32 logits"),
}


@pytest.mark.parametrize("family", CASES)
def test_no_family_ends_in_a_traceback(family):
    task, method, refused = CASES[family]
    found = families.examine(task, family, [method], ["0.5"])
    assert not found.built
    said = " ".join(found.errors.values())
    assert "TRACEBACK" not in said
    assert refused in said if refused else not said and found.share > 0.9
