"""Laws of a device whose memory runs out, at any allocation of a run, once or from there on.

The run ends in the result of a run that nothing disturbed, or in a `GblmError`. Then every block is
either as it was or as that run leaves it, and nothing hangs on the model any more.
"""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gblm
from gblm import methods

DEVICE = "second"
EVER = 2**40  # allocations that fail
Batch = dict[str, Tensor]
Weights = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(self.norm(x)).relu())


class Model(nn.Module):
    """Two blocks on samples `x [n, positions, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.double().to(DEVICE)

    def trunk(self, batch: Batch) -> Tensor:
        x = batch["x"]
        for layer in self.layers:
            x = layer(x)
        return x

    def losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        logits = self.head(hidden.mean(dim=1))
        return nn.functional.cross_entropy(logits, batch["label"], reduction="none")


ADAPTER = gblm.Adapter(
    blocks=lambda model: {f"layers.{i}": block for i, block in enumerate(model.layers)},
    trunk=Model.trunk,
    loss=Model.losses,
)


def batch(samples: int = 4, positions: int = 260) -> Batch:
    """Return samples long enough for a refinement of several steps."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(samples, positions, 6, generator=draw, dtype=torch.float64)
    return {"x": x, "label": torch.arange(samples) % 3}


@dataclass(frozen=True)
class Run:
    """A method and a backward; and of how many allocations one is tried in the quick tests."""

    method: str
    backward: str
    stride: int  # a prime, so as to come by all parts of a block

    def prune(self, model: nn.Module) -> None:
        name, options = methods.parse(self.method)
        method = methods.make(name, **options)
        gblm.prune(model, batch(), method, "0.5", adapter=ADAPTER, backward=self.backward)


RUNS = {
    "wanda": Run("wanda", "blocks", 19),
    "gblm by blocks": Run("gblm", "blocks", 31),
    "gblm by the model": Run("gblm", "model", 29),
    "wanda++": Run("wanda++:rounds=1", "blocks", 53),
    "best": Run("best", "blocks", 271),
}


def weights(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def exactly(found: Weights, expected: Weights) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in found.items())


def nearly(found: Weights, expected: Weights) -> bool:
    """Say whether masks are the same, and weights but for what the order of sums may move."""
    return all(
        torch.equal(value == 0, expected[name] == 0)
        and torch.allclose(value, expected[name], rtol=1e-4, atol=1e-6)
        for name, value in found.items()
    )


def left_behind(model: nn.Module) -> Iterator[str]:
    """Yield what a run has left on a model."""
    for name, module in model.named_modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            yield f"a hook on {name}"
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.grad is not None:
            yield f"a state of {name}"


def place(error: Exception) -> str:
    """Return the function of gblm that an error came out of."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/gblm/" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "outside"


def fault_at(run: Run, number: int, count: int, expected: nn.Module) -> str | None:
    """Return what is wrong after memory ran out at an allocation, None for nothing."""
    model = Model()
    dense = [weights(block) for block in model.layers]
    refused = False
    torch.second.plant(number, count)
    try:
        run.prune(model)
    except gblm.GblmError:
        refused = True
    except Exception as error:
        return f"{type(error).__name__} in {place(error)}"
    finally:
        torch.second.plant(0, 0)
    if not refused and not nearly(weights(model), weights(expected)):
        return "another result"
    for i, block in enumerate(model.layers):
        now = weights(block)
        if not (exactly(now, dense[i]) or nearly(now, weights(expected.layers[i]))):
            return f"layers.{i} is neither as it was nor as it should become"
    return next(left_behind(model), None)


def check(run: Run, count: int, numbers: slice) -> None:
    """Let memory run out at those allocations of a run, and fail where something is wrong then."""
    expected = Model()
    torch.second.plant(0, 0)
    run.prune(expected)
    chosen = range(1, torch.second.allocations() + 1)[numbers]
    wrong: dict[str, list[int]] = {}
    for number in chosen:
        if fault := fault_at(run, number, count, expected):
            wrong.setdefault(fault, []).append(number)
    lines = [f"{len(places)} of {len(chosen)}, as {places[0]}: {f}" for f, places in wrong.items()]
    assert not lines, "\n".join(["after memory ran out at", *lines])


TIMES = pytest.mark.parametrize("count", [1, EVER], ids=["once", "for ever"])


@TIMES
@pytest.mark.parametrize("name", RUNS)
def test_some_allocations(name, count):
    check(RUNS[name], count, slice(None, None, RUNS[name].stride))


@TIMES
@pytest.mark.parametrize("number", [1, 7, 31])
def test_the_middle_of_a_refinement(number, count, monkeypatch):
    run, expected, step, steps = RUNS["best"], Model(), torch.optim.Adam.step, []
    run.prune(expected)

    def step_then_run_out(*args, **kwargs):
        result = step(*args, **kwargs)
        steps.append(result)
        if len(steps) == 1:  # of several, and of the first block
            torch.second.plant(number, count)
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", step_then_run_out)
    assert fault_at(run, 0, 0, expected) is None
    assert steps


@pytest.mark.slow
@pytest.mark.parametrize("first", range(4))
@TIMES
@pytest.mark.parametrize("name", RUNS)
def test_every_allocation(name, count, first):
    check(RUNS[name], count, slice(first, None, 4))
