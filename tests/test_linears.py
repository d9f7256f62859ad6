"""Laws of what counts as a linear: what cannot be pruned is named as dense and left as it is.

And what a report says of the others is true of the model that the run leaves.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import gblm
from gblm import methods

WORDS, WIDE = 16, 8
METHODS = [*methods.METHODS, "gblm+repair", "wanda++:rounds=1"]


class Int8Linear(nn.Linear):
    """A linear whose weight is stored in int8, with a scale for every output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        scale = self.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        whole = (self.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


class Float8Linear(nn.Linear):
    """A linear whose weight is stored in eight bits."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        stored = self.weight.detach().to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).T


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module = nn.Linear(WIDE, WORDS)
        self.outer: nn.Module = nn.Linear(WORDS, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).relu())


class Model(nn.Module):
    """Two blocks between an embedding of `ids [n, t]` and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDE)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDE, 3)

    def trunk(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embedding(batch["ids"])
        for layer in self.layers:
            x = layer(x)
        return x

    def losses(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        logits = self.head(hidden.mean(dim=1)).float()
        return nn.functional.cross_entropy(logits, batch["label"], reduction="none")


def adapter() -> gblm.Adapter:
    return gblm.Adapter(
        lambda model: {f"layers.{i}": block for i, block in enumerate(model.layers)},
        Model.trunk,
        Model.losses,
    )


def prune(model: nn.Module, text: str, **options) -> gblm.Report:
    name, chosen = methods.parse(text)
    ids = torch.randint(WORDS, (6, 5), generator=torch.Generator().manual_seed(0))
    batch = {"ids": ids, "label": torch.arange(6) % 3}
    given = {"adapter": adapter(), **options}
    return gblm.prune(model, batch, methods.make(name, **chosen), "0.5", **given)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# Linears that stay dense


def tie_to_embedding(model: nn.Module) -> None:
    model.layers[0].inner.weight = model.embedding.weight


def tie_to_head(model: nn.Module) -> None:
    model.head = nn.Linear(WIDE, WORDS)
    model.layers[0].inner.weight = model.head.weight


def store_in_int8(model: nn.Module) -> None:
    model.layers[0].inner = Int8Linear(WIDE, WORDS)


def store_in_float8(model: nn.Module) -> None:
    model.layers[0].inner = Float8Linear(WIDE, WORDS)


def weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(model.layers[0].inner)


def orthogonal(model: nn.Module) -> None:
    parametrizations.orthogonal(model.layers[0].inner)


def masked_by_torch(model: nn.Module) -> None:
    torch_prune.l1_unstructured(model.layers[0].inner, "weight", 0.3)


CASES = [
    tie_to_embedding,
    tie_to_head,
    store_in_int8,
    store_in_float8,
    weight_norm,
    orthogonal,
    masked_by_torch,
]


@pytest.mark.parametrize("name", ["magnitude", "wanda", "gblm", "wanda++:rounds=1", "best"])
@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_what_cannot_be_pruned_stays_dense_and_is_named(change, name):
    model = Model()
    change(model)
    weight = model.layers[0].inner.weight.detach().clone()
    shared = {key: value for key, value in state(model).items() if key.startswith("embedding")}
    report = prune(model, name)
    assert "layers.0.inner" in report.dense
    assert report.dense["layers.0.inner"]
    assert "layers.0.inner" not in {linear.name for linear in report.linears}
    after = model.layers[0].inner.weight.detach()
    if after.is_floating_point() and after.dtype.itemsize > 1:
        torch.testing.assert_close(after, weight)
    else:
        assert torch.equal(after.view(torch.uint8), weight.view(torch.uint8))
    assert all(torch.equal(state(model)[key], value) for key, value in shared.items())
    for linear in (model.layers[0].outer, model.layers[1].inner, model.layers[1].outer):
        assert (linear.weight == 0).float().mean() > 0.2


# What the report says


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16)),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_zeros_are_counted_in_the_model_as_it_is_left(name, dtype):
    model = Model().to(dtype)
    with torch.no_grad():
        # Weights that become others, or none, where they are scaled in a narrow dtype.
        model.layers[0].inner.weight[:, ::2] *= 1e-6
        model.layers[1].outer.weight[0] = 0
    report = prune(model, name)
    assert len(report.linears) == 4
    for linear in report.linears:
        weight = model.get_submodule(linear.name).weight
        assert linear.sparsity == pytest.approx((weight == 0).double().mean().item(), abs=1e-6)


# What a batch may hold


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("name", ["wanda", "best"])
def test_ids_may_be_of_any_whole_dtype(name, dtype, make_llama, make_batch):
    expected, model = make_llama(torch.float64), make_llama(torch.float64)
    batch = make_batch(4, 6)
    gblm.prune(expected, batch, methods.make(name), "0.5")
    gblm.prune(model, {"input_ids": batch["input_ids"].to(dtype)}, methods.make(name), "0.5")
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
