"""Laws of scale, by the command line: any offload, any number of processes, cut off anywhere."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gblm.llm.__main__ import main as prune_llm
from gblm.vit.__main__ import main as prune_vit
from gblm.walk import gradients
from tests.forked import COMMAND, ENVIRONMENT, ended, start, together

METHODS = ["--method", "gblm,sparsegpt", "--sparsity", "0.5"]
FOLDERS = ["gblm-0.5", "sparsegpt-0.5"]


def arguments(fixture: list[str]) -> list[str]:
    """Return the arguments of the command line, of those of a script of eval/."""
    found = fixture[1:]
    if "--windows" in found:
        found[found.index("--windows")] = "--evaluate-windows"
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    assert set(first) == set(second)
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("side", ["llm", "vit"])
def test_every_offload_writes_the_same_bits(side, request, two_threads, tmp_path, capsys):
    run = {"llm": prune_llm, "vit": prune_vit}[side]
    flags = [*arguments(request.getfixturevalue(side)), *METHODS, "--backward", "blocks"]
    for kind in ("none", "cpu", "disk"):
        assert run([*flags, "--offload", kind, "--output", str(tmp_path / kind)]) == 0
    tables = capsys.readouterr().out.split("written to")
    assert tables[0].splitlines()[1:-1] != []
    for name in FOLDERS:
        assert same(tmp_path / "none" / name, tmp_path / "cpu" / name)
        assert same(tmp_path / "none" / name, tmp_path / "disk" / name)
        reports = [
            json.loads((tmp_path / kind / name / "report.json").read_text())["evaluation"]
            for kind in ("none", "cpu", "disk")
        ]
        assert reports[0] == reports[1] == reports[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu", "disk", "none"]


def test_classifiers_are_read_from_their_file_block_by_block(vit, tmp_path, monkeypatch):
    from gblm.vit import models

    def whole(*args):
        raise AssertionError("the whole model was loaded")

    named = {"offload": "disk", "device": torch.device("cpu"), "dtype": "float32"}
    folder = vit[vit.index("--model") + 1]
    with monkeypatch.context() as patch:
        patch.setattr(models, "_fill", whole)
        model, offload, _ = models.load_offloaded(folder, None, folder=tmp_path, **named)
    assert offload is not None
    assert model.blocks[0].attn.qkv.weight.untyped_storage().nbytes() == 4
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), models.load(folder)(images))
    offload.close()
    # What has other names, or is no safetensors file, is loaded whole first.
    file = tmp_path / "saved.bin"
    torch.save(models.load(folder).state_dict(), file)
    model, offload, _ = models.load_offloaded(folder, str(file), folder=tmp_path, **named)
    assert offload is not None
    with torch.no_grad():
        assert torch.equal(model(images), models.load(folder)(images))
    offload.close()


@pytest.mark.parametrize("side", ["llm", "vit"])
def test_every_run_of_a_command_starts_from_the_dense_model(side, request, tmp_path):
    run = {"llm": prune_llm, "vit": prune_vit}[side]
    flags = [*arguments(request.getfixturevalue(side)), "--sparsity", "0.5"]
    both = ["--method", "best,wanda", "--output", str(tmp_path / "both")]
    assert run([*flags, *both]) == 0  # best changes norms and biases too
    assert run([*flags, "--method", "wanda", "--output", str(tmp_path / "alone")]) == 0
    assert same(tmp_path / "both" / "wanda-0.5", tmp_path / "alone")


def test_gradients_of_a_former_run_are_taken_and_others_refused(llm, tmp_path, capsys):
    flags = [*arguments(llm), "--sparsity", "0.5", "--method"]
    work = tmp_path / "work"
    assert (
        prune_llm([*flags, "gblm", "--work-dir", str(work), "--output", str(tmp_path / "a")]) == 0
    )
    former = ["--gradients", str(work / "gradients")]
    assert prune_llm([*flags, "gblm", *former, "--output", str(tmp_path / "b")]) == 0
    assert same(tmp_path / "a", tmp_path / "b")
    capsys.readouterr()
    assert prune_llm([*flags, "gblm", *former, "--seed", "1"]) == 2
    assert "another calibration batch" in capsys.readouterr().err
    assert prune_llm([*flags, "gblm", "--norm", "l2", *former]) == 2
    assert "another needs" in capsys.readouterr().err
    assert prune_llm([*flags, "gblm", "--gradients", str(tmp_path)]) == 2
    assert "holds no gradients.json" in capsys.readouterr().err


# Kills the process when it is about to rename its n-th file: all are written then, none in place.
KILLED = """
import os, signal, sys
import gblm.machine.files
left, rename = int(sys.argv.pop(1)), os.replace
def replace(beside, path):
    global left
    left -= "work" in str(path)
    if left == 0:
        with open(beside, "r+b") as file:
            file.truncate(os.path.getsize(beside) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    rename(beside, path)
gblm.machine.files.os.replace = replace
from gblm.llm.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "at", [8, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 2, 3, 4, 5, 6, 7, 9, 10))]
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(llm, at, tmp_path, capsys):
    flags = [*arguments(llm), *METHODS]
    assert prune_llm([*flags, "--output", str(tmp_path / "whole")]) == 0
    flags += ["--work-dir", str(tmp_path / "work"), "--output", str(tmp_path / "resumed")]
    killed = start(KILLED, [str(at), *flags], tmp_path / "said")
    assert ended(killed) == -signal.SIGKILL, (tmp_path / "said").read_text()
    assert not (tmp_path / "resumed").exists() or at > 6
    assert prune_llm([*flags, "--resume"]) == 0, capsys.readouterr().err
    for name in FOLDERS:
        assert same(tmp_path / "whole" / name, tmp_path / "resumed" / name)


