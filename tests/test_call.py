"""Calls of a block: slices and joins along the dimension that holds the samples, wherever it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import gblm
from gblm import methods
from gblm.walk.blocks import Block
from gblm.walk.call import Call, part, place
from gblm.walk.visit import Visit, forward
from gblm.walk.walk import Walk

STREAMS, SAMPLES, POSITIONS, WIDE = 4, 6, 4, 8  # as many positions as streams


class Streams(nn.Module):
    """A block on `x [4, n, t, wide]`: each linear sees one stream, or where `whole` all of them.

    It is called with more than `x`, and gives more.
    """

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDE, 2 * WIDE)
        self.outer = nn.Linear(2 * WIDE, WIDE)
        self.whole = whole

    def forward(self, x: Tensor, scale: Tensor, *, extra: dict[str, Any]) -> dict[str, Any]:
        y = self.outer(self.inner(x if self.whole else x[1]).relu()) * scale
        weighted = y * extra["by sample"][:, None, None] if not self.whole else y
        x = x + weighted
        sums = x.sum(dim=(0, 2))  # [n, wide]
        turned = torch.stack([sums, -sums], dim=1).flatten(0, 1).T  # [wide, 2n]
        return {"x": x, "sums": sums, "turned": turned, "name": extra["name"], "scale": scale}


class Parallel(nn.Module):
    """Three such blocks, on samples `x [n, t, wide]` in four streams."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Streams(whole) for _ in range(3))
        self.head = nn.Linear(WIDE, 5)


def trunk(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = torch.stack([batch["x"] * (i + 1) for i in range(STREAMS)])
    extra = {"by sample": batch["x"].mean(dim=(1, 2)), "name": "a block", "none": None}
    sums = torch.zeros(())
    for layer in model.layers:
        output = layer(x, torch.tensor(0.5), extra=extra)
        x, sums = output["x"], sums + output["sums"]
    return x.mean(dim=0) + sums[:, None]


ADAPTER = gblm.Adapter(
    blocks=lambda model: {f"layers.{i}": block for i, block in enumerate(model.layers)},
    trunk=trunk,
    loss=lambda model, hidden, batch: nn.functional.cross_entropy(
        model.head(hidden.mean(dim=1)), batch["label"], reduction="none"
    ),
)


def drawn(samples: int = SAMPLES) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "x": torch.randn(samples, POSITIONS, WIDE, dtype=torch.float64),
        "label": torch.arange(samples) % 5,
    }


def at_first_block(model: nn.Module, batch: dict[str, Tensor], work: Any, **options: Any) -> None:
    """Let `work(call)` have the calls of the first block while the model waits there."""

    def visit(visit: Visit) -> None:
        if visit.block is visit.walk.blocks[0]:
            for call in visit.calls:
                work(call)

    forward(Walk.of(model, batch, ADAPTER, **options), visit)


def test_the_survey_finds_where_samples_are():
    model, batch = Parallel().double(), drawn()
    block = Walk.of(model, batch, ADAPTER).blocks[1]
    #  x [4, n, t, wide], a number, one entry of each sample, a name, nothing
    assert block.arguments == [(1, 1), None, (0, 1), None, None]
    assert block.outputs == [(1, 1), (0, 1), (1, 2), None, None]


@pytest.mark.parametrize("step", [1, 2, 4, 6])
def test_pieces_of_a_call_hold_their_samples_and_join_to_the_whole(step):
    model, batch = Parallel().double(), drawn()
    met = []

    def work(call: Call) -> None:
        pieces = list(call.pieces(step))
        assert [i for piece in pieces for i in range(SAMPLES)[piece]] == list(range(SAMPLES))
        whole = call.arguments(slice(0, SAMPLES))
        for piece in pieces:
            x, scale, by_sample, name, none = call.arguments(piece)
            assert torch.equal(x, whole[0][:, piece])
            assert torch.equal(by_sample, whole[2][piece])
            assert (scale.item(), name, none) == (0.5, "a block", None)
        joined, expected = call.outputs(step), call.outputs(SAMPLES)
        for key in ("x", "sums", "turned", "scale"):
            torch.testing.assert_close(joined[key], expected[key])
        assert joined["name"] == "a block"
        met.append(call)

    at_first_block(model, batch, work, micro_batch=SAMPLES)
    assert len(met) == 1


