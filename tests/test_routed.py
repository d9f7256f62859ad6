"""Laws of routed models, whose experts see some positions of some samples.

As a program this file is one of the processes that prune the models of these tests.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gblm
from gblm import methods
from gblm.machine import device
from gblm.report import Report
from tests.forked import ended, start

EXPERTS, WIDE, LENGTH = 5, 8, 6
# The experts that each sample is sent to: two and three are beyond the first sample, and beyond the
# first of two processes; nobody is sent to the last.
SENT = [(0,), (0, 1), (1, 2), (0, 2), (2, 3), (3,)]


class Routed(nn.Module):
    """A block that sends every position to one of its experts; what none is sent to rests."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDE, WIDE)
        self.router = nn.Linear(WIDE, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(EXPERTS))
        with torch.no_grad():
            self.router.weight[:, :EXPERTS] = 5 * torch.eye(EXPERTS)
            for linear in (self.mix, *self.experts):
                linear.weight.mul_(0.2)
                linear.bias.mul_(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        rows = x.flatten(0, 1)
        to = self.router(rows).argmax(dim=-1)
        y = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            mask = to == index
            if mask.any():
                y[mask] = expert(rows[mask])
        return x + y.view_as(x)


class Model(nn.Module):
    """Two routed blocks on samples `x [n, t, wide]`."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Routed() for _ in range(2))
        self.head = nn.Linear(WIDE, 3)
        self.to(dtype)

    def trunk(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"].to(self.head.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return x

    def losses(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        logits = self.head(hidden.mean(dim=1))
        return nn.functional.cross_entropy(logits, batch["label"], reduction="none")


ADAPTER = gblm.Adapter(
    blocks=lambda model: {f"layers.{i}": block for i, block in enumerate(model.layers)},
    trunk=Model.trunk,
    loss=Model.losses,
)


def batch() -> dict[str, Tensor]:
    """Return one sample for each line of `SENT`, whose positions go to its experts in turn."""
    draw = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(len(SENT), LENGTH, WIDE, generator=draw, dtype=torch.float64)
    for sample, experts in zip(x, SENT, strict=True):
        for position, vector in enumerate(sample):
            vector[experts[position % len(experts)]] += 3
    return {"x": x, "label": torch.arange(len(SENT)) % 3}


def prune(model: nn.Module, name: str, **options) -> Report:
    """Prune a routed model sample by sample, as gradients of its experts need."""
    given = {"adapter": ADAPTER, "micro_batch": 1, **options}
    return gblm.prune(model, batch(), methods.make(name), "0.5", **given)


def prune_toy(name: str) -> nn.Module:
    model = Model()
    prune(model, name)
    return model


def prune_qwen(name: str) -> nn.Module:
    """Prune a Qwen3-MoE, whose experts are tensors of three dimensions."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    model = Qwen3MoeForCausalLM(config).eval().double()
    model.set_experts_implementation("eager")  # the others know no double precision
    ids = torch.randint(64, (6, 8), generator=torch.Generator().manual_seed(0))
    gblm.prune(model, {"input_ids": ids}, methods.make(name), "0.5")
    return model


CASES: dict[str, tuple[Callable[[str], nn.Module], str]] = {
    "qwen3-moe wanda++": (prune_qwen, "wanda++"),
    "qwen3-moe best": (prune_qwen, "best"),
    "toy wanda++": (prune_toy, "wanda++"),
    "toy best": (prune_toy, "best"),
}


def main(folder: Path, rank: int, world: int) -> None:
    """Prune the models together with other processes, each in a group of its own."""
    torch.set_num_threads(1)
    wait = timedelta(minutes=2)  # for others, who may have failed
    for name, (work, method) in CASES.items():
        dist.init_process_group(
            "gloo", f"file://{folder}/{name}", timeout=wait, rank=rank, world_size=world
        )
        try:
            result = work(method).state_dict()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        torch.save(result, folder / f"{name} {rank}.pt")
        dist.destroy_process_group()


@cache
def run_processes(count: int, folder: Path) -> None:
    """Let so many processes prune the models, and leave the results in a folder."""
    script = Path(__file__).read_text()
    argv = [[str(folder), str(rank), str(count)] for rank in range(count)]
    for process in [start(script, own, folder / "said") for own in argv]:
        ended(process)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {count: tmp_path_factory.mktemp(f"processes-{count}") for count in (2, 3)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_get_the_masks_of_one(case, count, folders):
    work, method = CASES[case]
    expected = work(method).state_dict()
    run_processes(count, folders[count])
    files = [folders[count] / f"{case} {rank}.pt" for rank in range(count)]
    assert all(file.exists() for file in files), (folders[count] / "said").read_text()
    found = [torch.load(file) for file in files]
    assert not [weights for weights in found if isinstance(weights, str)]
    for name, value in expected.items():
        assert torch.equal(found[0][name] == 0, value == 0), name
        assert all(torch.equal(weights[name], found[0][name]) for weights in found), name


EVERY = [*methods.METHODS, "gblm+repair"]


@pytest.mark.parametrize("name", EVERY)
def test_experts_that_the_first_sample_does_not_reach_are_pruned(name):
    model = Model()
    report = prune(model, name)
    pruned = {linear.name for linear in report.linears}
    for block in ("layers.0", "layers.1"):
        for index in range(4):
            assert f"{block}.experts.{index}" in pruned, report.dense
            assert (model.get_submodule(f"{block}.experts.{index}").weight == 0).any()
        idle = f"{block}.experts.4"
        assert idle in report.dense
        assert (model.get_submodule(idle).weight != 0).all()


@pytest.mark.parametrize("name", ["wanda", "gblm", "best"])
def test_the_first_sample_is_as_good_as_any_other(name):
    one, other = Model(), Model()
    prune(one, name)
    turned = {key: value.flip(0) for key, value in batch().items()}
    gblm.prune(other, turned, methods.make(name), "0.5", adapter=ADAPTER, micro_batch=1)
    for key, value in one.state_dict().items():
        assert torch.equal(value == 0, other.state_dict()[key] == 0), key


def prune_halved() -> None:
    """Prune with `best`, whose refinement takes products in bfloat16 where they are quick."""
    device.has_products = lambda *of: True  # whatever this machine multiplies in
    model = Model(torch.float32)
    report = prune(model, "best")
    assert report.sparsity > 0.3
    assert all(torch.isfinite(value).all() for value in model.parameters())


def test_a_block_may_put_what_its_linears_give_into_a_tensor_of_its_own(tmp_path):
    # y[mask] = expert(x) is an assignment to a tensor of another dtype where expert(x) is in
    # bfloat16, which torch refuses. In a process of its own, which that may bring down.
    process = start(Path(__file__).read_text(), [], tmp_path / "said")
    assert ended(process) == 0, (tmp_path / "said").read_text()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    else:
        prune_halved()