# Two blocks of seven linears: the sums of one, the gradients that go on from it, the journal.
@pytest.mark.parametrize(
    ("at", "left"),
    [
        (10, 1),
        *(
            pytest.param(*at, marks=pytest.mark.slow)
            for at in [
                (9, 2),
                (19, 0),
                (1, 2),
                (4, 2),
                (7, 2),
                (8, 2),
                (11, 1),
                (14, 1),
                (16, 1),
                (17, 1),
                (18, 1),
            ]
        ),
    ],
)
def test_a_killed_gradient_pass_goes_on_where_it_was(llm, at, left, tmp_path, monkeypatch):
    flags = [*arguments(llm), *METHODS, "--backward", "blocks", "--offload", "disk"]
    assert prune_llm([*flags, "--output", str(tmp_path / "whole")]) == 0
    work = tmp_path / "work"
    flags += ["--work-dir", str(work), "--output", str(tmp_path / "resumed")]
    killed = start(KILLED, [str(at), *flags], tmp_path / "said")
    assert ended(killed) == -signal.SIGKILL, (tmp_path / "said").read_text()
    swept = set()
    recompute = gradients.recompute

    def counted(passed, *more):
        swept.add(passed.call.block.name)
        return recompute(passed, *more)

    monkeypatch.setattr(gradients, "recompute", counted)
    assert prune_llm([*flags, "--resume"]) == 0
    assert len(swept) == left
    for name in FOLDERS:
        assert same(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    assert not list((work / "gradients").glob("sweep*"))


def test_a_sweep_of_other_settings_begins_anew(llm, tmp_path):
    flags = [*arguments(llm), "--method", "gblm", "--sparsity", "0.5", "--backward", "blocks"]
    assert prune_llm([*flags, "--seed", "1", "--output", str(tmp_path / "whole")]) == 0
    flags += ["--work-dir", str(tmp_path / "work")]
    killed = start(KILLED, ["12", *flags], tmp_path / "said")
    assert ended(killed) == -signal.SIGKILL, (tmp_path / "said").read_text()
    assert (tmp_path / "work" / "gradients" / "sweep.json").exists()
    assert prune_llm([*flags, "--seed", "1", "--output", str(tmp_path / "other")]) == 0
    assert same(tmp_path / "whole", tmp_path / "other")


def test_a_run_of_other_flags_is_not_resumed(llm, tmp_path, capsys):
    flags = [*arguments(llm), "--method", "wanda", "--work-dir", str(tmp_path / "work")]
    assert prune_llm([*flags, "--sparsity", "0.5"]) == 0
    capsys.readouterr()
    assert prune_llm([*flags, "--sparsity", "0.5"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert prune_llm([*flags, "--sparsity", "0.5", "--seed", "3", "--resume"]) == 2
    assert "another calibration batch" in capsys.readouterr().err
    assert prune_llm([*flags[:-2], "--sparsity", "0.5", "--resume"]) == 2
    assert "--work-dir" in capsys.readouterr().err


def test_processes_keep_a_work_folder_and_go_on_from_it(llm, tmp_path):
    flags = [*arguments(llm), *METHODS, "--offload", "disk", "--work-dir", str(tmp_path / "work")]
    flags[flags.index("--samples") + 1] = "7"
    for more in (["--output", "one"], ["--output", "two", "--resume"]):
        more[1] = str(tmp_path / more[1])
        codes = together(2, COMMAND.format(side="llm"), [*flags, *more], tmp_path / "said")
        assert codes == [0, 0], (tmp_path / "said").read_text()
    for name in FOLDERS:
        assert same(tmp_path / "one" / name, tmp_path / "two" / name)
    found = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert found == ["gblm-0.5", "gradients", "sparsegpt-0.5"]


@pytest.mark.parametrize(
    ("side", "processes"),
    [("llm", 2), *(pytest.param(side, 3, marks=pytest.mark.slow) for side in ("llm", "vit"))],
)
def test_processes_share_the_samples_and_get_the_masks_of_one(side, processes, request, tmp_path):
    run = {"llm": prune_llm, "vit": prune_vit}[side]
    flags = [*arguments(request.getfixturevalue(side)), "--sparsity", "0.5"]
    flags += ["--method", "gblm,sparsegpt,wanda++"]
    flags[flags.index("--samples") + 1] = "7"  # shared unevenly
    assert run([*flags, "--output", str(tmp_path / "one")]) == 0
    flags += ["--output", str(tmp_path / "many")]
    codes = together(processes, COMMAND.format(side=side), flags, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert codes == [0] * processes, said
    assert said.count("written to") == 1
    for name in [*FOLDERS, "wanda++-0.5"]:
        one, many = weights(tmp_path / "one" / name), weights(tmp_path / "many" / name)
        cells = [(value == 0) == (many[key] == 0) for key, value in one.items()]
        assert torch.cat([cell.flatten() for cell in cells]).float().mean() >= 0.9999
        reports = [
            json.loads((tmp_path / kind / name / "report.json").read_text())["evaluation"]
            for kind in ("one", "many")
        ]
        for key, value in reports[0].items():
            assert reports[1][key]["pruned"] == pytest.approx(value["pruned"], rel=1e-4)


@pytest.mark.slow
def test_processes_remove_the_blocks_and_neurons_of_one(llm, tmp_path):
    flags = [*arguments(llm), "--method", "best", "--sparsity", "blocks:0.5+neurons:0.25"]
    flags[flags.index("--samples") + 1] = "7"  # shared unevenly
    assert prune_llm([*flags, "--output", str(tmp_path / "one")]) == 0
    flags += ["--output", str(tmp_path / "two"), "--work-dir", str(tmp_path / "work")]
    codes = together(2, COMMAND.format(side="llm"), flags, tmp_path / "said")
    assert codes == [0, 0], (tmp_path / "said").read_text()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert {name: own.shape for name, own in one.items()} == {n: x.shape for n, x in two.items()}
    perplexities = [
        next(iter(json.loads((tmp_path / name / "report.json").read_text())["evaluation"].values()))
        for name in ("one", "two")
    ]
    assert perplexities[1]["pruned"] == pytest.approx(perplexities[0]["pruned"], rel=0.05)
    again = [*flags, "--resume", "--overwrite"]
    codes = together(2, COMMAND.format(side="llm"), again, tmp_path / "said")
    assert codes == [0, 0], (tmp_path / "said").read_text()
    assert all(torch.equal(own, two[name]) for name, own in weights(tmp_path / "two").items())


FAILING = """
import sys
from gblm.methods.solve import Solve
from gblm.base import GblmError
from gblm.machine.processes import rank
from gblm.llm.__main__ import main
linear = Solve.linear
def planted(*args):
    if rank() == 1:
        raise GblmError("planted in process 1")
    return linear(*args)
Solve.linear = planted
sys.exit(main(sys.argv[1:]))
"""


def test_one_process_that_fails_ends_all_with_its_error(llm, tmp_path):
    flags = [*arguments(llm), *METHODS, "--output", str(tmp_path / "out")]
    codes = together(2, FAILING, flags, tmp_path / "said")
    assert codes[0] != 0  # process 0 does not wait for the other
    assert codes[1] == 2
    assert "planted in process 1" in (tmp_path / "said").read_text()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torchrun_shows_the_error_of_the_process_that_fails(llm, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", str(script)]
    flags = [*arguments(llm), *METHODS, "--output", str(tmp_path / "out")]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run([*launch, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "planted in process 1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_fewer_samples_than_processes_are_refused(llm, tmp_path):
    flags = [*arguments(llm), *METHODS]
    flags[flags.index("--samples") + 1] = "1"
    assert together(2, COMMAND.format(side="llm"), flags, tmp_path / "said") == [2, 2]
    said = (tmp_path / "said").read_text()
    assert "1 samples cannot be shared by 2 processes" in said


SHARED = """
import sys
from gblm.machine.processes import launched, rank
from gblm.vit import data
from gblm.vit.__main__ import main
batches = data.Images.batches
def counted(self, indices, *more, **named):
    if len(more) > 1 or "of" in named:
        sys.stdout.write(f"decodes {rank()} {len(indices)}\\n")  # at once, whoever else writes
    return batches(self, indices, *more, **named)
data.Images.batches = counted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("limit", [pytest.param(11, marks=pytest.mark.slow), 1])
def test_processes_share_the_evaluation_images(vit, limit, tmp_path):
    flags = [*arguments(vit), "--method", "magnitude", "--sparsity", "0.5"]
    flags += ["--evaluate-images", str(limit)]
    assert prune_vit([*flags, "--output", str(tmp_path / "one")]) == 0
    flags += ["--output", str(tmp_path / "two")]
    codes = together(2, SHARED, flags, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert codes == [0, 0], said
    shares = {0: (limit + 1) // 2, 1: limit // 2}
    assert all(f"decodes {rank} {count}" in said for rank, count in shares.items())
    assert f"decodes 0 {limit}" not in said or limit == 1
    one, two = (
        json.loads((tmp_path / name / "report.json").read_text())["evaluation"]
        for name in ("one", "two")
    )
    assert set(one) == set(two)
    for key, value in one.items():
        for state in ("dense", "pruned"):
            assert two[key][state] == pytest.approx(value[state], rel=1e-6)
