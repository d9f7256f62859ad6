"""Gradient sums are those of plain autograd, one sample at a time, however they are computed."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_flatten

import gblm
from gblm import methods
from gblm.base import Statistics
from gblm.machine.placement import Placement
from gblm.walk import head
from gblm.walk.blocks import Block
from gblm.walk.gradients import Gradients, OnTheWay, sweep
from gblm.walk.survey import find_adapter
from gblm.walk.walk import Walk

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


# Outputs that go past blocks


class Stage(nn.Module):
    """A block on `x [n, t, wide]`, and on what an earlier one has given; it gives two tensors."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(wide, wide + 2), nn.Linear(wide + 2, wide)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.inner(x if skip is None else x * skip).tanh()
        return x + self.outer(hidden), {"hidden": hidden, "number": torch.tensor(3)}


class UNet(nn.Module):
    """Two blocks down, two up; the output of the first is used after the last, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 6)
        self.stages = nn.ModuleList(Stage(6) for _ in range(4))
        self.head = nn.Linear(6, 5)


def unet_trunk(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    x = model.stem(batch["x"]).sin()
    first, beside = model.stages[0](x)
    second, _ = model.stages[1](first.roll(1, 1) * 2)
    third, _ = model.stages[2](second, first)
    last, _ = model.stages[3](third + first, second)
    return last * first + x, beside["hidden"].sum(dim=-1)


UNET = gblm.Adapter(
    blocks=lambda model: {f"stages.{i}": stage for i, stage in enumerate(model.stages)},
    trunk=unet_trunk,
    loss=lambda model, hidden, batch: (
        cross_entropy(model.head(hidden[0].mean(dim=1)), batch["label"], reduction="none")
        + hidden[1].square().mean(dim=1)
    ),
)


def unet() -> tuple[nn.Module, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return the model, a batch, and the sums of plain autograd."""
    model = UNet().double()
    torch.manual_seed(1)
    batch = {"x": torch.randn(7, 4, 6).double(), "label": torch.arange(7) % 5}
    linears = {
        f"stages.{name}": module
        for name, module in model.stages.named_modules()
        if isinstance(module, nn.Linear)
    }
    sums = {name: {"grad_abs": 0, "grad_sq": 0} for name in linears}
    for i in range(7):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        model.zero_grad()
        UNET.loss(model, unet_trunk(model, one), one).sum().backward()
        for name, module in linears.items():
            sums[name]["grad_abs"] = sums[name]["grad_abs"] + module.weight.grad.abs()
            sums[name]["grad_sq"] = sums[name]["grad_sq"] + module.weight.grad.square()
    model.zero_grad()
    return model, batch, sums


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
@pytest.mark.parametrize("backward", ["blocks", "model"])
def test_gradients_follow_what_goes_past_blocks(backward, micro_batch):
    model, batch, expected = unet()
    found = gblm.gradient_sums(
        model, batch, NEEDS, adapter=UNET, backward=backward, micro_batch=micro_batch
    )
    check_sums(found, expected, 1e-12)


@pytest.mark.parametrize("place", ["memory", "file"])
def test_gradients_are_the_same_bits_wherever_tensors_rest(place, tmp_path, monkeypatch):
    model, batch, _ = unet()
    plain = sweep(Walk.of(model, batch, UNET, micro_batch=3), NEEDS, "blocks")[0]
    placed_at(monkeypatch, place)
    found, _ = sweep(Walk.of(model, batch, UNET, micro_batch=3, folder=tmp_path), NEEDS, "blocks")
    for name, sums in plain.items():
        assert all(torch.equal(found[name][key], value) for key, value in sums.sums.items())
    assert not list(tmp_path.iterdir())


def placed_at(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(Placement, "plan", lambda own, *_: setattr(own, "place", place))


class Cut(Exception):
    """Planted in the middle of a sweep."""


class Kept:
    """A store in memory, which fails after so many blocks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.sums: dict[str, Statistics] = {}
        self.finished: list[str] = []
        self.inputs: OnTheWay = {}

    def has(self, block: Block) -> bool:
        return block.name in self.finished

    def on_the_way(self) -> OnTheWay:
        return dict(self.inputs)

    def keep(self, block: Block, sums: Gradients, on_the_way: OnTheWay) -> None:
        if len(self.finished) == self.count:
            raise Cut
        self.finished.append(block.name)
        self.sums |= sums
        self.inputs = {name: value.clone() for name, value in on_the_way.items()}


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("then", ["blocks", "model"])
def test_a_sweep_goes_on_past_blocks(count, then):
    model, batch, expected = unet()
    store = Kept(count)
    with pytest.raises(Cut):
        sweep(Walk.of(model, batch, UNET, micro_batch=3), NEEDS, "blocks", store)
    assert store.finished == [f"stages.{i}" for i in (3, 2, 1, 0)][:count]
    store.count = -1
    sweep(Walk.of(model, batch, UNET, micro_batch=3), NEEDS, then, store)
    check_sums(store.sums, expected, 1e-12)


@pytest.mark.parametrize("method", ["gblm", "sparsegpt", "wanda++", "best"])
@pytest.mark.parametrize("place", ["device", "file"])
def test_pruning_follows_what_goes_past_blocks(method, place, tmp_path, monkeypatch):
    (some, batch, _), (whole, _, _) = unet(), unet()
    made = methods.refined(methods.make(method), 0)
    gblm.prune(whole, batch, made, "0.5", adapter=UNET, micro_batch=7, backward="model")
    placed_at(monkeypatch, place)
    gblm.prune(some, batch, made, "0.5", adapter=UNET, micro_batch=2, backward="blocks")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(some.state_dict()[name], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_share_of_samples_that_repeat_gives_the_masks_of_all(norm, make_llama, batch):
    """gblm takes the first of them, and their sum for that of all."""
    twice = {name: torch.cat([value[:4]] * 8) for name, value in batch.items()}
    models = [make_llama(torch.float64) for _ in range(2)]
    for model, share in zip(models, (1.0, 0.5), strict=True):
        gblm.prune(model, twice, methods.gblm(alpha=100, norm=norm, share=share), "0.5")
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_what_a_forward_pass_keeps_is_freed_without_a_backward(make_llama):
    with head.saved(make_llama()):
        output = torch.ones(3, requires_grad=True).exp()  # kept for its own backward
        left = weakref.ref(output)
        del output
    assert left() is None


def test_a_plain_backward_holds_the_graph_of_one_micro_batch(llama, make_batch):
    adapter = find_adapter(llama)
    hidden: list[weakref.ref] = []

    def watched(*args):
        assert all(left() is None for left in hidden)
        output = adapter.trunk(*args)
        hidden.extend(weakref.ref(leaf) for leaf in tree_flatten(output)[0])
        return output

    watching = replace(adapter, trunk=watched)
    walk = Walk.of(llama, make_batch(4, 8), watching, micro_batch=1)
    hidden.clear()
    sweep(walk, NEEDS, "model")
    assert len(hidden) >= 4