def test_a_sample_of_a_call_is_a_call_of_its_own():
    model, batch = Parallel().double(), drawn()

    def work(call: Call) -> None:
        for i in range(SAMPLES):
            one = call.sample(i)
            assert one.samples == 1
            assert one.leaves[0].shape == (STREAMS, 1, POSITIONS, WIDE)
            expected = call.outputs(SAMPLES)["x"][:, i : i + 1]
            torch.testing.assert_close(one.outputs(1)["x"], expected)
            torch.testing.assert_close(one.run(one.leaves)["x"], expected)

    at_first_block(model, batch, work, micro_batch=SAMPLES)


def plain_sums(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Σ |g| of every linear in the blocks, by autograd, a sample at a time."""
    sums: dict[str, Tensor] = {}
    for i in range(len(batch["x"])):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        model.zero_grad()
        ADAPTER.loss(model, trunk(model, one), one).sum().backward()
        for name, module in model.layers.named_modules(prefix="layers"):
            if isinstance(module, nn.Linear):
                sums[name] = sums.get(name, 0) + module.weight.grad.abs()
    model.zero_grad()
    return sums


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("backward", ["blocks", "model"])
@pytest.mark.parametrize("micro_batch", [1, 4, 6])
def test_gradients_are_those_of_each_sample(whole, backward, micro_batch):
    model, batch = Parallel(whole).double(), drawn()
    expected = plain_sums(model, batch)
    found = gblm.gradient_sums(
        model, batch, {"grad_abs"}, adapter=ADAPTER, micro_batch=micro_batch, backward=backward
    )
    assert found.keys() == expected.keys()
    for name, total in expected.items():
        torch.testing.assert_close(found[name]["grad_abs"], total)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("micro_batch", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_micro_batches_change_nothing(whole, method, micro_batch):
    some, every = Parallel(whole).double(), Parallel(whole).double()
    made = methods.refined(methods.make(method), 0)
    for model, size in ((some, micro_batch), (every, SAMPLES)):
        gblm.prune(model, drawn(), made, "0.5", adapter=ADAPTER, micro_batch=size)
    for name, value in every.state_dict().items():
        torch.testing.assert_close(some.state_dict()[name], value, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "known", "samples", "expected"),
    [
        ((4, 6, 3), [(1, 1)], 6, (1, 1)),
        ((4, 12, 3), [(1, 2)], 6, (1, 2)),
        ((4, 5, 3), [(1, 1)], 6, None),  # which no six samples can have
        ((6, 3), [None], 6, None),  # as many as samples, but the survey has told them apart
        ((6, 3), [], 6, (0, 1)),  # what the survey has not met
        ((5, 3), [], 6, None),
        ((), [], 6, None),
    ],
)
def test_what_the_survey_knows_tells_where_samples_are(shape, known, samples, expected):
    leaf = torch.zeros(shape)
    assert place(known, 0, leaf, samples) == expected
    piece = part(leaf, expected, slice(2, 4), samples)
    if expected is None:
        assert piece is leaf
    else:
        assert piece.shape[expected[0]] == 2 * expected[1]


def test_outputs_of_pieces_that_hold_no_samples_are_those_of_the_first():
    block = Block("a block", nn.Identity(), outputs=[(0, 1), None])
    call = Call.__new__(Call)
    call.block, call.samples = block, 3
    outputs = [(torch.ones(2, 1), torch.tensor([7.0])), (torch.zeros(1, 1), torch.tensor([8.0]))]
    joined = call.joined(outputs, [slice(0, 2), slice(2, 3)])
    assert torch.equal(joined[0], torch.tensor([[1.0], [1.0], [0.0]]))
    assert torch.equal(joined[1], torch.tensor([7.0]))
    assert len(tree_flatten(joined)[0]) == 2
