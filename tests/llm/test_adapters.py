"""How the core sees a language model: windows without their padding, losses of each window."""

import pytest
import torch

from gblm.base import GblmError
from gblm.llm.adapters import adapter, unpad


def batch_of(*masks: list[int], **more: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.tensor(masks)
    ids = torch.arange(mask.numel()).view_as(mask)
    return {"input_ids": ids, "attention_mask": mask, **more}


def test_windows_are_cut_to_their_tokens_on_either_side():
    right, left, full = unpad(batch_of([1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]))
    assert right["input_ids"].tolist() == [[0, 1, 2]]
    assert left["input_ids"].tolist() == [[6, 7]]
    assert full["input_ids"].tolist() == [[8, 9, 10, 11]]
    assert all(set(window) == {"input_ids"} for window in (right, left, full))


@pytest.mark.parametrize(
    "batch", [{"input_ids": torch.zeros(2, 3)}, batch_of([1, 1, 1], [1, 1, 1])]
)
def test_windows_without_padding_are_left_together(batch):
    assert unpad(batch) is None


def test_labels_are_cut_with_their_tokens_and_what_has_none_is_taken_whole():
    labels, kinds = torch.arange(8).view(2, 4), torch.tensor([[5], [6]])
    first, second = unpad(batch_of([0, 1, 1, 1], [1, 1, 0, 0], labels=labels, kinds=kinds))
    assert first["labels"].tolist() == [[1, 2, 3]]
    assert second["labels"].tolist() == [[4, 5]]
    assert (first["kinds"].tolist(), second["kinds"].tolist()) == ([[5]], [[6]])


def test_a_window_with_a_gap_keeps_the_places_of_its_tokens():
    gap, none = unpad(batch_of([1, 0, 1, 1], [0, 1, 1, 1]))
    assert gap["input_ids"].tolist() == [[0, 2, 3]]
    assert gap["position_ids"].tolist() == [[0, 2, 3]]
    assert "position_ids" not in none


def test_a_window_of_padding_alone_is_named():
    with pytest.raises(GblmError, match=r"sample 1 of the batch holds no token.*; remove it"):
        unpad(batch_of([1, 1], [0, 0]))


def test_the_loss_of_a_window_is_that_of_the_window_without_its_padding(llama64, batch):
    own = adapter(llama64)
    ids = batch["input_ids"][:2].clone()
    mask = torch.ones_like(ids)
    ids[1, 8:], mask[1, 8:] = 0, 0
    windows = unpad({"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        losses = [own.loss(llama64, own.trunk(llama64, one), one).item() for one in windows]
        expected = [
            llama64(input_ids=one, labels=one).loss.item() for one in (ids[:1], ids[1:, :8])
        ]
    assert losses == pytest.approx(expected, rel=1e-6)
