"""The speed and the size of a whole model before and after pruning."""

import pytest
import torch
from torch import nn

from gblm.base import GblmError
from gblm.command import measure
from gblm.machine.speed import take_turns

CPU = torch.device("cpu")


def test_works_take_turns():
    calls: list[str] = []
    take_turns([lambda: calls.append("a"), lambda: calls.append("b")], CPU, 0.0)
    assert calls == ["a", "a", "b", "b"] + 3 * ["a", "b"]  # to warm up and for memory, then turns


def test_memory_is_what_a_work_holds_at_its_peak():
    def work() -> None:
        torch.ones(5_000_000).sum()

    taken = take_turns([work], CPU, 0.0)[0]
    assert 19e6 < taken.memory < 25e6
    assert taken.seconds > 0


def test_weights_that_are_tied_count_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert measure.weight_bytes(model) == 4 * 64
    model.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    assert measure.weight_bytes(model, torch.bfloat16) == 2 * 64 + 8 * 3


def test_a_smaller_model_is_measured_as_one():
    dense, pruned = (nn.Sequential(nn.Linear(n, n), nn.Linear(n, n)) for n in (768, 384))

    def uses(model: nn.Sequential) -> dict:
        x = torch.ones(64, model[0].in_features)
        return {"forward": lambda: model(x)}

    found = measure.speed(dense, pruned, uses, torch.float16)
    assert list(found) == ["forward", "memory", "file"]
    assert found["file"]["dense"] == 2 * 2 * (768 * 768 + 768)
    ratios = {name: entry["pruned"] / entry["dense"] for name, entry in found.items()}
    assert ratios["forward"] < 0.6  # a quarter of the operations
    assert ratios["memory"] < 0.5
    assert 0.25 < ratios["file"] < 0.26


def test_no_room_for_a_copy_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "free_memory", lambda device: 100)
    with pytest.raises(GblmError, match="needs 288\u00a0B for the dense model beside the pruned"):
        measure.dense_copy(nn.Linear(8, 8))
