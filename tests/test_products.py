"""Products by functions and by modules: a model of both kinds has the same linears.

The blocks of `Functional` and of `Modular` compute the same from the same numbers; the first holds
its matrices in fused, transposed and three-dimensional parameters, the second in linear layers.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gblm
from gblm import methods
from gblm.maths.patterns import parse
from gblm.methods import solve
from gblm.methods.solve import Solve
from gblm.walk.blocks import choose
from gblm.walk.prune import unfit
from gblm.walk.survey import survey

WIDE, HIDDEN, EXPERTS, SAMPLES, LENGTH = 8, 16, 3, 6, 5


class Functional(nn.Module):
    """A block whose matrices are parts of parameters, used by functions of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(3 * WIDE, WIDE) / 3)
        self.transposed = nn.Parameter(torch.randn(WIDE, HIDDEN) / 3)
        self.left = nn.Parameter(torch.randn(WIDE, HIDDEN) / 4)
        self.heads = nn.Parameter(torch.randn(WIDE, 2, WIDE // 2) / 3)
        self.batched = nn.Parameter(torch.randn(EXPERTS, WIDE, WIDE) / 3)
        self.routed = nn.Parameter(torch.randn(EXPERTS, WIDE, WIDE) / 3)
        self.pointwise = nn.Parameter(torch.randn(WIDE, WIDE, 1) / 3)
        self.kernel = nn.Parameter(torch.randn(WIDE, 1, 3) / 3)
        self.window = nn.Parameter(torch.randn(2, WIDE, 3) / 9)
        self.grouped = nn.Parameter(torch.randn(WIDE, WIDE // 2, 3) / 6)
        self.spread = nn.Parameter(torch.randn(WIDE, WIDE, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, part) for part in self.fused.chunk(3))
        x = x + q * k.tanh() + v
        hidden = torch.addmm(x.new_zeros(HIDDEN), x.flatten(0, 1), self.transposed)
        hidden = hidden.view(*x.shape[:2], HIDDEN).tanh()
        x = x + (self.left @ hidden.mT).mT
        x = x + torch.einsum("btd,dhk->bthk", x, self.heads).flatten(2)
        x = x + (x[:, None] @ self.batched).sum(dim=1).tanh()
        x = x + F.conv1d(x.mT, self.pointwise).mT
        x = x + F.conv1d(x.mT, self.kernel, padding=1, groups=WIDE).mT
        x = x + F.conv1d(x.mT, self.window, stride=2, padding=1).mean(dim=(1, 2))[:, None, None]
        x = x + F.conv1d(x.mT, self.grouped, padding="same", groups=2).mT
        x = x + F.conv_transpose1d(x.mT, self.spread, padding=1).mT
        rows, y = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        to = rows[:, :2].argmax(dim=1)  # nobody is sent to the last
        for i in to.unique():
            y[to == i] = F.linear(rows[to == i], self.routed[i])
        return x + y.view_as(x)


def patches(x: Tensor) -> Tensor:
    """Return three neighbours `[n, t, channels·3]` of every position of `x [n, t, channels]`."""
    return F.pad(x.mT, (1, 1)).unfold(2, 3, 1).movedim(1, 2).flatten(2)


class Modular(nn.Module):
    """The same with a linear layer for every matrix; `take` copies the other's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.heads, self.pointwise = (
            nn.Linear(WIDE, WIDE, bias=False) for _ in range(5)
        )
        self.transposed = nn.Linear(WIDE, HIDDEN, bias=False)
        self.left = nn.Linear(HIDDEN, WIDE, bias=False)
        self.batched, self.routed = (
            nn.ModuleList(nn.Linear(WIDE, WIDE, bias=False) for _ in range(EXPERTS))
            for _ in range(2)
        )
        self.kernel = nn.Parameter(torch.empty(WIDE, 1, 3))
        self.window = nn.Linear(3 * WIDE, 2, bias=False)
        self.grouped = nn.ModuleList(
            nn.Linear(3 * WIDE // 2, WIDE // 2, bias=False) for _ in range(2)
        )
        self.spread = nn.Linear(WIDE, 3 * WIDE, bias=False)

    def matrices(self) -> dict[str, nn.Linear]:
        """Return the linears by the names they have in the other."""
        fused = {"[0:8]": self.q, "[8:16]": self.k, "[16:24]": self.v}
        return {
            **{f"fused{part}": linear for part, linear in fused.items()},
            "transposed": self.transposed,
            "left": self.left,
            "heads": self.heads,
            **{f"batched[{i}]": linear for i, linear in enumerate(self.batched)},
            "pointwise": self.pointwise,
            **{f"routed[{i}]": linear for i, linear in enumerate(self.routed)},
            "window": self.window,
            "grouped[0:4]": self.grouped[0],
            "grouped[4:8]": self.grouped[1],
            "spread": self.spread,
        }

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(x) * self.k(x).tanh() + self.v(x)
        hidden = self.transposed(x).tanh()
        x = x + self.left(hidden)
        x = x + self.heads(x)
        x = x + sum(linear(x) for linear in self.batched).tanh()
        x = x + self.pointwise(x)
        x = x + F.conv1d(x.mT, self.kernel, padding=1, groups=WIDE).mT
        x = x + self.window(patches(x)[:, ::2]).mean(dim=(1, 2))[:, None, None]
        halves = zip(self.grouped, x.chunk(2, dim=-1), strict=True)
        x = x + torch.cat([linear(patches(half)) for linear, half in halves], dim=-1)
        parts = self.spread(x).mT  # which overlap
        x = x + F.fold(parts, (1, LENGTH), (1, 3), padding=(0, 1)).squeeze(2).mT
        rows, y = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        to = rows[:, :2].argmax(dim=1)
        for i in to.unique():
            y[to == i] = self.routed[int(i)](rows[to == i])
        return x + y.view_as(x)


class Model(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(WIDE, 3)
        self.double()

    def trunk(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        for layer in self.layers:
            x = layer(x)
        return x

    def losses(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.head(hidden.mean(dim=1)), batch["label"], reduction="none")


ADAPTER = gblm.Adapter(
    lambda model: {f"layers.{i}": block for i, block in enumerate(model.layers)},
    Model.trunk,
    Model.losses,
)


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, LENGTH, WIDE, generator=draw, dtype=torch.float64)
    return {"x": x, "label": torch.arange(SAMPLES) % 3}


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model's linears by name."""
    found = survey(model, batch(), ADAPTER)
    return {linear.name: linear.weight for block in found for linear in block.linears}


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """Return a functional model and the modular one of the same numbers."""
    functional, modular = Model(Functional), Model(Modular)
    found = matrices(functional)
    with torch.no_grad():
        modular.head.load_state_dict(functional.head.state_dict())
        for i, layer in enumerate(modular.layers):
            layer.kernel.copy_(functional.layers[i].kernel)
            for name, linear in layer.matrices().items():
                linear.weight.copy_(found[f"layers.{i}.{name}"])
    return functional, modular


def test_the_linears_are_the_parts_of_the_parameters(pair):
    functional, modular = pair
    assert sorted(matrices(functional)) == sorted(
        f"layers.{i}.{name}" for i, layer in enumerate(modular.layers) for name in layer.matrices()
    )
    torch.testing.assert_close(ADAPTER.trunk(functional, batch()), ADAPTER.trunk(modular, batch()))


def test_what_is_no_product_is_named_as_dense(pair):
    report = gblm.prune(pair[0], batch(), methods.wanda(), "0.5", adapter=ADAPTER)
    reason = "a depthwise kernel"
    assert report.dense == {f"layers.{i}.kernel": reason for i in range(2)}


@pytest.mark.parametrize("backward", ["blocks", "model"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_gradients_are_those_of_autograd(pair, backward, micro_batch):
    functional, modular = pair
    options = {"adapter": ADAPTER, "micro_batch": 1 if backward == "model" else micro_batch}
    found = gblm.gradient_sums(
        functional, batch(), ["grad_abs", "grad_sq"], backward=backward, **options
    )
    losses = ADAPTER.loss(modular, ADAPTER.trunk(modular, batch()), batch())
    for i, layer in enumerate(modular.layers):
        for name, linear in layer.matrices().items():
            gradients = [
                torch.autograd.grad(loss, linear.weight, retain_graph=True, allow_unused=True)[0]
                for loss in losses
            ]
            gradients = [torch.zeros_like(linear.weight) if g is None else g for g in gradients]
            sums, close = found[f"layers.{i}.{name}"], {"rtol": 1e-9, "atol": 1e-12}
            total = sum(g.abs() for g in gradients)
            torch.testing.assert_close(sums["grad_abs"], total, **close)
            total = sum(g.square() for g in gradients)
            torch.testing.assert_close(sums["grad_sq"], total, **close)


@pytest.mark.parametrize("pattern", ["0.5", pytest.param("2:4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [*methods.METHODS, "gblm+repair"])
def test_the_masks_are_those_of_linear_layers(pair, method, pattern, monkeypatch):
    monkeypatch.setattr(solve, "FEWEST", 1)  # none is lent what others see
    functional, modular = pair
    options = {"refine": 0, "allocation": None} if method == "best" else {}
    name, chosen = methods.parse(method)
    for model in pair:
        made = methods.make(name, **chosen, **options)
        gblm.prune(model, batch(), made, pattern, adapter=ADAPTER, micro_batch=1)
    found = matrices(functional)
    for i, layer in enumerate(modular.layers):
        for part, linear in layer.matrices().items():
            if part == "routed[2]":  # which the other leaves as it is, for no sample uses it
                assert (found[f"layers.{i}.{part}"] == 0).float().mean() == 0.5
                continue
            weight = found[f"layers.{i}.{part}"]
            assert torch.equal(weight == 0, linear.weight == 0), (i, part)
            # Conjugate gradients on a few inputs make more of rounding in another order.
            torch.testing.assert_close(weight, linear.weight.detach(), rtol=1e-5, atol=1e-8)


def test_an_expert_with_few_inputs_is_pruned_by_magnitude_and_says_so():
    model = Model(Functional)
    dense = {name: weight.clone() for name, weight in matrices(model).items()}
    report = gblm.prune(model, batch(), methods.wanda(), "0.5", adapter=ADAPTER, micro_batch=1)
    rows = {linear.name: linear for linear in report.linears}
    none = rows["layers.0.routed[2]"]
    assert (none.positions, none.note) == (0, "by magnitude, for it has 0 inputs")
    weight = dense["layers.0.routed[2]"].abs()
    highest = weight >= weight.sort(dim=1).values[:, WIDE // 2 :][:, :1]
    assert torch.equal(matrices(model)["layers.0.routed[2]"] != 0, highest)
    assert rows["layers.0.batched[0]"].positions == SAMPLES * LENGTH
    assert not rows["layers.0.batched[0]"].note


class Narrow(nn.Module):
    """A block of a wide matrix and a small one, whose inputs 4 does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(WIDE, 64), nn.Linear(64, WIDE)
        self.small = nn.Linear(3, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.wide(x).tanh()) + self.small(x[..., :3])


def test_a_small_matrix_that_n_of_m_does_not_fit_stays_dense():
    model = Model(Narrow)
    report = gblm.prune(model, batch(), methods.gblm(), "2:4", adapter=ADAPTER)
    assert len(report.linears) == 4
    assert report.dense["layers.0.small"].startswith("2:4: in=3 is not divisible by 4")
    assert (model.layers[0].small.weight != 0).all()
    assert report.weights < report.block_weights


def test_one_that_the_user_has_named_is_refused():
    blocks = survey(Model(Narrow), batch(), ADAPTER)
    choose(blocks, ["*.small", "*.wide"], [])
    with pytest.raises(gblm.GblmError, match=r"layers\.0\.small \[8, 3\].*not divisible by 4"):
        unfit(blocks, methods.gblm(), parse("2:4"))


def test_an_expert_can_be_chosen_by_its_name():
    blocks = survey(Model(Functional), batch(), ADAPTER)
    choose(blocks, ["layers.0.routed[1]", "*.batched*"], ["layers.1.*"])
    left = [linear.name for block in blocks for linear in block.linears]
    assert left == [*(f"layers.0.batched[{i}]" for i in range(EXPERTS)), "layers.0.routed[1]"]


def test_what_holds_a_nan_is_named_by_the_expert():
    def solve(weight: Tensor, statistics: gblm.Statistics, pattern: gblm.Pattern):
        keep = pattern.keep(weight.abs())
        return weight * (torch.nan if next(failures) else 1), keep

    failures = iter([0] * 3 + [0, 0, 0, 1] + [0] * 99)
    method = gblm.Method("own", (Solve("own", frozenset({"input_sq"}), solve),))
    with pytest.raises(gblm.GblmError, match=r"layers\.0\.batched\[0\] \[8, 8\], own.*NaN"):
        gblm.prune(Model(Functional), batch(), method, "0.5", adapter=ADAPTER, micro_batch=1)


class Attention(nn.Module):
    """A block of torch's own attention, whose products a function of torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDE, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0]


def test_the_matrices_of_torch_attention_are_linears():
    model = Model(Attention)
    assert [*matrices(model)] == [
        f"layers.{i}.attention.{name}" for i in range(2) for name in ("in_proj_", "out_proj")
    ]
    found = gblm.gradient_sums(model, batch(), ["grad_abs"], adapter=ADAPTER)
    losses = ADAPTER.loss(model, ADAPTER.trunk(model, batch()), batch())
    for name, weight in matrices(model).items():
        own = model.get_parameter(f"{name}weight" if name.endswith("_") else f"{name}.weight")
        total = sum(torch.autograd.grad(x, own, retain_graph=True)[0].abs() for x in losses)
        assert weight.shape == own.shape
        torch.testing.assert_close(found[name]["grad_abs"], total, rtol=1e-9, atol=1e-12)
    report = gblm.prune(model, batch(), methods.best(refine=0), "0.5", adapter=ADAPTER)
    assert report.weights == report.block_weights
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
