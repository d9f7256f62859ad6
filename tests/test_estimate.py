"""A dry run: it sees without values what a model with values shows, and leaves nothing behind."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import LlamaForCausalLM

import gblm
from gblm.command import estimate
from gblm.command.estimate import Task
from gblm.llm import adapters
from gblm.llm.__main__ import main as llm_main
from gblm.machine import speed
from gblm.machine.speed import Cost, Machine
from gblm.maths import patterns
from gblm.methods import METHODS, SOLVERS, make
from gblm.vit.__main__ import main as vit_main
from gblm.walk.blocks import frozen
from gblm.walk.footprint import Footprint, footprint
from gblm.walk.gradients import activations
from gblm.walk.survey import survey

MACHINE = Machine(torch.device("cpu"), operations=1e9, bytes=1e9, call=0)


@pytest.fixture
def flags(llm: list[str]) -> list[str]:
    at = llm.index("--windows")
    return [*llm[1:at], *llm[at + 2 :]]


def shapes(found: Footprint) -> list[tuple]:
    blocks = [(b.name, b.dense, [[x.name for x in g] for g in b.groups]) for b in found.blocks]
    return [*blocks, *((x.name, x.shape, x.positions) for x in found.linears)]


def test_fake_tensors_show_what_values_do(make_llama):
    config = make_llama().config
    with FakeTensorMode():
        model = LlamaForCausalLM(config).eval()
        one = {"input_ids": torch.zeros(1, 12, dtype=torch.int64)}
        fake = footprint(model, one, adapters.adapter(model))
    model = make_llama()
    one = {"input_ids": torch.zeros(1, 12, dtype=torch.int64)}
    real = footprint(model, one, adapters.adapter(model))
    assert shapes(fake) == shapes(real)
    for name in ("weights", "numbers", "sample", "stream", "trunk", "head"):
        assert getattr(fake, name) == getattr(real, name) > 0, name
    assert fake.kept == pytest.approx(real.kept, rel=0.3)  # attention keeps other things
    assert fake.kept_head == pytest.approx(real.kept_head, rel=0.1)


def test_operations_are_those_of_the_linears_at_least(make_llama):
    model = make_llama()
    one = {"input_ids": torch.zeros(1, 12, dtype=torch.int64)}
    found = footprint(model, one, adapters.adapter(model))
    linears = sum(2 * x.weight.numel() * x.positions for x in found.linears)
    assert linears <= found.trunk <= 1.2 * linears
    assert found.head == 2 * 12 * model.lm_head.weight.numel()
    with frozen(model), torch.enable_grad():
        kept, head = activations(model, one, adapters.adapter(model), found.blocks)
    assert kept >= sum(4 * x.positions * x.shape[0] for x in found.linears)
    assert head >= 4 * 11 * model.lm_head.weight.shape[0]


def cost(found: Footprint, name: str, text: str = "0.5", **task) -> estimate.Estimate:
    method = gblm.METHODS[name]()
    whole = Task(**{"samples": 64, "micro": 8, "taken": 0, "peak": 0, **task})
    pattern = patterns.parse(text, method.group)
    return estimate.estimate(found, whole, method, pattern, MACHINE, free=10**10)


def test_estimates_grow_with_what_is_asked_for(make_llama):
    model = make_llama()
    one = {"input_ids": torch.zeros(1, 12, dtype=torch.int64)}
    found = footprint(model, one, adapters.adapter(model))
    seconds = {name: sum(cost(found, name).seconds.values()) for name in gblm.METHODS}
    assert seconds["wanda"] < seconds["gblm"] < seconds["best"]
    assert seconds["wanda"] < seconds["sparsegpt"] < seconds["best"]
    assert "gradients" not in cost(found, "wanda").seconds
    assert "gradients" in cost(found, "gblm").seconds
    assert (
        cost(found, "gblm").seconds["gradients"]
        < cost(found, "gblm", backward="blocks").seconds["gradients"]
    )
    twice = cost(found, "gblm", samples=128).seconds["gradients"]
    assert twice == pytest.approx(2 * cost(found, "gblm").seconds["gradients"])
    assert cost(found, "wanda", samples=6400).memory > 10 * cost(found, "wanda").memory
    assert cost(found, "wanda", several=True).memory > cost(found, "wanda").memory
    assert cost(found, "wanda", offload=True).memory < cost(found, "wanda").memory
    evaluated = cost(found, "wanda", evaluated=10)
    assert evaluated.seconds["evaluate"] == Cost(10 * (found.trunk + found.head)).on(MACHINE)


def test_every_solver_has_a_cost_of_its_own(make_llama):
    model = make_llama()
    one = {"input_ids": torch.zeros(1, 12, dtype=torch.int64)}
    found = footprint(model, one, adapters.adapter(model))
    wanda = sum(step.cost(found).operations for step in make("wanda").steps)
    solving = {name for name in METHODS if "input_gram" in make(name).needs}
    for name in {*solving, *(f"wanda+{solver}" for solver in SOLVERS)}:
        assert sum(step.cost(found).operations for step in make(name).steps) > wanda, name


def test_a_machine_is_measured():
    machine = speed.measure(torch.device("cpu"), torch.float32, 64, least=0.005)
    assert machine.operations > 1e8
    assert machine.bytes > 1e7
    assert 0 < machine.call < 0.1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = speed.measure
    monkeypatch.setattr("gblm.command.show.measure", lambda *args: measure(*args, least=0.002))


@pytest.mark.usefixtures("quick")
def test_a_dry_run_says_what_a_run_would_do(flags: list[str], tmp_path: Path, capsys, monkeypatch):
    def planted(*args, **kwargs):
        raise AssertionError("a dry run reads no weights")

    output = tmp_path / "pruned"
    chosen = ["--method", "wanda,best", "--exclude", "*.down_proj", "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr("gblm.llm.models.load_model", planted)
        patch.setattr("gblm.llm.models.load_offloaded", planted)
        assert llm_main([*flags, *chosen, "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert llm_main([*flags, *chosen]) == 0
    report = json.loads((output / "wanda-0.5" / "report.json").read_text())
    assert len(report["linears"]) == 12
    weights = sum(x["shape"][0] * x["shape"][1] for x in report["linears"])
    assert f"pruned: {weights:,} of" in said
    assert "in 12 linear layers" in said
    assert "2 × mlp.down_proj: excluded" in said
    assert "written: 2 × " in said
    assert str(output) in said
    assert "wanda" in said
    assert "best" in said


@pytest.mark.usefixtures("quick")
def test_a_dry_run_reads_weights_where_shapes_do_not_suffice(flags: list[str], capsys, monkeypatch):
    real = survey

    def choosy(model, batch, adapter):
        if isinstance(next(model.parameters()), FakeTensor):
            raise RuntimeError("this model looks at its values")
        return real(model, batch, adapter)

    monkeypatch.setattr("gblm.walk.footprint.survey", choosy)
    assert llm_main([*flags, "--dry-run", "--verbose"]) == 0
    said = capsys.readouterr()
    assert "this model looks at its values" in said.err
    assert "in 14 linear layers" in said.out


@pytest.mark.usefixtures("quick")
def test_a_dry_run_of_images_decodes_none(vit: list[str], tmp_path: Path, capsys, monkeypatch):
    def planted(*args, **kwargs):
        raise AssertionError("a dry run decodes no image and reads no weights")

    monkeypatch.setattr("gblm.vit.data.Images.batches", planted)
    monkeypatch.setattr("gblm.vit.models.load", planted)
    output = tmp_path / "pruned"
    assert vit_main([*vit[1:], "--dry-run", "--output", str(output)]) == 0
    assert "in 8 linear layers" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sparsity", "2:5"], "q_proj"),
        (["--samples", "4000"], "windows of 16"),
        (["--exclude", "*.up"], "no linear layer is called *.up"),
        (["--model", "./none"], "no such folder"),
        (["--micro-batch", "0"], "micro-batch"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(more: list[str], message: str, flags, capsys):
    assert llm_main([*flags, *more, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
