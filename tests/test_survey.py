"""The survey: which blocks and linears a model has, in which order, and what sees the samples."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gblm
from gblm import methods
from gblm.base import GblmError
from gblm.walk.blocks import Block
from gblm.walk.survey import find_adapter, survey
from gblm.walk.visit import forward
from gblm.walk.walk import Walk, micro_batch_for

# A model of no library, with an adapter of its own: the core needs no transformers.


class ToyBlock(nn.Module):
    """`outer` may be used twice, `idle` never."""

    def __init__(self, wide: int, twice: bool = False, idle: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(wide, 2 * wide)
        self.outer = nn.Linear(2 * wide, wide)
        self.idle = nn.Linear(wide, wide) if idle else None
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.outer(self.inner(x).relu())
        return x + self.outer(self.inner(x).relu()) if self.twice else x


class Toy(nn.Module):
    """Blocks one after the other, in the order given, on samples `x [n, t, wide]`."""

    def __init__(self, *order: int, wide: int = 8, classes: int = 5, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(ToyBlock(wide, **options) for _ in range(max(order) + 1))
        self.order = order
        self.head = nn.Linear(wide, classes)


def toy_trunk(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = batch["x"]
    for index in model.order:
        x = model.layers[index](x)
    return x


TOY = gblm.Adapter(
    blocks=lambda model: {f"layers.{i}": block for i, block in enumerate(model.layers)},
    trunk=toy_trunk,
    loss=lambda model, hidden, batch: cross_entropy(
        model.head(hidden.mean(dim=1)), batch["label"], reduction="none"
    ),
)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def toy_batch(samples: int = 6) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(samples, 4, 8), "label": torch.arange(samples) % 5}


def prune(model: nn.Module, batch: dict[str, Tensor], method: str = "gblm", **options):
    return gblm.prune(model, batch, methods.make(method), options.pop("pattern", "0.5"), **options)


# Blocks and linears


def test_the_core_prunes_a_model_of_no_library():
    model = Toy(0, 1, 2)
    report = prune(model, toy_batch(), "gblm", adapter=TOY, pattern="2:4")
    assert [linear.name for linear in report.linears] == [
        f"layers.{i}.{name}" for i in range(3) for name in ("inner", "outer")
    ]
    assert report.sparsity == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_blocks_are_taken_in_the_order_of_use(backward):
    model = Toy(2, 0, 1)
    report = prune(model, toy_batch(), "gblm", adapter=TOY, backward=backward, micro_batch=2)
    assert [linear.name[7] for linear in report.linears] == list("220011")


@pytest.mark.parametrize("method", methods.METHODS)
def test_an_unused_linear_is_reported_and_left_alone(method):
    model = Toy(0, 1, idle=True)
    dense = model.layers[1].idle.weight.clone()
    report = prune(model, toy_batch(), method, adapter=TOY)
    assert list(report.dense) == ["layers.0.idle", "layers.1.idle"]
    assert torch.equal(model.layers[1].idle.weight, dense)
    assert all("idle" not in linear.name for linear in report.linears)


@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_a_linear_used_twice_adds_up_its_uses(backward):
    model, batch = Toy(0, 1, twice=True).double(), toy_batch()
    batch["x"] = batch["x"].double()
    options = {"adapter": TOY, "micro_batch": 2, "backward": backward}
    found = gblm.gradient_sums(model, batch, ["grad_abs", "grad_sq"], **options)
    for name, sums in found.items():
        weight = model.get_submodule(name).weight
        losses = TOY.loss(model, TOY.trunk(model, batch), batch)
        kept = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
        torch.testing.assert_close(sums["grad_abs"], sum(g.abs() for g in kept))
        torch.testing.assert_close(sums["grad_sq"], sum(g.square() for g in kept))


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_linear_used_twice_is_pruned(method):
    model = Toy(0, 1, twice=True)
    report = prune(model, toy_batch(), method, adapter=TOY)
    assert [linear.name for linear in report.linears] == [
        f"layers.{i}.{name}" for i in range(2) for name in ("inner", "outer")
    ]
    assert report.sparsity == pytest.approx(0.5, abs=0.02)


def test_the_inputs_of_all_uses_are_in_the_statistics():
    model, batch = Toy(0, 1, twice=True), toy_batch()
    seen = []
    hook = model.layers[0].inner.register_forward_pre_hook(lambda module, args: seen.append(*args))
    toy_trunk(model, batch)
    hook.remove()
    found = []

    def work(visit):
        for groups in visit.inputs(frozenset({"input_sq"})):
            found.append({inputs.group[0].name: inputs.statistics for inputs in groups})

    forward(Walk.of(model, batch, TOY), work)
    torch.testing.assert_close(
        found[0]["layers.0.inner"]["input_sq"], torch.cat(seen).square().sum(dim=(0, 1))
    )


def test_a_block_used_twice_stays_dense_and_is_named():
    model = Toy(0, 1, 0)
    before = model.layers[0].inner.weight.clone()
    report = prune(model, toy_batch(), adapter=TOY)
    assert report.dense == {"layers.0": "used more than once"}
    assert [linear.name for linear in report.linears] == ["layers.1.inner", "layers.1.outer"]
    assert torch.equal(model.layers[0].inner.weight, before)


def test_a_model_of_nothing_else_is_refused_by_name():
    with pytest.raises(gblm.GblmError, match=r"block layers\.0 is used more than once"):
        prune(Toy(0, 0), toy_batch(), adapter=TOY)


def test_a_weight_shared_by_two_linears_stays_dense():
    model = Toy(0, 1)
    model.layers[1].inner.weight = model.layers[0].inner.weight
    report = prune(model, toy_batch(), adapter=TOY)
    assert list(report.dense) == ["layers.0.inner", "layers.1.inner"]
    assert "shares its weight" in report.dense["layers.1.inner"]
    assert [linear.name for linear in report.linears] == ["layers.0.outer", "layers.1.outer"]


def test_a_model_without_blocks_or_linears_is_refused():
    with pytest.raises(gblm.GblmError, match="no blocks found in Toy"):
        prune(Toy(0), toy_batch(), adapter=replace(TOY, blocks=lambda model: {}))
    model = Toy(0)
    model.layers[0] = nn.Softplus()
    with pytest.raises(gblm.GblmError, match="no linear layers to prune in the blocks of Toy"):
        prune(model, toy_batch(), adapter=TOY)


def test_a_model_of_an_unknown_library_needs_an_adapter():
    with pytest.raises(gblm.GblmError, match="no adapter for Toy"):
        prune(Toy(0), toy_batch())


def by_sample(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Run the model, but for its second block where the first entry of a sample is large."""
    x = batch["x"]
    for index in model.order:
        x = x if index == 1 and (x[:, 0, 0] > 50).any() else model.layers[index](x)
    return x


