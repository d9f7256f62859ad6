"""The script of the speed tables: what it measures on images, and how it compares."""

import contextlib
import io
import json
import sys
from typing import Any

import contestants
import numpy as np
import pytest
import speed
import torch

import gblm


def entry(command: list[str], threads: int = 1) -> dict[str, Any]:
    """Run a contestant in this process, which spares its start-up."""
    name, *args = command[2:]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        contestants.ENTRIES[name](*args)
    return {
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "peak_mb": 1.0,
        **contestants.heard(said.getvalue()),
    }


def call(vit: list[str], *more: str) -> list[str]:
    """Return the arguments of the script for the model that the arguments of quality.py name."""
    given = dict(zip(vit[1::2], vit[2::2], strict=True))
    source = ["--model", given["--model"], "--calibration", given["--calibration"]]
    return ["eval/speed.py", "vit", *source, "--samples", "8", *more]


def test_images_are_measured_and_written(vit, tmp_path, monkeypatch):
    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n\nBy hand.\n")
    monkeypatch.setattr(speed, "measure", entry)
    monkeypatch.setattr(
        sys, "argv", call(vit, "--runs", "2", "--threads", "1", "--write", str(page))
    )
    speed.main()
    text = page.read_text()
    assert text.startswith(
        "# Benchmarks\n\nBy hand.\n\n## Speed and memory: tiny\n\n<!-- speed:vit"
    )
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    methods = speed.METHODS.split(",")
    assert rows[2:10] == ["start-up", *contestants.PLAIN, *methods]
    assert rows[12:] == [
        "wanda / forward",
        "gblm / 2.5 forward + 1.6 forward-backward",
        "sparsegpt / forward",
    ]
    assert "8 images" in text
    assert "1 thread, 2 rounds" in text
    assert "![speed-vit](speed-vit.svg)" in text
    assert "<svg" in (tmp_path / "speed-vit.svg").read_text()
    found = json.loads((tmp_path / "speed-vit.json").read_text())
    assert set(found["runs"]) == {"start-up", *contestants.PLAIN, *methods}
    for name, runs in found["runs"].items():
        assert len(runs) == 2
        assert all(run["seconds"] > 0 for run in runs), name
    plain, ours = found["runs"]["forward"], found["runs"]["wanda"]
    assert found["ratios"]["wanda / forward"]["seconds"] == [
        one["seconds"] / other["seconds"] for one, other in zip(ours, plain, strict=True)
    ]


