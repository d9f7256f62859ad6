"""Run the tests of this folder in a process where the second device is there from the start.

torch has one name to give to a device of one's own, and makes the threads of backward for those
devices that are there when it first runs: in a process of other tests that would come too late, and
they would see a device they did not ask for. So a process of pytest that comes to a test of this
folder starts another one, once, which collects the folder, runs what it is told by name, and sends
back its reports.

    GBLM_SECOND_DEVICE=here python -m pytest tests/second_device    # here, for a debugger
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.runner import runtestprotocol

FOLDER = Path(__file__).parent
PLACE = os.environ.get("GBLM_SECOND_DEVICE")  # "here", or where to talk to who started us

if PLACE:
    sys.path.insert(0, str(FOLDER))
    from device import load

    load()


class Process:
    """The other process; begun with the first test, and anew after one that it did not survive."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.process: subprocess.Popen | None = None
        self.sound = False  # it has run some test
        self.fault = ""  # that keeps it from beginning

    def start(self) -> None:
        self.pipe, theirs = Pipe()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        plugins = ["-p", "no:xdist", "-p", "no:cacheprovider"]
        environment = {**os.environ, "GBLM_SECOND_DEVICE": str(theirs.fileno())}
        # Its coverage goes into a file of its own.
        if worker := os.environ.get("PYTEST_XDIST_WORKER"):
            environment["PYTEST_XDIST_WORKER"] = f"{worker}-device"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-m", "", *plugins],
            cwd=self.config.rootpath,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        theirs.close()

    def run(self, item: pytest.Item) -> list[Any]:
        """Return the reports of a test; a failure where the process comes to its end."""
        if self.fault:
            return [failed(item, self.fault)]
        if self.process is None:
            self.start()
        try:
            self.pipe.send(item.nodeid)
            reports = self.pipe.recv()
        except (EOFError, OSError):
            self.end()
            self.log.seek(0)
            text = f"the process of the second device has ended\n{self.log.read()[-20000:]}"
            self.fault = "" if self.sound else text  # no compiler, say: the same for all tests
            return [failed(item, text)]
        self.sound = True
        hook = self.config.hook
        return [
            hook.pytest_report_from_serializable(config=self.config, data=data) for data in reports
        ]

    def end(self) -> None:
        if self.process:
            self.pipe.close()
            self.process.wait()
            self.process = None


def failed(item: pytest.Item, text: str) -> pytest.TestReport:
    """Return the report of a test that nobody could run."""
    return pytest.TestReport(item.nodeid, item.location, {item.name: 1}, "failed", text, "call")


PROCESS = pytest.StashKey[Process]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PROCESS] = Process(config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[PROCESS].end()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Let a test of this folder run over there."""
    if PLACE or FOLDER not in item.path.parents:
        return None
    named = {"nodeid": item.nodeid, "location": item.location}
    item.ihook.pytest_runtest_logstart(**named)
    for report in item.config.stash[PROCESS].run(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(**named)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Over there: run what comes by name, until nobody sends any more."""
    if PLACE in (None, "here"):
        return None
    if session.testsfailed:
        raise session.Interrupted("the tests of the second device cannot be collected")
    pipe, hook = Connection(int(PLACE)), session.config.hook
    items = {item.nodeid: item for item in session.items}
    while True:
        try:
            item = items[pipe.recv()]
        except EOFError:
            return True
        reports = runtestprotocol(item, nextitem=None, log=False)
        pipe.send(
            [
                hook.pytest_report_to_serializable(config=session.config, report=report)
                for report in reports
            ]
        )


@pytest.fixture(autouse=True)
def _ample_memory() -> Iterator[None]:
    """Every test begins with ample memory, and leaves it so."""
    torch.second.reset()
    yield
    torch.second.reset()
