"""The folder of a result: one run at a time, and rights looked at before work is spent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gblm
from gblm.llm.__main__ import main
from gblm.machine import files


def test_two_runs_in_one_folder_are_one_too_many(tmp_path: Path):
    folder = tmp_path / "deep" / "pruned"
    with files.claimed(folder):
        with pytest.raises(gblm.GblmError, match="pruned is in use by another run"):
            files.claimed(folder).__enter__()
        with files.claimed(tmp_path / "deep" / "other"):
            pass
    with files.claimed(folder):
        pass
    assert not list(folder.parent.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from gblm.machine import files
with files.claimed(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_lock_goes_with_the_process_that_is_killed(tmp_path: Path):
    folder = tmp_path / "pruned"
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"in\n"
    with pytest.raises(gblm.GblmError, match="in use"):
        files.claimed(folder).__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".pruned.lock"]
    with files.claimed(folder):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_while_we_waited_is_none(tmp_path: Path, monkeypatch):
    file, flock, opened = tmp_path / "lock", files.fcntl.flock, []

    def slow(handle, how):
        if not opened:
            file.unlink()  # the run before ends here
        opened.append(os.fstat(handle.fileno()).st_ino)
        flock(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", slow)
    with files.locked(tmp_path / "pruned", file):
        assert len(opened) == 2
        assert file.stat().st_ino == opened[1]
        with pytest.raises(gblm.GblmError, match="in use"):
            files.locked(tmp_path / "pruned", file).__enter__()


def test_the_second_command_into_a_folder_is_refused(llm: list[str], tmp_path: Path, capsys):
    at = llm.index("--windows")
    flags = [*llm[1:at], *llm[at + 2 :], "--output", str(tmp_path / "pruned")]
    with files.claimed(tmp_path / "pruned"):
        assert main(flags) == 2
    assert "pruned is in use by another run" in capsys.readouterr().err
    assert main(flags) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.mark.parametrize("where", ["pruned", ""])
def test_folders_without_rights_are_refused_at_the_door(where: str, tmp_path: Path, monkeypatch):
    closed = tmp_path / where
    closed.mkdir(exist_ok=True)
    access = os.access  # the superuser has every right
    monkeypatch.setattr(os, "access", lambda path, how: Path(path) != closed and access(path, how))
    with pytest.raises(gblm.GblmError, match="no right to write"):
        files.check_output(tmp_path / "pruned", 0, overwrite=True)


def test_a_folder_that_takes_no_file_is_refused_at_the_door(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(gblm.GblmError, match="give another folder"):
        files.claimed(tmp_path / "file" / "pruned").__enter__()
