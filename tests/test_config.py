"""Flags in a TOML file: what is read, what is refused, what is written beside a result."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gblm
from gblm.command import settings
from gblm.llm import demo
from gblm.llm.__main__ import SIDE
from gblm.llm.__main__ import main as llm_main
from gblm.vit.__main__ import main as vit_main


def flags_of(tmp_path: Path, text: str, *argv: str):
    file = tmp_path / "flags.toml"
    file.write_text(text)
    return settings.parse(SIDE.app(), ["--config", str(file), *argv])[0]


def test_a_file_holds_what_a_command_line_does(tmp_path: Path):
    text = """
        model = "tiny"
        samples = 8
        refine = 1
        alpha = 10
        sparsity = [0.5, "2:4"]
        method = "gblm,wanda"
        micro-batch = 2
        overwrite = true
        resume = false
        work-dir = "work"
    """
    line = (
        "--model tiny --samples 8 --refine 1 --alpha 10 --sparsity 0.5,2:4 --method gblm,wanda "
        "--micro-batch 2 --overwrite --work-dir work"
    )
    alone, _ = settings.parse(SIDE.app(), line.split())
    assert flags_of(tmp_path, text) == alone
    assert (alone.samples, alone.refine, alone.method) == (8, 1, ("gblm", "wanda"))


def test_the_command_line_wins(tmp_path: Path):
    found = flags_of(tmp_path, 'samples = 8\nmodel = "a"', "--samples", "9")
    assert (found.samples, found.model) == (9, "a")


REFUSED = {
    "sampels = 8": "no flag is called sampels; did you mean samples?",
    "micro_batch = 8": "did you mean micro-batch?",
    'samples = "8"': "samples is '8'; give a whole number",
    "samples = 8.5": "give a whole number",
    "samples = true": "give a whole number",
    'refine = "1"': "give a number",
    "model = 5": "model is 5; give a string",
    "overwrite = 1": "give true or false",
    "method = [true]": "give a string, or a list of them",
    "[how]\nmethod = 'gblm'": "no flag is called how",
    "method.gblm = 1": "give a string, or a list of them",
    'norm = "l3"': "unknown norm 'l3'; did you mean 'l2'?",
    'config = "more.toml"': "config goes on the command line alone",
    "samples = ": "give a TOML file of flags",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_flag_is_refused_with_the_file(text: str, tmp_path: Path):
    with pytest.raises(gblm.GblmError) as error:
        flags_of(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "flags.toml"))
    assert REFUSED[text] in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(gblm.GblmError, match="cannot be read"):
            settings.parse(SIDE.app(), ["--config", str(path)])
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(gblm.GblmError, match="cannot be read"):
        settings.parse(SIDE.app(), ["--config", str(tmp_path / "binary.toml")])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    assert found
    return found


def assert_equal(first: Path, second: Path):
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def without(arguments: list[str], flag: str) -> list[str]:
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2 :]


def test_a_run_can_be_repeated_by_what_lies_beside_its_result(
    llm: list[str], tmp_path: Path, monkeypatch
):
    flags = llm[1:]
    flags[flags.index("--windows")] = "--evaluate-windows"
    model = Path(flags[1])
    monkeypatch.chdir(model.parent)
    flags[1] = model.name  # relative, as a user has it
    several = ["--method", "gblm,best", "--sparsity", "0.5,2:4", "--seed", "3"]
    chosen = ["--alpha", "7", "--exclude", "*.down_proj", "--backward", "auto"]
    assert llm_main([*flags, *several, *chosen, "--output", str(tmp_path / "all")]) == 0
    results = sorted((tmp_path / "all").iterdir())
    assert len(results) == 4
    for result in results:
        again = tmp_path / f"again-{result.name}"
        assert llm_main(["--config", str(result / settings.NAME), "--output", str(again)]) == 0
        assert_equal(result, again)
        same = (again / settings.NAME).read_text()
        assert same == (result / settings.NAME).read_text()
    more = ["--config", str(results[0] / settings.NAME), "--sparsity", "0.7"]
    assert llm_main([*more, "--output", str(tmp_path / "other")]) == 0
    with pytest.raises(AssertionError):
        assert_equal(results[0], tmp_path / "other")


def test_a_run_on_images_can_be_repeated(vit: list[str], tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert vit_main([*vit[1:], "--workers", "1", "--method", "best", "--output", str(first)]) == 0
    assert vit_main(["--config", str(first / settings.NAME), "--output", str(second)]) == 0
    assert_equal(first, second)


def test_gradients_that_were_rounded_are_rounded_again(llm: list[str], tmp_path: Path):
    flags = [*without(llm[1:], "--windows"), "--method", "gradient"]
    rounded = ["--work-dir", str(tmp_path / "work"), "--gradient-dtype", "float16"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert llm_main([*flags, *rounded, "--output", str(first)]) == 0
    assert "work-dir" not in (first / settings.NAME).read_text()
    assert llm_main(["--config", str(first / settings.NAME), "--output", str(second)]) == 0
    assert_equal(first, second)


def test_names_stay_and_paths_do_without_the_folders_of_this_machine(tmp_path, monkeypatch):
    here, home = tmp_path / "here", tmp_path / "me"
    monkeypatch.setenv("HOME", str(home))
    here.mkdir()
    monkeypatch.chdir(here)
    app = SIDE.app()
    for given, kept in {
        "gpt2": "gpt2",
        "models/tiny": "models/tiny",
        str(here / "gpt2"): "./gpt2",  # no model of the hub
        str(here / "models" / "tiny"): "models/tiny",
        str(home / "tiny"): "~/tiny",
        "/data/tiny": "/data/tiny",
        f"{here}by": f"{here}by",
    }.items():
        arguments = ["--model", given, "--evaluate", f"c4,{given}", "--task-data", given]
        own = settings.portable_names(settings.parse(app, arguments)[0])
        found = settings.recipe(app, own).flags
        assert found["model"] == own.model == kept
        assert found["evaluate"] == ["c4", kept]
        assert found["task-data"] == kept.removeprefix("./")
    again = settings.parse(app, ["--model", "m", "--task-data", "~/tiny"])[0]
    assert again.task_data == home / "tiny"


def test_a_result_holds_no_folder_of_this_machine(llm, tmp_path, monkeypatch):
    for place, home in ((tmp_path, tmp_path / "nobody"), (tmp_path.parent, tmp_path)):
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.chdir(place)
        shutil.copytree(llm[2], tmp_path / "model", dirs_exist_ok=True)
        shutil.copy(llm[llm.index("--calibration") + 1], tmp_path / "notes.txt")
        flags = ["--model", str(tmp_path / "model"), "--calibration", str(tmp_path / "notes.txt")]
        flags += ["--length", "8", "--samples", "4", "--method", "wanda", "--overwrite"]
        flags += ["--output", str(tmp_path / "out"), "--report", str(tmp_path / "page")]
        monkeypatch.setattr("sys.orig_argv", ["python", "/usr/bin/gblm", "llm", *flags])
        assert llm_main(flags) == 0
        files = [*(tmp_path / "out").glob("*.*"), *(tmp_path / "page").glob("*")]
        texts = {file.name: file.read_text("utf-8", "replace") for file in files}
        assert {"report.json", settings.NAME, "README.md", "report.html"} <= {*texts}
        loading = "" if home != tmp_path else f"from_pretrained('{tmp_path.name}/out')"
        for name, text in texts.items():
            assert str(tmp_path) not in text, name
        assert loading in texts["report.html"].replace("&#39;", "'")
        assert "gblm llm --model" in texts["report.html"]
        assert "gblm llm --config config.toml" in texts["report.html"]
        again = ["--config", str(tmp_path / "page" / settings.NAME)]
        assert llm_main([*again, "--output", str(tmp_path / "again"), "--overwrite"]) == 0
        assert_equal(tmp_path / "out", tmp_path / "again")


def test_the_demo_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = demo.text
    monkeypatch.setattr(demo, "text", lambda split: text(split)[:100_000])  # all takes seconds
    few = ["--method", "wanda", "--samples", "2", "--evaluate-windows", "2"]
    assert llm_main([*few, "--output", "one"]) == 0
    assert 'model = "demo"' in (tmp_path / "one" / settings.NAME).read_text()
    assert llm_main(["--config", "one/config.toml", "--output", "two"]) == 0
    assert_equal(tmp_path / "one", tmp_path / "two")
