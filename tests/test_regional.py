"""Wanda++: the gradients of a block alone, and the optimisation of a block alone."""

from functools import partial

import pytest
import torch
from torch import nn

import gblm
from gblm import methods
from gblm.base import GblmError
from gblm.maths.patterns import parse
from gblm.methods.regional import regional_sums
from gblm.walk.prune import Pruning
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk


def test_regional_gradients_are_those_of_the_blocks_own_norm(llama64, batch):
    found = {}

    def work(visit: Visit) -> None:
        found.update(regional_sums(visit.block, visit.calls, {"grad_sq"}, 2))

    walk = Walk.of(llama64, batch, micro_batch=3)
    forward(walk, work)
    first, linear = walk.blocks[0], walk.blocks[0].linears[0]
    weight = linear.parameter
    total = torch.zeros_like(weight)
    for sample in batch["input_ids"]:
        outputs: list[torch.Tensor] = []
        keep = partial(lambda kept, module, args, out: kept.append(out), outputs)
        hook = first.module.register_forward_hook(keep)
        llama64(input_ids=sample[None])
        hook.remove()
        output = outputs[0]
        (gradient,) = torch.autograd.grad(output.norm(), weight)
        total += gradient.square()
    torch.testing.assert_close(found[linear.name]["grad_sq"], total)
    assert {sums.differentiated for sums in found.values()} == {len(batch["input_ids"])}


def block_calls(model: nn.Module, batch: dict) -> list:
    """Return what the first block does, as a function of the weights it then has, by sample."""
    block, found = model.model.layers[0], []

    def keep(module, args, kwargs):
        found.append((args, kwargs))

    for sample in batch["input_ids"]:
        with block.register_forward_pre_hook(keep, with_kwargs=True), torch.no_grad():
            model(input_ids=sample[None], use_cache=False)
    return [partial(block, *args, **kwargs) for args, kwargs in found]


def plainly_optimised(model: nn.Module, batch: dict, rounds: int, rate: float) -> None:
    """Prune the first block by half, by algorithm 1 of Wanda++ written plainly."""
    calls = block_calls(model, batch)
    block = model.model.layers[0]
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    weights = [linear.weight for linear in linears]

    def gradients() -> list:
        norms = [torch.autograd.grad(call().norm(), weights) for call in calls]
        return [
            (sum(g.square() for g in own) / len(calls)).sqrt() for own in zip(*norms, strict=True)
        ]

    def pruned(size: list) -> None:
        seen: dict = {linear: [] for linear in linears}
        hooks = [
            linear.register_forward_pre_hook(lambda module, args: seen[module].append(args[0]))
            for linear in linears
        ]
        with torch.no_grad():
            for call in calls:
                call()
        for hook in hooks:
            hook.remove()
        for linear, g in zip(linears, size, strict=True):
            x = torch.cat(seen[linear]).flatten(0, -2)
            norm = (x.square().sum(dim=0) / len(calls)).sqrt()
            score = linear.weight.detach().abs() * (100 * g + norm)
            lowest = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
            linear.weight.data.scatter_(1, lowest, 0)

    draw = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(calls), generator=draw) for _ in range(rounds)]
    goals = [call().detach() for call in calls]
    dense, optimiser = gradients(), torch.optim.RMSprop(weights, lr=rate)
    for order in orders:
        pruned(dense)
        for i in order:
            optimiser.zero_grad()
            (calls[i]() - goals[i]).square().sum().backward()
            optimiser.step()
    pruned(gradients())


def test_regional_optimisation_is_the_published_algorithm(make_llama, batch):
    model, plain = make_llama(torch.float64), make_llama(torch.float64)
    walk = Walk.of(model, batch, micro_batch=2)
    walk.blocks = walk.blocks[:1]
    Pruning(walk, methods.wanda_plus(rounds=3, rate=1e-3), parse("0.5")).run()
    plainly_optimised(plain, batch, rounds=3, rate=1e-3)
    changed = 0
    for name, value in plain.model.layers[0].state_dict().items():
        torch.testing.assert_close(model.model.layers[0].state_dict()[name], value)
        changed += name.endswith("proj.weight") and bool((value == 0).any())
    assert changed == 7


def test_errors_are_against_the_weights_before_the_rounds(make_llama, batch):
    model, dense = make_llama(), make_llama()
    seen: dict[str, list[torch.Tensor]] = {}
    report = gblm.prune(model, batch, methods.wanda_plus(rounds=3, rate=1e-2), "0.5")
    entry, *_ = report.linears
    own, was = (each.get_submodule(entry.name) for each in (model, dense))
    hook = own.register_forward_pre_hook(
        lambda module, args: seen.setdefault("x", []).append(args[0])
    )
    model(**batch)
    hook.remove()
    (x,) = seen["x"]
    wanted = (x @ (own.weight - was.weight).T).norm() / (x @ was.weight.T).norm()
    assert entry.relative_error == pytest.approx(wanted.item(), rel=1e-4)


def test_rounds_that_change_nothing_leave_plain_wanda_plus(make_llama, batch):
    models = [make_llama(), make_llama()]
    for model, rounds in zip(models, (0, 3), strict=True):
        gblm.prune(model, batch, methods.wanda_plus(rounds=rounds, rate=1e-30), "2:4")
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("options", [{"rounds": -1}, {"rate": 0}, {"rate": float("nan")}])
def test_rounds_and_rates_that_are_none(options):
    with pytest.raises(GblmError, match="published with 5 at 3e-7"):
        methods.wanda_plus(**options)
