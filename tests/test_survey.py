"""The survey: which blocks and linears a model has, in which order, and what sees the samples."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gblm
from gblm import methods

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


def test_a_linear_used_twice_stays_dense():
    model = Toy(0, 1, twice=True, idle=True)
    with pytest.raises(gblm.GblmError, match="no linears to prune"):
        prune(model, toy_batch(), adapter=TOY)
    model.layers[1].twice = False
    report = prune(model, toy_batch(), adapter=TOY)
    assert report.dense["layers.0.inner"] == "used more than once by its block"
    assert [linear.name for linear in report.linears] == ["layers.1.inner", "layers.1.outer"]


def test_a_block_used_twice_is_refused_by_name():
    with pytest.raises(gblm.GblmError, match=r"block layers\.0 is used more than once"):
        prune(Toy(0, 1, 0), toy_batch(), adapter=TOY)


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
    with pytest.raises(gblm.GblmError, match="no linears to prune in the blocks of Toy"):
        prune(Toy(0), toy_batch(), adapter=replace(TOY, kind=lambda module: None))


def test_a_model_of_an_unknown_library_needs_an_adapter():
    with pytest.raises(gblm.GblmError, match="no adapter for Toy"):
        prune(Toy(0), toy_batch())
