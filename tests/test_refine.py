"""The dense stream beside the pruned one, and the refinement towards it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

import gblm
from gblm import methods
from gblm.base import GblmError, Method, Solver
from gblm.maths import stats
from gblm.methods.refine import Refine
from gblm.walk.inputs import Inputs
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk


def inputs_of(model: nn.Module, batch: dict, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the inputs `[positions, in]` of some linears in a plain run of the model."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found.update({name: args[0].flatten(0, -2)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def groups_of(visit: Visit, needs: set[str]) -> Iterator[Inputs]:
    """Yield what the groups of a block see, as the last step of a method has it."""
    visit.last = True
    for groups in visit.inputs(frozenset(needs)):
        yield from groups


def solved_by(method: Method, solve: Solver) -> tuple[Solver, Method]:
    """Return the solver of a method, and the method with another in its place."""
    steps = tuple(
        replace(step, solve=solve) if hasattr(step, "solve") else step for step in method.steps
    )
    return method.solve, replace(method, steps=steps)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_each_group_sees_what_those_before_it_have_made(make_llama, batch, step):
    model, dense, done = (make_llama(torch.float64) for _ in range(3))
    seen: dict[str, stats.Statistics] = {}

    def halve(visit: Visit) -> None:
        """Halve the weights of each group, which the groups after it must see."""
        for inputs in groups_of(visit, {"input_gram", "cross_gram"}):
            seen[inputs.group[0].name] = inputs.statistics
            for linear in inputs.group:
                linear.weight.mul_(0.5)

    walk = Walk.of(model, batch, micro_batch=step)
    forward(walk, halve, beside=True)
    groups = [[linear.name for linear in group] for block in walk.blocks for group in block.groups]
    assert len(groups) == 4 * 3  # query, key, value; output; gate, up; down
    theirs = inputs_of(dense, batch, [group[0] for group in groups])
    for group in groups:
        x = inputs_of(done, batch, group[:1])[group[0]]
        torch.testing.assert_close(seen[group[0]]["input_gram"], x.T @ x)
        torch.testing.assert_close(seen[group[0]]["cross_gram"], theirs[group[0]].T @ x)
        for name in group:
            done.get_submodule(name).weight.data.mul_(0.5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, done.state_dict()[name])


def test_halved_streams_leave_sums_and_solves_exact(llama, batch, monkeypatch):
    monkeypatch.setattr("gblm.machine.device.has_products", lambda device, dtype: True)
    made: list[torch.dtype] = []
    sums: list[torch.Tensor] = []

    def work(visit: Visit) -> None:
        for inputs in groups_of(visit, {"input_gram"}):
            assert not torch.is_autocast_enabled("cpu")
            sums.append(inputs.statistics["input_gram"])

    walk = Walk.of(llama, batch, micro_batch=3)
    linear = llama.get_submodule(walk.blocks[0].linears[0].name)
    hook = linear.register_forward_hook(lambda module, args, output: made.append(output.dtype))
    forward(walk, work, beside=True)
    assert set(made) == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")
    halved, sums = sums, []
    forward(walk, work)
    hook.remove()
    # What the first group sees comes from the embedding alone, and no product has rounded it.
    torch.testing.assert_close(halved[0], sums[0], rtol=1e-6, atol=1e-6)
    assert all(total.dtype == torch.float32 for total in halved)


IN_ROUNDS = methods.wanda_plus(rounds=3, rate=1e-3)


@pytest.mark.parametrize(
    ("made", "fails_at"),
    [(methods.best(refine=0), 0), (methods.best(refine=0), 2), (IN_ROUNDS, 0), (IN_ROUNDS, 15)],
)
def test_a_block_that_fails_in_the_middle_is_as_it_was(llama, batch, made, fails_at):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    calls = []

    def solve(weight, statistics, pattern, **options):
        calls.append(1)
        if len(calls) > fails_at:
            raise GblmError("planted")
        return solver(weight, statistics, pattern, **options)

    solver, planted = solved_by(made, solve)
    with pytest.raises(GblmError, match="planted"):
        gblm.prune(llama, batch, planted, "0.5")
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert all(own.requires_grad and own.grad is None for own in llama.parameters())


def block_error(model: nn.Module, dense: nn.Module, batch: dict) -> float:
    """Return how far the trunk's output is from the dense one's."""
    with torch.no_grad():
        found, wanted = model.model(**batch)[0], dense.model(**batch)[0]
    return ((found - wanted).norm() / wanted.norm()).item()


QUICK = [("wanda", "2:4", False), ("sparsegpt", "0.5", False), ("best", "0.5", True)]


@pytest.mark.parametrize(
    ("method", "pattern", "half"),
    [
        pytest.param(method, pattern, half, marks=() if case in QUICK else pytest.mark.slow)
        for case in product(["wanda", "sparsegpt", "best"], ["0.5", "2:4"], [False, True])
        for method, pattern, half in [case]
    ],
)
def test_refinement_brings_the_model_nearer_and_keeps_the_mask(
    make_llama, make_batch, monkeypatch, method, pattern, half
):
    monkeypatch.setattr("gblm.machine.device.has_products", lambda device, dtype: half)
    batch, dense = make_batch(64), make_llama()
    models = [make_llama() for _ in range(2)]
    for model, passes in zip(models, (0, 40), strict=True):
        made = methods.refined(methods.make(method), passes)
        report = gblm.prune(model, batch, made, pattern)
        assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    plain, refined = models
    block = "model.layers.0.mlp.down_proj"
    masks = [model.get_submodule(block).weight == 0 for model in models]
    first = [m.model.layers[0].self_attn.q_proj.weight == 0 for m in models]
    assert torch.equal(*first), "the first group is solved before anything is refined"
    assert masks[0].float().mean() == masks[1].float().mean()
    assert block_error(refined, dense, batch) < block_error(plain, dense, batch)
    assert not any(parameter.grad is not None for parameter in refined.parameters())


@pytest.mark.parametrize("beside", [True, False])
def test_a_refinement_that_does_not_help_is_taken_back(llama, batch, beside):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    # The dense block already is where it should go.
    forward(Walk.of(llama, batch), Refine(passes=3).visit, beside=beside)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


@pytest.mark.parametrize("name", ["uniform", "gradient", "global", "owl"])
@pytest.mark.parametrize("pattern", ["0.5", "0.6/layer", "2:4"])
def test_an_allocation_spends_the_budget_of_the_model(llama, batch, name, pattern):
    method = replace(methods.wanda(), allocation=name)
    report = gblm.prune(llama, batch, method, pattern)
    wanted = 0.5 if ":" in pattern else float(pattern.partition("/")[0])
    assert report.sparsity == pytest.approx(wanted, abs=0.01)  # rows of 32 are coarse steps
    shares = {round(linear.sparsity, 2) for linear in report.linears}
    if name in ("gradient", "global"):
        assert len(shares) > 1
    if name == "uniform":
        assert max(shares) - min(shares) <= 0.03


def test_best_leaves_a_pattern_of_n_of_m_alike_everywhere(llama, batch):
    report = gblm.prune(llama, batch, methods.best(), "2:4")
    assert {linear.sparsity for linear in report.linears} == {0.5}
