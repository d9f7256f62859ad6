"""The command `python -m gblm.llm`: its flags, its results, and what it says of bad input."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gblm import METHODS
from gblm.command.settings import flags
from gblm.llm.__main__ import SIDE, main
from tests.forked import COMMAND, ended, start

FLAGS = [
    "--allocation",
    "--allow-pickle",
    "--alpha",
    "--also",
    "--backward",
    "--bos",
    "--calibration",
    "--completion",
    "--compute-dtype",
    "--config",
    "--device",
    "--dry-run",
    "--dtype",
    "--evaluate",
    "--evaluate-windows",
    "--exact-match",
    "--exclude",
    "--experts",
    "--export",
    "--format",
    "--gradient-dtype",
    "--gradients",
    "--group",
    "--help",
    "--include",
    "--keep-zeros",
    "--length",
    "--list",
    "--measure",
    "--method",
    "--micro-batch",
    "--model",
    "--norm",
    "--offload",
    "--output",
    "--overwrite",
    "--pattern-for",
    "--push-to-hub",
    "--refine",
    "--report",
    "--resume",
    "--rotate",
    "--runtime",
    "--samples",
    "--seed",
    "--sparsity",
    "--task-data",
    "--task-limit",
    "--tasks",
    "--template",
    "--trust-remote-code",
    "--uneven",
    "--unlabelled",
    "--verbose",
    "--version",
    "--work-dir",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny random LLaMA in bfloat16 and two shards, with a tokenizer of bytes."""
    where = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer.save_pretrained(where)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(where, max_shard_size="40KB")
    return where


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("text") / "notes.txt"
    where.write_text("".join(f"line {i} of the notes, {i * i}\n" for i in range(400)))
    return where


def command(folder: Path, text: Path, *more: str) -> list[str]:
    return [
        *("--model", str(folder), "--calibration", str(text), "--samples", "6", "--length", "32"),
        *more,
    ]


def test_flags_are_frozen():
    assert sorted({f"--{key}" for key in flags(SIDE.app())} | {"--help"}) == FLAGS


