"""The flags: help that is short, lists, and scripts that shells complete by."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gblm.command.settings import GROUPS, SHELLS, flags
from gblm.command.show import LISTS
from gblm.llm.__main__ import SIDE as LLM
from gblm.llm.__main__ import main as llm_main
from gblm.maths.scores import NORMS
from gblm.methods import METHODS
from gblm.vit.__main__ import SIDE as VIT
from gblm.vit.__main__ import main as vit_main

SIDES = {"llm": (llm_main, LLM), "vit": (vit_main, VIT)}


@pytest.mark.parametrize("side", SIDES)
def test_help_is_short_and_begins_with_examples(side: str, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert SIDES[side][0](["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 120
    assert max(len(line) for line in lines) <= 80
    text = "\n".join(lines)
    assert text.index("examples:") < text.index("what to prune:")
    assert "exit codes: 0 done, 2" in text
    assert "--list methods [best]" in text
    assert " object at " not in text
    places = [text.index(f"\n{title}:") for title in GROUPS]
    assert places == sorted(places)


@pytest.mark.parametrize("side", SIDES)
def test_every_flag_stands_in_a_group_and_says_what_it_is(side: str):
    for flag in flags(SIDES[side][1].app()).values():
        assert next(group.name for group in flag.parameter.group) in GROUPS
        assert flag.parameter.help


@pytest.mark.parametrize("what", LISTS)
def test_what_there_is_is_said_in_a_line_each(what: str, capsys):
    assert vit_main(["--list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(LISTS[what]())
    assert all(len(line.split("  ", 1)) == 2 for line in lines)


def test_versions_are_said(capsys):
    assert llm_main(["--version"]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {"gblm", "torch", "python"} <= said.keys()


COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/') 2> /dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(params=SIDES)
def offered(request: pytest.FixtureRequest, tmp_path: Path, capsys) -> Callable[..., set[str]]:
    """Return what a real bash offers for the last of the words after a command."""
    assert SIDES[request.param][0](["--completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("")
    (tmp_path / "here" / "notebooks").mkdir()

    def offer(*words: str) -> set[str]:
        command = ["bash", "--norc", "-c", COMPLETE, "bash", str(tmp_path / "script")]
        done = subprocess.run(
            [*command, f"gblm-{request.param}", *words],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path / "here",
        )
        return set(done.stdout.split())

    return offer


def test_bash_completes_flags_and_their_values(offered: Callable[..., set[str]]):
    assert offered("--nor") == {"--norm"}
    assert offered("--model", "x", "--ov") == {"--overwrite"}
    assert offered("--norm", "") == set(NORMS)
    assert offered("--overwrite", "--group", "r") == {"row"}
    assert offered("--method", "magn") >= {"magnitude", "magnitude+repair"}
    assert offered("--method", "gblm,wan") >= {"gblm,wanda", "gblm,wanda++"}
    assert offered("--method", "") >= set(METHODS)
    assert offered("--list", "") == set(LISTS)


def test_bash_completes_files_and_folders(offered: Callable[..., set[str]]):
    assert offered("--calibration", "note") == {"notes.txt", "notebooks"}
    assert offered("--config", "notes") == {"notes.txt"}
    for flag in ("--output", "--work-dir", "--model"):
        assert offered(flag, "note") == {"notebooks"}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script(shell: str, side: str, capsys):
    assert SIDES[side][0](["--completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"gblm-{side}" in script
    assert "l1" in script
    if found := shutil.which(shell):
        done = subprocess.run([found, "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


ANSWERS = """
import sys
from gblm.llm.__main__ import main as llm
from gblm.vit.__main__ import main as vit
heavy = {"transformers", "timm", "datasets", "torchvision", "accelerate", "lm_eval"}
heavy |= {"matplotlib", "jinja2"}
for main in (llm, vit):
    for argv in (["--help"], ["--sparsty", "0.5"], ["--completion", "bash"]):
        main(argv)
        print("", argv, *heavy & set(sys.modules), sep="|", file=sys.stderr)
"""


def test_answers_import_no_library_of_models():
    command = [sys.executable, "-c", ANSWERS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [line.split("|") for line in done.stderr.splitlines() if line.startswith("|")]
    assert len(found) == 6
    assert [heavy for _, _, *heavy in found] == [[]] * 6
