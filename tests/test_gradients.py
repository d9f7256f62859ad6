"""Gradient sums are those of plain autograd, one sample at a time, however they are computed."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gblm
from gblm.walk import head

NEEDS = {"grad_abs", "grad_sq"}


def plain_sums(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return Σ |g| and Σ g² of every linear in the blocks, by autograd, a sample at a time."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    sums = {
        name: {statistic: torch.zeros_like(module.weight) for statistic in NEEDS}
        for name, module in linears.items()
    }
    for ids in batch["input_ids"]:
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        cross_entropy(logits[:-1], ids[1:]).backward()
        for name, module in linears.items():
            sums[name]["grad_abs"] += module.weight.grad.abs()
            sums[name]["grad_sq"] += module.weight.grad.square()
    model.zero_grad()
    return sums


def check_sums(found: dict, expected: dict, tolerance: float) -> None:
    """Fail where a sum is missing or off by more than the relative tolerance."""
    assert found.keys() == expected.keys()
    for name, sums in expected.items():
        assert found[name].sums.keys() == sums.keys()
        for statistic, value in sums.items():
            off = (found[name][statistic] - value).norm() / value.norm()
            assert off <= tolerance, (name, statistic, off.item())


@pytest.mark.parametrize("micro_batch", [1, 3, 7, None])
@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_sums_equal_plain_autograd_in_float64(llama64, batch, backward, micro_batch):
    found = gblm.gradient_sums(llama64, batch, NEEDS, micro_batch=micro_batch, backward=backward)
    assert all(sums["grad_abs"].dtype == torch.float64 for sums in found.values())
    check_sums(found, plain_sums(llama64, batch), 1e-9)


def test_the_checker_sees_gradients_that_were_summed_over_the_samples_first(llama64, batch):
    found = gblm.gradient_sums(llama64, batch, NEEDS)
    llama64.zero_grad()
    ids = batch["input_ids"]
    logits = llama64(input_ids=ids, use_cache=False).logits
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses.view(len(ids), -1).mean(dim=1).sum().backward()
    summed = {
        name: {"grad_abs": grad.abs(), "grad_sq": grad.square()}
        for name in found
        if (grad := llama64.get_submodule(name).weight.grad) is not None
    }
    with pytest.raises(AssertionError):
        check_sums(found, summed, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_sums_are_fp32_whatever_the_weights_are(make_llama, dtype, backward, batch):
    found = gblm.gradient_sums(make_llama(dtype), batch, NEEDS, micro_batch=3, backward=backward)
    expected = plain_sums(make_llama(torch.float64), batch)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.02}[dtype]
    assert all(sums["grad_sq"].dtype == torch.float32 for sums in found.values())
    check_sums(found, expected, tolerance)


@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_weights_never_get_a_gradient(llama, batch, backward):
    gblm.gradient_sums(llama, batch, NEEDS, backward=backward)
    assert all(parameter.grad is None for parameter in llama.parameters())


@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_statistics_count_samples_and_positions(llama, make_batch, backward):
    found = gblm.gradient_sums(llama, make_batch(5, 8), NEEDS, backward=backward, micro_batch=2)
    assert {(sums.samples, sums.positions) for sums in found.values()} == {(5, 40)}


@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_the_head_sees_no_more_than_a_micro_batch(llama, batch, backward):
    seen: list[int] = []
    llama.lm_head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    gblm.gradient_sums(llama, batch, NEEDS, micro_batch=3, backward=backward)
    assert max(seen) == 3
    assert sum(seen) == 7


@pytest.mark.parametrize("micro_batch", [1, 7])
def test_the_head_takes_fewer_samples_where_it_keeps_much_of_each(
    make_llama, batch, micro_batch, monkeypatch
):
    seen: list[int] = []
    llama = make_llama()
    llama.lm_head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    monkeypatch.setattr(head, "HEAD", 1)
    found = gblm.gradient_sums(llama, batch, NEEDS, micro_batch=micro_batch, backward="blocks")
    assert seen == [1] * 7
    check_sums(found, plain_sums(make_llama(), batch), 1e-5)


def test_a_block_in_the_forward_pass_makes_no_graph(llama, batch):
    graphs = []
    mlp = llama.model.layers[1].mlp.down_proj
    mlp.register_forward_hook(lambda module, args, output: graphs.append(output.grad_fn))
    gblm.gradient_sums(llama, batch, NEEDS, micro_batch=7, backward="blocks")
    assert sum(graph is not None for graph in graphs) == 1  # where it is run again


@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_no_block_sees_more_than_a_micro_batch(llama, batch, backward):
    seen: list[int] = []
    mlp = llama.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    gblm.gradient_sums(llama, batch, {"grad_abs"}, micro_batch=2, backward=backward)
    assert max(seen) == 2


def test_unknown_backward_names_the_nearest(llama, batch):
    with pytest.raises(gblm.GblmError, match="did you mean 'blocks'"):
        gblm.gradient_sums(llama, batch, NEEDS, backward="block")
