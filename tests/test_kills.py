"""A command that is killed at any moment goes on by --resume, and ends with the same bits."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import gblm.llm.__main__ as llm_side
import gblm.vit.__main__ as vit_side

KILLS = 9  # of each of twelve runs: 108
MAIN = {"llm": llm_side.main, "vit": vit_side.main}


def started(main: Callable[..., int], argv: list[str]) -> int:
    """Run a command in a process of its own, which has the libraries at once; return its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        code = main(argv)
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def bits(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.glob("*.safetensors")}


@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize("method", ["best", "gblm", "wanda++"])
@pytest.mark.parametrize("side", ["llm", "vit"])
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(side, method, offload, tmp_path, request):
    given = request.getfixturevalue(side)[1:]
    if side == "llm":
        given[given.index("--windows")] = "--evaluate-windows"
    run = [*given, "--method", method, "--offload", offload, "--overwrite"]

    def places(name: str) -> list[str]:
        return ["--output", str(tmp_path / name), "--work-dir", str(tmp_path / f"{name}-work")]

    start = time.monotonic()
    assert ended(started(MAIN[side], [*run, *places("whole")])) == 0
    seconds, expected = time.monotonic() - start, bits(tmp_path / "whole")
    draw, killed = random.Random(f"{side} {method} {offload}"), 0
    for number in range(KILLS):
        process = started(MAIN[side], [*run, *places(str(number))])
        time.sleep(draw.uniform(0.05, 1) * seconds)
        os.kill(process, draw.choice([signal.SIGKILL, signal.SIGTERM]))
        killed += ended(process) < 0
        assert ended(started(MAIN[side], [*run, *places(str(number)), "--resume"])) == 0
        assert bits(tmp_path / str(number)) == expected, f"kill {number}"
    assert killed > KILLS // 2