def test_some_contestants_can_take_turns_alone(vit, capsys, monkeypatch):
    monkeypatch.setattr(speed, "measure", entry)
    only = ["--runs", "1", "--threads", "1", "--only"]
    monkeypatch.setattr(sys, "argv", call(vit, *only, "forward", "wanda"))
    speed.main()
    shown = [
        line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    assert shown[2:4] == ["forward", "wanda"]
    assert shown[6:] == ["wanda / forward"]
    monkeypatch.setattr(sys, "argv", call(vit, *only, "wanda2"))
    with pytest.raises(SystemExit):
        speed.main()
    assert "'wanda2' is no contestant; there are start-up, forward," in capsys.readouterr().err


@pytest.fixture
def decoded(vit, tmp_path) -> list[str]:
    """The model of the fixture, no checkpoint, and its images decoded into a file."""
    model, source, path = vit[2], vit[4], str(tmp_path / "images.npz")
    contestants.decode(model, "", source, "8", path)
    return [model, "", path]


def test_all_contestants_have_the_calibration_images_of_the_command(decoded, vit):
    from gblm.vit import data, models

    model, batch = contestants.opened(*decoded)
    own = models.load(vit[2])
    expected = data.calibration(data.open_images(vit[4], own, "calibration"), 8)
    assert torch.equal(batch["images"], expected["images"])
    assert torch.equal(batch["labels"], expected["labels"])
    assert not model.training


def test_a_plain_pass_is_over_all_images_and_parameters(decoded):
    model, batch = contestants.opened(*decoded)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    contestants.forward(model, batch, 3)
    assert seen == [3, 3, 2]
    assert all(parameter.grad is None for parameter in model.parameters())
    contestants.forward_backward(model, batch, 8)
    assert seen[3:] == [8]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_method_prunes_to_half(decoded, monkeypatch):
    reports, own = [], gblm.prune

    def prune(*args):
        reports.append(own(*args))

    monkeypatch.setattr(gblm, "prune", prune)
    for name in ("wanda", "gblm"):
        assert entry(["python", "contestants.py", "images", name, "4", *decoded])["seconds"] > 0
    assert [report.method for report in reports] == ["wanda", "gblm(alpha=auto, norm=l1)"]
    assert all(report.sparsity == 0.5 for report in reports)


def test_the_quickest_micro_batch_is_chosen(decoded, monkeypatch):
    def timed(run, model, batch, step):
        return {"seconds": abs(step - (4 if run is contestants.forward else 16))}

    monkeypatch.setattr(contestants, "timed", timed)
    found = entry(["python", "contestants.py", "choose", *decoded])
    assert (found["forward"], found["forward-backward"]) == (4, 16)


# --- measuring and comparing ----------------------------------------------------------------------


def test_a_process_is_measured_and_may_say_its_own_seconds():
    hold = (
        "import time; x = bytearray(200_000_000); time.sleep(0.5);"
        f"print(f'{contestants.SAYS}{{{{\"own\": {{time.process_time()}}}}}}')"
    )
    found = speed.measure([sys.executable, "-c", hold], 1)
    assert found["seconds"] - found["cpu_seconds"] > 0.4  # asleep, however long a start takes
    assert found["cpu_seconds"] >= found["own"] > 0
    assert 200 < found["peak_mb"] < 20_000  # what this process holds counts too
    say = (
        f"import sys; print('{contestants.SAYS}{{\"seconds\": 7}}'); print('late', file=sys.stderr)"
    )
    assert speed.measure([sys.executable, "-c", say], 1)["seconds"] == 7
    threads = "import os; assert os.environ['OMP_NUM_THREADS'] == '3'"
    speed.measure([sys.executable, "-c", threads], 3)
    with pytest.raises(SystemExit, match=r"no such thing(.|\n)*failed: 1"):
        speed.measure([sys.executable, "-c", "raise ValueError('no such thing')"], 1)


def test_ratios_are_to_the_sum_of_the_others_and_to_the_largest_memory():
    def runs(*seconds):
        return [{"seconds": s, "cpu_seconds": 2 * s, "peak_mb": 10 * s} for s in seconds]

    measured = {"ours": runs(8, 9), "a": runs(1, 2), "b": runs(2, 4)}
    ratio = speed.Ratio("ours", {"a": 2, "b": 3}, 1)
    assert str(ratio) == "ours / 2 a + 3 b"
    found = ratio.of(measured)
    assert found["wanted"] == 1
    np.testing.assert_allclose(found["seconds"], [8 / 8, 9 / 16])
    np.testing.assert_allclose(found["cpu_seconds"], [8 / 8, 9 / 16])
    np.testing.assert_allclose(found["peak_mb"], [8 / 2, 9 / 4])
    assert str(speed.Ratio("ours", {"a": 1})) == "ours / a"


def test_language_has_its_contestants(monkeypatch):
    drawn: list[list[str]] = []
    monkeypatch.setattr(speed, "measure", lambda command, threads: drawn.append(command[2:]))
    flags = ["--model", "llama", "--calibration", "notes.txt", "--samples", "4"]
    args = speed.parser().parse_args([*flags, "--llmcompressor-python", "other", "--basic"])
    assert args.side == "llm"
    setting, commands = speed.language(args, "windows.npz")
    assert drawn == [["draw", "llama", "notes.txt", "4", "256", "windows.npz"]]
    assert setting == "4 windows of 256 tokens"
    for ratio in speed.RATIOS["llm"]:
        assert {ratio.ours, *ratio.theirs} <= commands.keys()
    ending = ["llmcompressor", "wanda", "basic", "llama", "windows.npz"]
    assert commands["llmcompressor wanda, basic"] == ["other", contestants.__file__, *ending]
    assert "sequential" in commands["llmcompressor sparsegpt"]
    args = speed.parser().parse_args(flags)
    assert not any("llmcompressor" in name for name in speed.language(args, "")[1])
