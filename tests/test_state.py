"""Laws of what surrounds a block: its own autocast, and what the model sets before its blocks.

A block may run in pieces, wait in the middle and run again for its gradients. All the same it sees
what the model and itself have set, and a run leaves the thread as it was.
"""

import contextvars
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gblm
from gblm import methods
from gblm.maths import stats

SETTING: contextvars.ContextVar[str] = contextvars.ContextVar("setting", default="none")
METHODS = [*methods.METHODS, "gblm+repair", "wanda++:rounds=1"]


def of_thread() -> tuple[Any, ...]:
    """Return the state of the thread that blocks and models set, but for whether it learns."""
    modes = torch._C._len_torch_function_stack()
    return SETTING.get(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), modes


@contextmanager
def setting(value: str) -> Iterator[None]:
    token = SETTING.set(value)
    try:
        yield
    finally:
        SETTING.reset(token)


class Own(nn.Module):
    """A block that puts the middle one of its linears into a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.faults: list[str] = []

    def expect(self, where: str, state: tuple[Any, ...]) -> None:
        if of_thread() != state:
            self.faults.append(f"{where}: {of_thread()} instead of {state}")

    def forward(self, x: Tensor) -> Tensor:
        before, learns = of_thread(), torch.is_grad_enabled()
        y = self.first(x).relu()
        self.expect("after the first linear", before)
        with torch.autocast("cpu", torch.bfloat16), setting("own"), torch.device("cpu"):
            inside = of_thread()
            y = self.second(y).relu()
            self.expect("within its own state", inside)
        self.expect("after its own state", before)
        y = x + self.third(y)
        self.expect("after the last linear", before)
        if torch.is_grad_enabled() != learns:
            self.faults.append("gradients have been switched")
        return y


class Asking(nn.Module):
    """A block that does what the model sets before it says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.faults: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.expect("at the beginning")
        y = self.first(x).relu()
        self.expect("after a linear")
        return x + self.second(y)

    def expect(self, where: str) -> None:
        state = of_thread()[:3]
        if state != ("model", True, torch.bfloat16):
            self.faults.append(f"{where}: {state}")


class Model(nn.Module):
    """Two blocks on samples `x [n, t, 8]`, in double precision, which no autocast changes."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.double()

    def trunk(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        for layer in self.layers:
            x = layer(x)
        return x

    def own_trunk(self, batch: dict[str, Tensor]) -> Tensor:
        with setting("model"), torch.autocast("cpu", torch.bfloat16):
            return self.trunk(batch)

    def losses(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        logits = self.head(hidden.mean(dim=1))
        return nn.functional.cross_entropy(logits, batch["label"], reduction="none")

    @property
    def faults(self) -> list[str]:
        return [fault for layer in self.layers for fault in layer.faults]


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {f"layers.{i}": block for i, block in enumerate(model.layers)}


def run(model: nn.Module, trunk: Any, text: str, backward: str, micro_batch: int | None) -> None:
    """Prune a model, and check that the thread is then as it was."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 8, generator=draw, dtype=torch.float64)
    name, options = methods.parse(text)
    before = of_thread()
    try:
        gblm.prune(
            model,
            {"x": x, "label": torch.arange(6) % 3},
            methods.make(name, **options),
            "0.5",
            adapter=gblm.Adapter(blocks, trunk, Model.losses),
            backward=backward,
            micro_batch=micro_batch,
        )
    finally:
        assert of_thread() == before
        assert torch.is_grad_enabled()


@pytest.fixture
def thread() -> Iterator[Executor]:
    """A thread of its own, so that what a run leaves in it is no matter of other tests."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def cases() -> list[Any]:
    """Every method with every backward that it uses, some samples at a time and all at once."""
    found = []
    for text in METHODS:
        name, options = methods.parse(text)
        method = methods.make(name, **options)
        uses = method.needs & set(stats.GRADIENT) or method.allocation
        for backward in ("blocks", "model") if uses else ("blocks",):
            found += [(text, backward, micro_batch) for micro_batch in (2, None)]
    return found


@pytest.mark.parametrize(("name", "backward", "micro_batch"), cases())
def test_a_block_has_its_own_state(name, backward, micro_batch, thread):
    model = Model(Own)
    thread.submit(run, model, Model.trunk, name, backward, micro_batch).result()
    assert model.faults == []


@pytest.mark.parametrize(("name", "backward", "micro_batch"), cases())
def test_what_a_model_sets_before_its_blocks_is_set_within(name, backward, micro_batch, thread):
    model = Model(Asking)
    thread.submit(run, model, Model.own_trunk, name, backward, micro_batch).result()
    assert model.faults == []


class Failing(Own):
    """A block that fails in the middle of a call, after some others."""

    left = 0  # calls, of all blocks

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.autocast("cpu", torch.bfloat16), setting("own"), torch.device("cpu"):
            y = self.second(y)
            Failing.left -= 1
            if not Failing.left:
                raise KeyError("planted")
            return x + self.third(y)


@pytest.mark.parametrize("name", ["wanda", "gblm", "wanda++:rounds=1", "best"])
@pytest.mark.parametrize("calls", [3, 6, 9, 12])
def test_a_run_that_fails_leaves_the_thread_as_it_was(name, calls, thread):
    Failing.left = calls
    work = thread.submit(run, Model(Failing), Model.trunk, name, "blocks", 2)
    with pytest.raises(KeyError, match="planted"):
        work.result()
