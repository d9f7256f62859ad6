"""Laws of files and folders: whole or not there, rights of the umask, one run at a time."""

import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import gblm
from gblm.llm.__main__ import main
from gblm.machine import files
from gblm.vit.__main__ import main as prune_vit
from tests.forked import ended, start

TENSORS = {"weight": torch.ones(3, 2), "bias": torch.arange(2)}


def folder_of_all_kinds(folder: Path) -> None:
    """Write into a folder as libraries do, each with rights of its own."""
    (folder / "deep" / "deeper").mkdir(parents=True, mode=0o700)
    save_file(TENSORS, folder / "model.safetensors")
    for place in (folder, folder / "deep" / "deeper"):
        (place / "config.json").write_text("{}")
    (folder / "deep" / "script.py").write_text("")
    (folder / "deep" / "script.py").chmod(0o755)


def beside(path: Path) -> None:
    with files.written_beside(path) as folder:
        folder_of_all_kinds(folder)


def into(path: Path) -> None:
    with files.written_into(path) as folder:
        folder_of_all_kinds(folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    "tensors": lambda path: files.write_tensors(path, TENSORS),
    "json": lambda path: files.write_json(path, {"a": 1}),
    "text": lambda path: files.write_text(path, "text"),
    "a folder": beside,
    "into a folder": into,
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def content(path: Path) -> dict[str, bytes]:
    """Return every file at or below a path, hidden ones too, and what it holds."""
    found = [path, *path.rglob("*")]
    return {str(file.relative_to(path)): file.read_bytes() for file in found if file.is_file()}


# Rights


UMASKS = pytest.mark.parametrize("umask", [0o022, 0o077], indirect=True)


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check_rights(top: Path, umask: int) -> None:
    """Fail unless all below a folder has the rights that the umask gives."""
    below = list(top.rglob("*"))
    assert below
    for path in below:
        usual = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == usual & ~umask, path


@UMASKS
@every_writer
def test_all_that_is_written_has_the_rights_of_the_umask(write, umask, tmp_path: Path):
    write(tmp_path / "new" / "result")
    check_rights(tmp_path, umask)


def test_what_was_there_keeps_its_rights(tmp_path: Path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    mine.chmod(0o604)
    tmp_path.chmod(0o750)
    into(tmp_path)
    files.write_text(tmp_path / "text", "text")
    assert stat.S_IMODE(mine.stat().st_mode) == 0o604
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750


@pytest.mark.parametrize(
    ("side", "offload", "umask"),
    [
        ("llm", "none", 0o077),
        ("vit", "disk", 0o077),
        pytest.param("llm", "disk", 0o022, marks=pytest.mark.slow),
        pytest.param("vit", "none", 0o022, marks=pytest.mark.slow),
    ],
    indirect=["umask"],
)
def test_results_of_a_command_have_the_rights_of_the_umask(
    side, offload, umask, request, tmp_path: Path
):
    flags = request.getfixturevalue(side)[1:]
    if side == "llm":
        flags[flags.index("--windows")] = "--evaluate-windows"
    for name in ("output", "report", "work-dir"):
        flags += [f"--{name}", str(tmp_path / name)]
    flags += ["--method", "gblm,magnitude", "--sparsity", "0.5", "--offload", offload]
    assert {"llm": main, "vit": prune_vit}[side](flags) == 0
    assert len(list((tmp_path / "output").rglob("*.safetensors"))) >= 2
    assert list((tmp_path / "work-dir" / "gradients").iterdir())
    check_rights(tmp_path, umask)


@UMASKS
def test_a_checkpoint_in_shards_has_the_rights_of_the_umask(llm, umask, tmp_path: Path):
    flags = llm[1:]
    flags[flags.index("--windows")] = "--evaluate-windows"
    at = flags.index("--model") + 1
    model = AutoModelForCausalLM.from_pretrained(flags[at])
    shutil.copytree(flags[at], tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    flags[at] = str(tmp_path / "shards")
    flags += ["--method", "magnitude", "--sparsity", "0.5", "--output", str(tmp_path / "pruned")]
    assert main(flags) == 0
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 1
    check_rights(tmp_path / "pruned", umask)


# Whole or not there


@every_writer
def test_what_was_written_is_read_again(write, tmp_path: Path):
    write(tmp_path / "result")
    write(tmp_path / "result")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    result = tmp_path / "result"
    if result.is_dir():
        assert len(content(result)) == 4
        result /= "model.safetensors"
    if b"weight" in result.read_bytes():
        read = files.read_tensors(result)
        assert read.keys() == TENSORS.keys()
        assert all(torch.equal(read[name], value) for name, value in TENSORS.items())
        assert files.read_tensors(result, ["bias"]).keys() == {"bias"}
        assert files.read_tensors(result, []) == {}


def test_a_folder_takes_the_place_of_all_that_was_in_it(tmp_path: Path):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "mine.txt").write_text("mine")
    into(tmp_path / "result")
    assert (tmp_path / "result" / "mine.txt").read_text() == "mine"
    beside(tmp_path / "result")
    assert not (tmp_path / "result" / "mine.txt").exists()
    assert (tmp_path / "result" / "deep" / "deeper" / "config.json").is_file()


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path):
    (tmp_path / "disk" / "result").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "result")
    beside(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(content(tmp_path / "disk" / "result")) == 4
    with files.claimed(tmp_path / "link"), pytest.raises(gblm.GblmError, match="in use"):
        files.claimed(tmp_path / "disk" / "result").__enter__()


def test_a_file_takes_no_folder_s_place(tmp_path: Path):
    (tmp_path / "result").mkdir()
    with pytest.raises(gblm.GblmError, match="result cannot be written"):
        files.write_text(tmp_path / "result", "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "result"]


class Steps:
    """Stops the calls that writing makes of the system at the one of a number, or after it."""

    CALLS = ((os, "fsync"), (os, "replace"), (Path, "chmod"), (shutil, "rmtree"))

    def __init__(self, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
        self.error, self.stop, self.after, self.count = error, 0, False, 0
        for place, name in self.CALLS:
            patch.setattr(place, name, self.planted(getattr(place, name)))

    def planted(self, call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            if kwargs.get("ignore_errors"):  # of what was stopped once already
                return call(*args, **kwargs)
            self.count += 1
            at = self.count == self.stop
            if at and not self.after:
                raise self.error(28, "No space left on device")
            result = call(*args, **kwargs)
            if at:
                raise self.error(28, "No space left on device")
            return result

        return run


@every_writer
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "over"])
def test_what_is_stopped_anywhere_leaves_the_old_or_the_new(
    write, error, after, there, tmp_path: Path, monkeypatch, caplog
):
    into_a_folder = write is WRITERS["into a folder"]  # whose files are renamed one by one
    result, steps = tmp_path / "result", 0
    write(result)
    new = content(result)
    while True:
        shutil.rmtree(result, ignore_errors=True)
        result.unlink(missing_ok=True)
        if there and len(new) > 1:
            result.mkdir()
            (result / "config.json").write_text("old")
        elif there:
            result.write_text("old")
        old = content(result)
        caplog.clear()
        steps += 1
        with monkeypatch.context() as patch:
            plan = Steps(patch, error)
            plan.stop, plan.after = steps, after
            try:
                write(result)
                stopped = False
            except (gblm.GblmError, KeyboardInterrupt):
                stopped = True
        now = content(result)
        if not stopped and plan.count < steps:
            assert now == new
            break
        if into_a_folder:
            assert all(data in (old.get(name), new.get(name)) for name, data in now.items())
        else:
            assert now in (old, new)
        left = [path for path in tmp_path.iterdir() if path != result]
        assert all(str(path) in caplog.text for path in left), "what is left is told"
        for path in left:
            shutil.rmtree(path)
        assert not [name for name in now if Path(name).name.startswith(".")]
    assert steps > 3


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from gblm.base import GblmError
from gblm.machine import files
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (
    lambda path: files.write_tensors(path, {"x": torch.ones(100_000)}),
    lambda path: files.write_text(path, "x" * 400_000),
):
    try:
        write(Path(sys.argv[1]) / "file")
    except GblmError as error:
        print(error)
"""


def test_a_file_that_finds_no_space_is_an_error_with_a_way_out(tmp_path: Path):
    (tmp_path / "file").write_text("old")
    output = tmp_path.with_suffix(".said")
    assert ended(start(LIMITED, [str(tmp_path)], output)) == 0, output.read_text()
    said = output.read_text().splitlines()
    assert len(said) == 2
    assert all("file cannot be written (" in line for line in said)
    assert all("; make space, check the rights, or go elsewhere" in line for line in said)
    assert content(tmp_path) == {"file": b"old"}


@every_writer
def test_where_no_file_can_be_is_an_error_with_a_way_out(write, tmp_path: Path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(gblm.GblmError, match=r"cannot be written \(.*; make space"):
        write(tmp_path / "file" / "below")
    assert content(tmp_path) == {"file": b"old"}


def test_an_old_result_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch, caplog):
    result = tmp_path / "result"
    result.mkdir()
    (result / "mine.txt").write_text("mine")
    remove = shutil.rmtree

    def planted(path: Path, **kwargs: bool) -> None:
        if (Path(path) / "mine.txt").exists():
            raise PermissionError(13, "Permission denied")
        remove(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", planted)
    beside(result)
    assert (result / "model.safetensors").is_file()
    (old,) = (path for path in tmp_path.iterdir() if path != result)
    assert (old / "mine.txt").read_text() == "mine"
    assert f"{result} is written; what it held before is in {old}" in caplog.text


def test_data_lies_on_the_disk_before_its_name_does(tmp_path: Path, monkeypatch):
    events: list[tuple[str, int]] = []
    sync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        events.append(("sync", os.fstat(handle).st_ino))
        sync(handle)

    def renamed(old: Path, new: Path) -> None:
        events.append(("rename", Path(old).stat().st_ino))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    beside(tmp_path / "result")
    files.write_tensors(tmp_path / "file", TENSORS)
    for path in (tmp_path / "result", tmp_path / "file"):
        named = events.index(("rename", path.stat().st_ino))
        for inside in (path, *path.rglob("*")):
            assert ("sync", inside.stat().st_ino) in events[:named]
        assert ("sync", tmp_path.stat().st_ino) in events[named:]


# Reading


def test_a_damaged_file_says_the_way_out_of_its_reader(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"half")
    with pytest.raises(gblm.GblmError, match=r"file cannot be read .*; fetch or write it again"):
        files.read_tensors(file)
    with pytest.raises(gblm.GblmError, match=r"file cannot be read .*; run again"):
        files.read_tensors(file, way="run again")
    with pytest.raises(gblm.GblmError, match=r"file cannot be read .*; remove its folder"):
        files.read_json(file)
    files.write_json(file, {"a": 1, "b": []})
    assert files.read_json(file, a=int, b=list) == {"a": 1, "b": []}
    with pytest.raises(gblm.GblmError, match=r"is damaged: it lacks b, c; run again"):
        files.read_json(file, way="run again", a=int, b=dict, c=int)


# One run at a time


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
    time.sleep(300)
"""


def test_a_lock_goes_with_the_process_that_is_killed(tmp_path: Path):
    folder = tmp_path / "pruned"
    said = tmp_path.with_suffix(".said")
    process = start(HOLD, [str(folder)], said)
    while not (said.exists() and said.read_text()) and process.is_alive():
        time.sleep(0.005)
    with pytest.raises(gblm.GblmError, match="in use"):
        files.claimed(folder).__enter__()
    process.kill()
    assert ended(process) == -signal.SIGKILL, said.read_text()
    assert [path.name for path in tmp_path.iterdir()] == [".pruned.lock"]
    with files.claimed(folder):
        pass
    assert not list(tmp_path.iterdir())


def test_of_many_that_come_and_go_no_two_are_inside(tmp_path: Path):
    inside, most, entries = [], [], []

    def come_and_go() -> None:
        for _ in range(300):
            try:
                with files.claimed(tmp_path / "pruned"):
                    inside.append(1)
                    most.append(len(inside))
                    entries.append(1)
                    inside.pop()
            except gblm.GblmError:
                pass

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(entries) > 1
    assert not list(tmp_path.iterdir())


def test_the_second_command_into_a_folder_is_refused(llm: list[str], tmp_path: Path, capsys):
    at = llm.index("--windows")
    flags = [*llm[1:at], *llm[at + 2 :], "--output", str(tmp_path / "pruned")]
    with files.claimed(tmp_path / "pruned"):
        assert main(flags) == 2
    assert "pruned is in use by another run" in capsys.readouterr().err
    assert main(flags) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


# At the door


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


def test_a_mount_point_which_cannot_be_renamed_is_refused_at_the_door():
    with pytest.raises(gblm.GblmError, match="is a mount point; give a folder in it"):
        files.check_output(Path("/"), 0, overwrite=True)
