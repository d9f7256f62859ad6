"""What the command line says while it runs, and how it ends."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import gblm
from gblm.command import side
from gblm.command.show import columned, say, warnings
from gblm.llm.__main__ import main
from gblm.machine import processes


@pytest.fixture
def flags(llm: list[str]) -> list[str]:
    at = llm.index("--windows")
    return [*llm[1:at], *llm[at + 2 :]]


def test_a_run_is_quiet_but_for_its_table(flags: list[str], capsys):
    assert main(flags) == 0
    assert capsys.readouterr().err == ""


def test_verbose_runs_say_a_line_a_block_and_twice_details(flags: list[str], capsys):
    assert main([*flags, "--verbose"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    for number, line in enumerate(said):
        assert f"model.layers.{number}: " in line
        assert "mean relative error 0." in line
    assert main([*flags, "-vv", "--method", "best"]) == 0
    said = capsys.readouterr().err
    for detail in ("micro-batches of 6", "offload none", "free on cpu", "gradients by", "gets 0."):
        assert detail in said
    assert main(flags) == 0
    assert capsys.readouterr().err == ""  # the handler is gone


def test_process_0_alone_says_it(monkeypatch, capsys):
    monkeypatch.setattr(side, "rank", lambda: 1)
    with side.logged(verbose=2):
        logging.getLogger("gblm.walk.prune").info("a block")
        logging.getLogger("gblm.walk.prune").warning("a warning")
    said = capsys.readouterr().err
    assert "a warning" in said
    assert "a block" not in said


def raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_exit_codes_are_those_of_the_help(capsys):
    assert side.guarded(lambda: None) == 0
    assert side.guarded(raises(gblm.GblmError("what, where, way out"))) == 2
    assert capsys.readouterr().err == "error: what, where, way out\n"
    assert side.guarded(raises(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):  # ours, not the user's
        side.guarded(raises(ZeroDivisionError()))


def test_importing_says_nothing_and_sets_no_level():
    assert logging.getLogger("gblm").handlers == []
    assert logging.getLogger("gblm").level == logging.NOTSET
    assert processes.rank() == 0


def test_a_method_has_its_options_after_colons(flags: list[str], tmp_path: Path, capsys):
    out = tmp_path / "out"
    asked = "gblm:alpha=5:norm=l2,wanda++:rounds=1:rate=1e-2,gblm+repair"
    assert main([*flags, "--alpha", "7", "--method", asked, "--output", str(out)]) == 0
    said = capsys.readouterr().out
    for name in ("alpha=5, norm=l2", "rounds=1, rate=0.01", "gblm(alpha=7, norm=l1)+repair"):
        assert name in said
    folder = out / "gblm-alpha=5-norm=l2-0.5"
    assert main(["--config", str(folder / "config.toml"), "--output", str(tmp_path / "again")]) == 0
    assert "alpha=5, norm=l2" in capsys.readouterr().out
    first, again = (f / "model.safetensors" for f in (folder, tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("wanda:alpha=3", "no option 'alpha'; those of wanda: none"),
        ("gblm:beta=3", "no option 'beta'; those of gblm: alpha, norm"),
        ("best:mix=half", "mix takes a number, not 'half'"),
        ("best:mix=2", r"mix 2 is outside [0, 1]"),
        ("best:allocation=some", "unknown allocation 'some'"),
        ("wanda++:rounds=1.5", "rounds takes a whole number, not '1.5'"),
        ("sparsegpt:columns=0", "columns ≥ 1"),
        ("sparsegpt:damping=nan", "damping ≥ 0"),
        ("gblm:alpha", "alpha"),
    ],
)
def test_an_option_of_a_method_that_is_none(method: str, said: str, flags: list[str], capsys):
    assert main([*flags, "--method", method]) == 2
    assert said in capsys.readouterr().err


def test_a_wide_table_goes_on_below_and_breaks_no_word(capsys):
    names = ["method", "pattern", *(f"tiny-stories-{i}.txt" for i in range(9)), "seconds"]
    rows = [names, ["dense", "", *("27.44" for _ in names[2:])]]
    rows.append(["gblm(alpha=100, norm=l1)+repair", "0.5", *(f"{n}.25" for n in range(10))])
    terminal = Console(width=80, force_terminal=True, color_system=None)
    columned(terminal, rows, named=2, apart=1)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for word in (word for row in rows for cell in row for word in cell.split()):
        assert f" {word} " in said
    assert said.count("method") > 1
    columned(Console(width=400, color_system=None), rows, named=2)
    assert capsys.readouterr().out.count("method") == 1


def test_lines_are_broken_between_words_in_a_terminal_alone(capsys):
    text = "of neighbouring weights " * 9
    say(Console(width=80, force_terminal=True, color_system=None), text)
    assert {*capsys.readouterr().out.split()} == {*text.split()}
    say(Console(width=80), text)
    assert capsys.readouterr().out == f"{text}\n"


def test_finished_runs_are_told_in_a_terminal_while_others_go_on(flags, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*flags, "--method", "wanda,sparsegpt"]) == 0
    said = capsys.readouterr().err
    first, second = (said.index(f"{own}-0.5: ") for own in ("1/2 wanda", "2/2 sparsegpt"))
    assert said.index("2/2 sparsegpt-0.5") > first
    assert first < second
    assert "perplexity" in said[first:second]


@pytest.mark.parametrize("method", ["wanda", "best", "best(distill=1)"])
def test_a_broken_model_is_told_once_with_what_may_help(method):
    worse = {"metric": "perplexity", "dense": 20.0, "pruned": 50.0}
    report = gblm.Report(method, "2:4", evaluation={"a": worse | {"pruned": 30.0}, "b": worse})
    (said,) = warnings([report])
    assert f"{method}, 2:4 has likely broken the model (b 20.00 → 50.00)" in said
    assert ("--method best" in said) == (method == "wanda")
