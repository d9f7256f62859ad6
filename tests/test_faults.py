"""Hard use of what both sides share: random flags, damaged work folders, degenerate models."""

import json
import re
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gblm
from gblm import methods
from gblm.command.settings import flags
from gblm.llm import __main__ as llm_side
from gblm.vit import __main__ as vit_side
from gblm.walk.journal import GradientFolder, Journal

SIDES = {"llm": llm_side, "vit": vit_side}
EVERY = [*methods.METHODS, "gblm+repair", "wanda+sparsegpt"]

# Random flags: what is wrong with them is said before a model is loaded.

VALUES = """0 1 -1 2 0.5 1.5 -0.5 1e400 nan inf 2:4 4:4 0:0 4:2 1:32 2:4:8 0.5/row 0.5/layer 0.5/x
    1/2 auto gblm wanda best magnitude+repair +repair gblm+ l1 l2 l3 row layer cpu cuda cuda:99
    disk none blocks model float32 bfloat16 demo uniform owl gradient , ,, gblm,wanda here
    here/below missing/file . .. / methods patterns 1e999 ٣ ½ 0x10 --"""
WORDS = st.sampled_from(re.split(r"\s+", VALUES)) | st.text(string.printable + "é∞𝔸", max_size=12)


def flags_of(side: str) -> list[str]:
    found = flags(SIDES[side].SIDE.app()).values()
    return sorted({"--help", "-h"} | {name for flag in found for name in flag.names})


@pytest.fixture
def unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the commands where they would load a model, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("gblm.command.side.carry_out", lambda *args, **kwargs: None)
    # and where they would look at one, for a dry run
    monkeypatch.setattr("gblm.command.show.plan", lambda *args, **kwargs: None)


@pytest.mark.parametrize("side", SIDES)
@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_flags_end_in_0_or_2(side, data, unloaded, capsys):
    flag = st.sampled_from(flags_of(side)) | st.text("-abcdelmnops", max_size=9)
    words = flag.map(lambda x: [x]) | st.tuples(flag, WORDS).map(list)
    joined = st.tuples(flag, WORDS).map(lambda pair: ["=".join(pair)])
    parts = data.draw(st.lists(words | joined | WORDS.map(lambda word: [word]), max_size=6))
    check_end(side, [word for part in parts for word in part], capsys)