def test_result_loads_as_it_came_in(folder: Path, text: Path, tmp_path: Path):
    output = tmp_path / "pruned"
    assert (
        main(
            command(
                folder, text, "--method", "gblm", "--output", str(output), "--evaluate", str(text)
            )
        )
        == 0
    )
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.temperature == 0.5
    assert AutoTokenizer.from_pretrained(output)("notes")["input_ids"]
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(file.name for file in output.glob("*.safetensors")) == shards
    for shard in shards:
        with safe_open(folder / shard, "pt") as before, safe_open(output / shard, "pt") as after:
            assert sorted(before.keys()) == sorted(after.keys())
    dense = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in model.state_dict().items():
        pruned = "_proj" in name
        assert (weight == 0).float().mean() == (
            0.5 if pruned else (dense[name] == 0).float().mean()
        )
        assert torch.equal(
            weight, torch.where(weight == 0, 0, dense[name]) if pruned else dense[name]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_report_says_what_happened(folder: Path, text: Path, tmp_path: Path):
    output = tmp_path / "pruned"
    assert (
        main(
            command(
                folder, text, "--method", "gblm", "--output", str(output), "--evaluate", str(text)
            )
        )
        == 0
    )
    report = json.loads((output / "report.json").read_text())
    assert report["model"] == str(folder)
    assert report["method"] == "gblm(alpha=100, norm=l1)"
    assert report["pattern"] == "0.5"
    assert report["sparsity"] == 0.5
    assert report["seed"] == 0
    assert report["peak_memory_bytes"] > 0
    assert {"load", "data", "gradients", "prune", "evaluate"} <= set(report["seconds"])
    assert {"gblm", "torch", "transformers", "python"} <= set(report["versions"])
    assert report["command"]
    evaluation = report["evaluation"][str(text)]
    assert evaluation["metric"] == "perplexity"
    assert 100 < evaluation["dense"] < 400  # random weights: near the vocabulary's 256
    assert evaluation["pruned"] != evaluation["dense"]
    assert len(report["linears"]) == 14
    for linear in report["linears"]:
        assert linear["sparsity"] == 0.5
        assert 0 < linear["relative_error"] < 1
        assert linear["seconds"] > 0


def test_speed_is_measured_beside_the_dense_model(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setattr("gblm.command.measure.SECONDS", 0)
    monkeypatch.setattr(sys.modules["gblm.gains"], "SECONDS", 0)
    output = tmp_path / "pruned"
    more = ["--measure", "speed", "--runtime", "semi-structured", "--method", "wanda"]
    more += ["--output", str(output)]
    assert main(command(folder, text, *more)) == 0
    table = capsys.readouterr().out
    speed = json.loads((output / "report.json").read_text())["speed"]
    assert list(speed) == ["forward of 1", "forward of 16", "48 tokens", "memory", "file"]
    assert all(name in table for name in speed)
    assert "what the zeros of 0.5 buy here, by trial" in table
    assert "semi-structured: no gain: torch has 2:4 products on CUDA alone" in table
    assert 'measure = "speed"' in (output / "config.toml").read_text()
    shapes = speed["file"]["pruned"] / speed["file"]["dense"]
    assert 1 < shapes < 1.2  # the same weights, and the headers of small files
    more = [*more[:-1], str(tmp_path / "other"), "--offload", "cpu"]
    assert main(command(folder, text, *more)) == 2
    assert "--measure speed takes a model that is on the device" in capsys.readouterr().err


def test_several_methods_and_patterns_are_compared(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "pruned"
    more = ("--method", "gblm,wanda", "--sparsity", "0.5,2:4", "--output", str(output))
    assert main(command(folder, text, "--evaluate", str(text), *more)) == 0
    table = capsys.readouterr().out
    assert table.count("wanda") == 2
    assert table.count("2:4") == 2
    names = {"gblm-0.5", "gblm-2of4", "wanda-0.5", "wanda-2of4"}
    assert {path.name for path in output.iterdir()} == names
    alone = tmp_path / "alone"
    assert main(command(folder, text, "--method", "wanda", "--output", str(alone))) == 0
    one = AutoModelForCausalLM.from_pretrained(alone).state_dict()
    many = AutoModelForCausalLM.from_pretrained(output / "wanda-0.5").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_every_method_runs_from_the_command_line(folder: Path, text: Path):
    assert main(command(folder, text, "--method", ",".join(METHODS))) == 0


BAD = {
    "runtime alone": (["--runtime", "semi-structured"], "is there to be measured; --measure speed"),
    "unknown method": (["--method", "wandas"], "did you mean 'wanda'"),
    "unknown pattern": (["--sparsity", "half"], "neither a sparsity"),
    "sparsity of 1": (["--sparsity", "1"], "outside (0, 1)"),
    "sparsity of 0": (["--sparsity", "0"], "outside (0, 1)"),
    "negative sparsity": (["--sparsity", "-0.5"], "outside (0, 1)"),
    "n above m": (["--sparsity", "4:2"], "0 < n < m"),
    "m not dividing": (["--sparsity", "2:5"], "model.layers.0.self_attn.q_proj [32, 32]"),
    "unknown norm": (["--norm", "l3"], "did you mean 'l2'"),
    "unknown group": (["--group", "rows"], "did you mean 'row'"),
    "unknown backward": (["--backward", "block"], "did you mean 'blocks'"),
    "unknown dtype": (["--dtype", "bfloat"], "did you mean 'bfloat16'"),
    "unknown device": (["--device", "gpu"], "device gpu is not there"),
    "unknown flag": (["--sparsty", "0.5"], "did you mean --sparsity"),
    "no number": (["--samples", "many"], "many"),
    "no samples": (["--samples", "0"], "samples"),
    "too many samples": (["--samples", "4000"], "windows of 32"),
    "micro-batch": (["--micro-batch", "0"], "micro-batch"),
    "alpha": (["--method", "gblm", "--alpha", "nan"], "alpha"),
    "negative alpha": (["--method", "gblm", "--alpha", "-1"], "alpha"),
    "too long": (["--length", "65"], "64 positions"),
    "too short": (["--length", "1"], "no target"),
    "missing text": (["--calibration", "no/such/file.txt"], "no such file"),
    "missing evaluation": (["--evaluate", "no/such/file.txt"], "no such file"),
    "missing model": (["--model", "./no-such-model"], "no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_end_before_work(
    case: str, folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags, message = BAD[case]
    output = tmp_path / "pruned"
    assert main([*command(folder, text, "--output", str(output)), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def broken(folder: Path, where: Path, name: str, content: bytes | None) -> Path:
    """Copy a model folder with one file changed, or left out where the content is None."""
    where.mkdir()
    for file in folder.iterdir():
        (where / file.name).write_bytes(file.read_bytes())
    (where / name).unlink()
    if content is not None:
        (where / name).write_bytes(content)
    return where


def test_damaged_models_are_refused(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shard = sorted(folder.glob("*.safetensors"))[0].name
    whole = (folder / shard).read_bytes()
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "empty": "is empty",
        broken(folder, tmp_path / "a", shard, whole[: len(whole) // 2]): "is damaged",
        broken(folder, tmp_path / "b", shard, b"\xff" * 100): "is damaged",
        broken(folder, tmp_path / "c", shard, None): shard,
        broken(folder, tmp_path / "d", "config.json", None): "no config.json",
        broken(folder, tmp_path / "e", "config.json", b"{"): "cannot be loaded",
        broken(folder, tmp_path / "f", "tokenizer.json", b"{}"): "cannot be loaded",
    }
    for where, message in cases.items():
        assert main(command(where, text)) == 2, where
        error = capsys.readouterr().err
        assert message in error, where
        assert error.startswith("error: ")


def test_missing_weights_are_no_random_weights(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    where = broken(folder, tmp_path / "more", "config.json", json.dumps(config).encode())
    assert main(command(where, text)) == 2
    assert "model.layers.2" in capsys.readouterr().err


def test_pickles_are_not_read_unasked(folder: Path, text: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    where = tmp_path / "pickled"
    AutoTokenizer.from_pretrained(folder).save_pretrained(where)
    model.config.save_pretrained(where)
    torch.save(model.state_dict(), where / "pytorch_model.bin")
    assert main(command(where, text)) == 2
    assert main(command(where, text, "--allow-pickle")) == 0


def test_ids_outside_the_vocabulary_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import numpy as np

    windows = tmp_path / "windows.npz"
    np.savez(windows, input_ids=np.full((6, 32), 256))
    assert main(command(folder, windows)) == 2
    assert "outside the vocabulary of 256" in capsys.readouterr().err


def test_output_is_not_overwritten_unasked(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "pruned"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    assert main(command(folder, text, "--output", str(output))) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (output / "mine.txt").read_text() == "keep"
    assert main(command(folder, text, "--output", str(output), "--overwrite")) == 0
    assert (output / "report.json").exists()
    assert not (output / "mine.txt").exists()
    file = tmp_path / "file"
    file.write_text("")
    assert main(command(folder, text, "--output", str(file))) == 2
    assert main(command(folder, text, "--output", str(file / "below"))) == 2


def test_full_disk_ends_before_work(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(command(folder, text, "--output", str(tmp_path / "pruned"))) == 2
    assert "are free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up_leaves_nothing(folder: Path, text: Path, tmp_path: Path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gblm.llm.models.save", full)
    assert main(command(folder, text, "--output", str(tmp_path / "pruned"))) == 2
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_no_partial_output(folder: Path, text: Path, tmp_path: Path):
    output = tmp_path / "pruned"
    flags = command(
        folder, text, "--output", str(output), "--sparsity", "0.5,0.6,0.7", "--seed", "1"
    )
    methods = ",".join(METHODS)
    said = tmp_path / "said"
    process = start(COMMAND.format(side="llm"), [*flags, "--method", methods], said)
    while not output.exists() and process.is_alive():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    assert ended(process) == 130, said.read_text()
    assert "interrupted" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "said"}
    for result in output.iterdir():  # what was finished is whole
        assert not result.name.startswith(".")
        assert (result / "report.json").exists()
        AutoModelForCausalLM.from_pretrained(result)


@pytest.mark.slow
def test_demo_prunes_its_own_model(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    rows = re.findall(r"^│ (\w+)", capsys.readouterr().out, re.M)
    assert rows == ["dense", "magnitude", "gradient", "wanda", "gblm", "sparsegpt", "best"]


def test_linears_can_be_chosen_by_their_names(folder: Path, text: Path, tmp_path: Path, capsys):
    output = tmp_path / "pruned"
    chosen = ["--include", "*.mlp.*", "--exclude", "*.down_proj,model.layers.1.*"]
    assert main(command(folder, text, *chosen, "--output", str(output))) == 0
    report = json.loads((output / "report.json").read_text())
    names = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    assert [linear["name"] for linear in report["linears"]] == names
    assert report["dense"]["model.layers.1.mlp.up_proj"] == "excluded"
    model = AutoModelForCausalLM.from_pretrained(output)
    zeros = {name for name, value in model.named_parameters() if (value == 0).float().mean() > 0.4}
    assert zeros == {f"{name}.weight" for name in names}
    capsys.readouterr()
    assert main(command(folder, text, "--exclude", "*.up")) == 2
    assert "no linear layer is called *.up" in capsys.readouterr().err
    assert main(command(folder, text, "--exclude", "*")) == 2
    assert "every linear layer is excluded" in capsys.readouterr().err


def test_a_report_is_a_page_of_the_run(folder: Path, text: Path, tmp_path: Path, capsys):
    report = tmp_path / "shown"
    more = ["--method", "gblm", "--evaluate", str(text), "--report", str(report)]
    assert main(command(folder, text, *more)) == 0
    said = capsys.readouterr().out
    assert "largest errors: model.layers." in said
    assert "in all, " in said
    assert f"report in {report / 'report.html'}" in said
    assert {path.name for path in report.iterdir()} == {"report.html", "report.json", "config.toml"}
    found = json.loads((report / "report.json").read_text())
    assert found["blocks"] == ["model.layers.0", "model.layers.1"]
    assert found["calibration"] == f"6 windows of 32 tokens from {text}"
    assert len(found["examples"]) == 3
    assert all(example["given"] and example["dense"] for example in found["examples"])
    page = (report / "report.html").read_text()
    assert "tiny, pruned to" in page
    assert "sparsity with the method gblm" in page
    assert "<code>--output DIR</code>" in page  # it was not kept
    assert main(command(folder, text, *more)) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_report_may_lie_in_the_output(folder: Path, text: Path, tmp_path: Path, capsys):
    output = tmp_path / "pruned"
    more = ["--output", str(output), "--report", str(output)]
    assert main(command(folder, text, "--method", "magnitude,wanda", *more)) == 0
    assert "2 runs of tiny" in (output / "report.html").read_text()
    for name in ("magnitude-0.5", "wanda-0.5"):
        page = (output / name / "report.html").read_text()
        assert f"from_pretrained(&#39;{output / name}&#39;)" in page
        assert (output / name / "config.json").exists()
    assert "largest errors" not in capsys.readouterr().out  # the table says enough


def test_runs_without_report_or_output_draw_nothing(folder: Path, text: Path, monkeypatch):
    monkeypatch.setattr("gblm.llm.examples.Continuations", None)
    monkeypatch.setattr("gblm.report.masks.picture", None)
    assert main(command(folder, text, "--method", "wanda")) == 0


@pytest.mark.parametrize("place", ["file", "file/below", "closed/below"])
def test_a_report_that_cannot_be_written_ends_before_work(
    place: str, folder: Path, text: Path, tmp_path: Path, capsys
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir(mode=0o500)
    if place.startswith("closed") and os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    assert main(command(folder, text, "--report", str(tmp_path / place))) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: report {tmp_path / place}")
    assert (tmp_path / "file").read_text() == "mine"