@pytest.mark.parametrize("sample", [0, 1, 5])  # the survey's first, another, none of its own
@pytest.mark.parametrize("method", ["wanda", "gblm", "best"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_model_that_chooses_its_blocks_by_the_sample_is_refused(method, sample, micro_batch):
    model, batch = Toy(0, 1, 2), toy_batch()
    batch["x"][sample, 0, 0] = 100
    dense = weights(model)
    with pytest.raises(gblm.GblmError, match="chooses its blocks by the sample cannot be pruned"):
        prune(
            model,
            batch,
            method,
            adapter=replace(TOY, trunk=by_sample),
            micro_batch=micro_batch,
            backward="blocks",
        )
    assert not any("forward" in vars(module) for module in model.modules())
    later = [name for name in dense if name.startswith(("layers.1", "layers.2"))]
    assert all(torch.equal(weights(model)[name], dense[name]) for name in later)


# Linears that see some of the positions, or some of the samples


class Experts(nn.Module):
    """A block that sends each position to one of two linears; `late` sees marked samples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.late, self.never = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).tanh()
        rows = x.flatten(0, 1)
        output = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            chosen = (rows[:, 1] > 0) == bool(i)
            if chosen.any():
                output = output.index_put((chosen,), expert(rows[chosen]))
        x = x + output.view_as(x).tanh()
        marked = x[:, 0, 0] > MARK / 2
        if marked.any():
            x = x.index_put((marked,), x[marked] + self.late(x[marked] / MARK))
        return x


MARK = 100.0


def routed(*marked: int, samples: int = 8) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model of two such blocks, and samples of which some are marked."""
    torch.manual_seed(0)
    model = Toy(0, 1)
    model.layers = nn.ModuleList(Experts() for _ in range(2))
    batch = toy_batch(samples)
    batch["x"][list(marked), 0, 0] = MARK
    return model.double(), {**batch, "x": batch["x"].double()}


def test_a_linear_that_the_second_sample_reaches_first_is_pruned_and_routed_ones_are_marked():
    model, batch = routed(1)
    blocks = survey(model, batch, TOY)
    for block in blocks:
        names = {linear.name.rpartition(f"{block.name}.")[2]: linear for linear in block.linears}
        assert list(names) == ["first", "experts.0", "experts.1", "late"]
        assert [linear.routed for linear in names.values()] == [False, True, True, True]
        assert (names["first"].positions, names["late"].positions) == (4, 4)
        assert block.dense == {f"{block.name}.never": "not used by its block"}
    dense = model.layers[0].never.weight.clone()
    report = prune(model, batch, "wanda", adapter=TOY)
    assert report.sparsity == 0.5
    assert len(report.linears) == 8
    assert (model.layers[1].late.weight == 0).double().mean() == 0.5
    assert torch.equal(model.layers[0].never.weight, dense)


def test_a_linear_that_only_a_late_sample_reaches_stays_dense_and_is_named():
    model, batch = routed(7)
    report = prune(model, batch, "wanda", adapter=TOY)
    assert report.dense["layers.0.late"] == "not used by its block"
    assert (model.layers[0].late.weight != 0).all()


@pytest.mark.parametrize("backward", ["blocks", "model"])
@pytest.mark.parametrize("micro_batch", [1, 3, None])
def test_gradients_of_routed_linears_are_those_of_each_sample(backward, micro_batch):
    model, batch = routed(1, 6)
    found = gblm.gradient_sums(
        model, batch, {"grad_abs"}, adapter=TOY, micro_batch=micro_batch, backward=backward
    )
    sums: dict[str, Tensor] = {}
    for i in range(len(batch["x"])):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        model.zero_grad()
        TOY.loss(model, toy_trunk(model, one), one).sum().backward()
        for name in found:
            gradient = model.get_submodule(name).weight.grad
            sums[name] = sums.get(name, 0) + (0 if gradient is None else gradient.abs())
    for name, total in sums.items():
        torch.testing.assert_close(found[name]["grad_abs"], total)
    assert found["layers.0.first"].differentiated == 8
    assert found["layers.0.late"].differentiated == 8
    assert found["layers.0.late"].positions == 8


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("micro_batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_micro_batches_change_nothing_for_routed_linears(method, micro_batch):
    (some, batch), (whole, _) = routed(1, 6, samples=24), routed(1, 6, samples=24)
    made = methods.refined(methods.make(method), 0)
    gblm.prune(some, batch, made, "0.5", adapter=TOY, micro_batch=micro_batch)
    gblm.prune(whole, batch, made, "0.5", adapter=TOY, micro_batch=24)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(some)[name], value, rtol=1e-8, atol=1e-8)


def test_what_cannot_be_cut_into_samples_overrules_a_micro_batch():
    block = Block("a", nn.Linear(2, 2), uncut=True)
    assert micro_batch_for([block], 8, 4, torch.device("cpu")).samples == 1


def test_a_model_whose_samples_do_not_stand_first_is_refused(make_llama):
    model = make_llama()
    given = find_adapter(model)

    def pairs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = batch["input_ids"]
        return given.trunk(model, {"input_ids": ids.view(-1, 2, ids.shape[1])[:, 0]})

    way = "does not run on one sample of the batch .* hold the samples in their first dimension"
    with pytest.raises(GblmError, match=way):
        survey(
            model, {"input_ids": torch.ones(4, 6, dtype=torch.long)}, replace(given, trunk=pairs)
        )