def check_end(side: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Fail unless a command ends with its exit code and, where that is 2, one error."""
    capsys.readouterr()
    try:
        code = SIDES[side].main(argv)
    except SystemExit as stop:  # of --help
        code = stop.code
    error = capsys.readouterr().err
    assert code in (0, 2)
    assert (code == 2) == error.startswith("error: ")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "argv",
    [
        ["--output", "x" * 5000],
        ["--output", "a/" * 3000],
        ["--work-dir", "x" * 5000],
        ["--gradients", "x" * 5000],
        ["--config", "x" * 5000],
        ["--output", "\udcff"],
        ["--method", "gblm," * 3000],
        ["--sparsity", "9" * 5000 + ":4"],
        ["--sparsity", "1:" + "9" * 5000],
        ["--samples", "9" * 5000],
        ["--micro-batch", "9" * 5000],
        ["--micro-batch", "²"],
        ["--seed", "-9" + "9" * 5000],
    ],
    ids=lambda argv: "=".join(argv)[:24],
)
def test_values_beyond_all_bounds_end_in_0_or_2(side, argv, unloaded, capsys):
    check_end(side, argv, capsys)


# Folders of a former run


def edited(name: str, edit: Callable[[Any], Any]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        file = next(folder.rglob(name))
        file.write_text(json.dumps(edit(json.loads(file.read_text()))))

    return damage


def cut(pattern: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        file = sorted(folder.rglob(pattern))[-1]
        file.write_bytes(file.read_bytes()[:-5])

    return damage


def gone(pattern: str) -> Callable[[Path], object]:
    return lambda folder: sorted(folder.rglob(pattern))[-1].unlink()


def written(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: next(folder.rglob(name)).write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "an empty journal": written("journal.json", b""),
    "a journal of bytes": written("journal.json", b"\xff\xfe"),
    "a journal of no object": written("journal.json", b"[]"),
    "a journal of nothing": written("journal.json", b"{}"),
    "a journal without blocks": edited("journal.json", lambda x: {"settings": x["settings"]}),
    "a journal of strange linears": edited("journal.json", lambda x: {**x, "linears": [{"a": 1}]}),
    "a journal of strange blocks": edited("journal.json", lambda x: {**x, "finished": [3]}),
    "a cut block": cut("gblm-0.5/model.layers.*.safetensors"),
    "a missing block": gone("gblm-0.5/model.layers.*.safetensors"),
    "gradients of nothing": written("gradients.json", b"{}"),
    "gradients of no object": written("gradients.json", b"3"),
    "gradients without counts": edited("gradients.json", lambda x: {"settings": x["settings"]}),
    "cut gradients": cut("gradients/*.safetensors"),
    "missing gradients": gone("gradients/*.safetensors"),
}
SWEEP_DAMAGES: dict[str, Callable[[Path], object]] = {
    "an empty record": written("sweep.json", b""),
    "a record of bytes": written("sweep.json", b"\xff\xfe"),
    "a record of no object": written("sweep.json", b"[]"),
    "a record of nothing": written("sweep.json", b"{}"),
    "a record without blocks": edited("sweep.json", lambda x: {"settings": x["settings"]}),
    "cut gradients on the way": cut("gradients/sweep-*.safetensors"),
    "missing gradients on the way": gone("gradients/sweep-*.safetensors"),
    "cut gradients of a block": cut("gradients/model.layers.1.*.safetensors"),
}


def cut_off(llm: list[str], folder: Path, kind: type, method: str) -> Path:
    """Run a command until a method of a class has been called once; return its work folder."""
    work = getattr(kind, method)

    def interrupted(*given: Any) -> None:
        work(*given)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, method, interrupted)
        assert llm_side.main([*command(llm), "--work-dir", str(folder)]) == 130
    return folder


@pytest.fixture(scope="module")
def former(llm: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run that was cut off after its first block."""
    return cut_off(llm, tmp_path_factory.mktemp("former") / "work", Journal, "finish")


@pytest.fixture(scope="module")
def swept(llm: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run that was cut off after the gradients of its last block."""
    return cut_off(llm, tmp_path_factory.mktemp("swept") / "work", GradientFolder, "keep")


def command(llm: list[str]) -> list[str]:
    given = llm[1:]
    given[given.index("--windows")] = "--evaluate-windows"
    return [*given, "--method", "gblm", "--backward", "blocks"]


@pytest.mark.parametrize("case", [*DAMAGES, *SWEEP_DAMAGES])
def test_a_damaged_work_folder_is_refused(case, llm, former, swept, sealed):
    folder = sealed.root / "work"
    shutil.copytree(former if case in DAMAGES else swept, folder)
    (DAMAGES | SWEEP_DAMAGES)[case](folder)
    given = [*command(llm), "--work-dir", str(folder), "--resume"]
    code, error = sealed.run(llm_side.main, given, folder)
    assert code == 2
    assert str(folder) in error
    assert "fetch" not in error, "nobody but gblm has written it"


@pytest.mark.parametrize("cut_folder", ["former", "swept"])
def test_the_work_folder_is_sound_where_nothing_is_damaged(cut_folder, llm, sealed, request):
    folder = sealed.root / "work"
    shutil.copytree(request.getfixturevalue(cut_folder), folder)
    given = [*command(llm), "--work-dir", str(folder), "--resume"]
    assert sealed.run(llm_side.main, given, folder)[0] == 0


# Degenerate models, from Python


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "pattern",
    [
        "0.5",
        "0.999",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("0.001", "0.5/layer", "2:4")),
    ],
)
def test_a_linear_of_zeros_and_dead_inputs_are_pruned(name, pattern, make_llama, batch):
    model = make_llama()
    layers = model.model.layers
    with torch.no_grad():
        layers[0].mlp.up_proj.weight.zero_()
        layers[1].input_layernorm.weight.zero_()  # so that q, k and v see zeros alone
        layers[2].post_attention_layernorm.weight[::2] = 0  # and these every second
    report = gblm.prune(model, batch, methods.make(name), pattern)
    assert all(torch.isfinite(value).all() for value in model.parameters())
    assert all(0 <= linear.relative_error < float("inf") for linear in report.linears)
    dropped = float(pattern.split("/")[0]) if ":" not in pattern else 0.5
    assert report.sparsity >= dropped - 0.04


@pytest.mark.parametrize("name", EVERY)
def test_one_sample_of_two_positions_is_enough(name, llama, make_batch):
    gblm.prune(llama, make_batch(1, 2), methods.make(name), "2:4")
    assert all(torch.isfinite(value).all() for value in llama.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_samples_that_are_all_the_same_are_enough(name, llama, batch):
    same = {key: torch.full_like(value, 3) for key, value in batch.items()}
    gblm.prune(llama, same, methods.make(name), "0.5")
    assert all(torch.isfinite(value).all() for value in llama.parameters())


@pytest.mark.parametrize("text", ["4:4", "1:1", "0:4"])
def test_n_of_n_is_refused_before_work(text, llama, batch):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    with pytest.raises(gblm.GblmError, match=re.escape(f"pattern {text} needs 0 < n < m")):
        gblm.prune(llama, batch, methods.wanda(), text)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
