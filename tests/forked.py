"""Processes of their own for tests: real ones, without the seconds in which libraries are imported.

They are forked from one process that has imported the libraries, and nothing of gblm; it is begun
with the first of them.
"""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from torch.distributed import TCPStore

FORKS = multiprocessing.get_context("forkserver")
TRANSFORMERS = ["models.llama.modeling_llama", "models.auto.processing_auto"]
FORKS.set_forkserver_preload(
    [
        *(f"transformers.{name}" for name in TRANSFORMERS),
        *("accelerate", "cyclopts", "datasets", "greenlet", "rich.progress", "timm"),
        "torchvision.transforms.v2",
    ]
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
PROCESS = """
import os, sys
os.environ |= environment
sys.argv = ["gblm", *argv]
file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(file, 1)
os.dup2(file, 2)
exec(script, {"__name__": "__main__"})
"""
COMMAND = """
import sys
from gblm.{side}.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def start(script: str, argv: list[str], said: Path, **environment: str) -> BaseProcess:
    """Start a process that runs a script; what it says goes to a file."""
    given = {"script": script, "argv": argv, "said": said}
    given["environment"] = {**os.environ, **ENVIRONMENT, **environment}
    process = FORKS.Process(target=exec, args=(PROCESS, given))
    process.start()
    return process


def ended(process: BaseProcess) -> int:
    """Return the exit code of a process."""
    process.join(300)
    if process.exitcode is None:
        process.kill()
        pytest.fail("a process did not end")
    return process.exitcode


def together(processes: int, script: str, argv: list[str], said: Path) -> list[int]:
    """Run a script in so many processes, as torchrun starts them; return their exit codes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    every = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    every |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(processes)}
    ranks = map(str, range(processes))
    started = [start(script, argv, said, **every, RANK=rank, LOCAL_RANK=rank) for rank in ranks]
    return [ended(process) for process in started]
