"""Laws of padded batches: what pads a sample counts nowhere, on whichever side it stands.

Tokenizers pad samples of several lengths to one, and say in `attention_mask` which positions are
real. `labels` say which of them count in the loss: those that are not −100.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gblm
from gblm import methods
from gblm.base import Statistics
from gblm.maths import patterns, stats

METHODS = [*methods.METHODS, "gblm+repair", "wanda++:rounds=1"]
SIDES = ["left", "right"]
GRADIENTS = {"grad_abs", "grad_sq"}
LENGTHS = [9, 4, 7, 9, 3, 6]
LONGEST, PADDED = max(LENGTHS), 14
VOCABULARY = 64
Batch = dict[str, Tensor]


@pytest.fixture
def model(make_llama) -> nn.Module:
    return make_llama(torch.float64)


def samples(lengths: list[int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (length,), generator=draw) for length in lengths]


def padded(rows: list[Tensor], side: str, length: int, fill: int = 5) -> Batch:
    """Return a batch of samples `[t]` of any lengths, filled up to one length."""
    ids = torch.full((len(rows), length), fill)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def prune(model: nn.Module, batch: Batch, name: str, **options: Any) -> dict[str, Tensor]:
    """Return the keep-masks of the blocks' matrices after a run."""
    text, chosen = methods.parse(name)
    gblm.prune(model, batch, methods.make(text, **chosen), "0.5", **options)
    weights = model.model.layers.state_dict()
    return {key: value != 0 for key, value in weights.items() if value.ndim == 2}


def check_same(masks: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    moved = {key: int((mask != expected[key]).sum()) for key, mask in masks.items()}
    assert not any(moved.values()), {key: count for key, count in moved.items() if count}


def uses_backward(name: str) -> bool:
    text, options = methods.parse(name)
    method = methods.make(text, **options)
    return bool(method.needs & set(stats.GRADIENT) or method.allocation)


RUNS = [
    (name, backward)
    for name in METHODS
    for backward in (("blocks", "model") if uses_backward(name) else ("blocks",))
]
quick = {"wanda", "gblm", "wanda++", "best"}
runs = pytest.mark.parametrize(
    ("name", "backward"),
    [pytest.param(*run, marks=() if run[0] in quick else pytest.mark.slow) for run in RUNS],
)


@pytest.mark.parametrize("micro_batch", [2, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@runs
def test_padding_changes_no_mask(name, backward, side, micro_batch, make_llama):
    rows = samples([LONGEST] * 5)
    options = {"backward": backward, "micro_batch": micro_batch}
    plain = {"input_ids": torch.stack(rows)}
    expected = prune(make_llama(torch.float64), plain, name, **options)
    batch = padded(rows, side, PADDED)
    check_same(prune(make_llama(torch.float64), batch, name, **options), expected)


@runs
def test_samples_of_several_lengths_may_be_padded_on_either_side(name, backward, make_llama):
    masks = [
        prune(
            make_llama(torch.float64),
            padded(samples(LENGTHS), side, length, fill),
            name,
            backward=backward,
        )
        for side, length, fill in [("right", LONGEST, 5), ("left", LONGEST, 5), ("left", PADDED, 9)]
    ]
    check_same(masks[1], masks[0])
    check_same(masks[2], masks[0])


@pytest.mark.parametrize("backward", ["blocks", "model"])
@pytest.mark.parametrize("side", SIDES)
def test_gradients_are_those_of_each_sample_alone(model, side, backward):
    rows = samples(LENGTHS)
    gradients = partial(gblm.gradient_sums, model, needs=GRADIENTS, backward=backward)
    sums = gradients(padded(rows, side, PADDED), micro_batch=2)
    alone = [gradients({"input_ids": row[None]}) for row in rows]
    for name, statistics in sums.items():
        expected = sum((other[name] for other in alone[1:]), alone[0][name])
        assert statistics.samples == expected.samples == len(rows)
        for key, value in expected.sums.items():
            torch.testing.assert_close(statistics[key], value, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_inputs_are_those_of_each_sample_alone(model, side):
    rows, inputs = samples(LENGTHS), []
    linear = model.model.layers[0].self_attn.q_proj
    hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    hook.remove()
    sums = {"input_sq": torch.cat(inputs).square().sum(dim=0)}
    statistics = Statistics(sums, len(rows), sum(LENGTHS))
    pattern = patterns.parse("0.5")
    expected = methods.wanda().solve(linear.weight.detach().clone(), statistics, pattern)[1]
    prune(model, padded(rows, side, PADDED), "wanda")
    assert torch.equal(linear.weight != 0, expected)


@pytest.mark.parametrize("side", SIDES)
def test_a_mask_of_ones_is_none(model, side, make_llama):
    batch = padded(samples([LONGEST] * 5), side, LONGEST)
    assert batch["attention_mask"].all()
    expected = prune(make_llama(torch.float64), {"input_ids": batch["input_ids"]}, "best")
    check_same(prune(model, batch, "best"), expected)


@pytest.mark.parametrize("fault", ["no real position", "one real position"])
def test_a_sample_without_a_target_is_refused(model, fault, make_llama):
    rows = samples([LONGEST] * 5)
    batch = padded(rows, "right", LONGEST)
    batch["attention_mask"][2, fault == "one real position" :] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(gblm.GblmError, match="sample 2"):
        prune(model, batch, "gblm")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Labels


def labelled() -> Batch:
    """Return samples whose first positions, a prompt say, count in no loss."""
    ids = torch.stack(samples([LONGEST] * 5))
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[: i + 2] = -100
    return {"input_ids": ids, "labels": labels}


def reference(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return Σ |g| of every weight of the blocks, by the model's own loss of sample by sample."""
    sums: dict[str, Tensor] = {}
    for sample in range(len(batch["input_ids"])):
        model.zero_grad()
        model(**{key: value[sample : sample + 1] for key, value in batch.items()}).loss.backward()
        for name, parameter in model.model.layers.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.abs()
    model.zero_grad()
    return sums


@pytest.mark.parametrize("micro_batch", [1, 3, None])
@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_labels_say_what_counts_in_the_loss(model, backward, micro_batch):
    batch = labelled()
    expected = reference(model, batch)
    options = {"backward": backward, "micro_batch": micro_batch}
    sums = gblm.gradient_sums(model, batch, {"grad_abs"}, **options)
    for name, statistics in sums.items():
        value = expected[f"{name.removeprefix('model.layers.')}.weight"]
        torch.testing.assert_close(statistics["grad_abs"], value, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_labels_and_padding_go_together(model, side):
    plain = labelled()
    expected = gblm.gradient_sums(model, plain, GRADIENTS)
    batch = padded(list(plain["input_ids"]), side, PADDED)
    labels = padded(list(plain["labels"]), side, PADDED, fill=-100)["input_ids"]
    sums = gblm.gradient_sums(model, batch | {"labels": labels}, GRADIENTS)
    for name, statistics in sums.items():
        for key, value in expected[name].sums.items():
            torch.testing.assert_close(statistics[key], value, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["gblm", "best"])
def test_labels_that_are_the_ids_are_none(name, make_llama):
    ids = torch.stack(samples([LONGEST] * 5))
    expected = prune(make_llama(torch.float64), {"input_ids": ids}, name)
    masks = prune(make_llama(torch.float64), {"input_ids": ids, "labels": ids.clone()}, name)
    check_same(masks, expected)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_labels_say_nothing_of_inputs(name, make_llama):
    batch = labelled()
    expected = prune(make_llama(torch.float64), {"input_ids": batch["input_ids"]}, name)
    check_same(prune(make_llama(torch.float64), batch, name), expected)
