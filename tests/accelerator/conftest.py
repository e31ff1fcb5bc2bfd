"""Tests of this folder run on a stand-in for a GPU, in a process of their own.

Registering a device with torch changes the process for good, and comes too late once a backward
pass has run. So the tests are collected here, and each is handed to a child, which runs pytest on
the same folder, has registered the device before anything else, and sends its reports back.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
collect_ignore = ["standin"]  # whose modules change the process that imports them
LINES = "LRCOMPRESS_STANDIN"  # in the child: the file descriptors to read from and write to
IN_CHILD = LINES in os.environ
LACKING = (
    "the stand-in device is built for Linux"
    if sys.platform != "linux"
    else "no g++ to compile the stand-in device with"
    if shutil.which("g++") is None
    else None
)

if IN_CHILD:
    sys.path.insert(0, str(HERE / "standin"))
    import runs
    import vgpu


@pytest.fixture(scope="session")
def device() -> SimpleNamespace:
    """The stand-in (``DEVICE``, ``OTHER``, ``counts()``), and what trains on it."""
    return SimpleNamespace(**vars(vgpu) | vars(runs))


class Child:
    """A pytest that runs tests of this folder, one after another, on the stand-in device."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.done = config, 0  # tests that it has run
        self.lines, theirs = Pipe()
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        known = {key: x for key, x in os.environ.items() if not key.startswith("PYTEST_")}
        known |= {LINES: str(theirs.fileno())}
        chosen = [
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-o",
            "addopts=--import-mode=importlib",
        ]
        command = [sys.executable, "-m", "pytest", *chosen, "--rootdir", str(config.rootpath)]
        self.process = subprocess.Popen(
            [*command, str(HERE)],
            cwd=config.rootpath,
            env=known,
            pass_fds=[theirs.fileno()],
            stdout=self.said,
            stderr=subprocess.STDOUT,
        )
        theirs.close()

    def run(self, item: pytest.Item, following: pytest.Item | None) -> Iterator[pytest.TestReport]:
        """Run a test, and yield its reports; one of a failure if the child dies of it."""
        try:
            self.lines.send((item.nodeid, following and following.nodeid))
            while (found := self.lines.recv()) is not None:
                yield self.config.hook.pytest_report_from_serializable(
                    config=self.config, data=found
                )
            self.done += 1
        except (EOFError, OSError):
            self.said.seek(0)
            said = f"the process with the stand-in device ended:\n{self.said.read()[-4000:]}"
            keywords = dict.fromkeys(item.keywords, 1)
            yield pytest.TestReport(item.nodeid, item.location, keywords, "failed", said, "call")

    def close(self) -> None:
        self.lines.close()
        self.process.wait()
        self.said.close()


CHILD = pytest.StashKey[Child]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if LACKING and item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(LACKING))


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if IN_CHILD or LACKING or not item.path.is_relative_to(HERE):
        return None
    stash = item.config.stash
    # one that died of a test is started again; one that cannot start is not
    if CHILD not in stash or (stash[CHILD].process.poll() is not None and stash[CHILD].done):
        stash[CHILD] = Child(item.config)
        item.config.add_cleanup(stash[CHILD].close)
    here = nextitem is not None and nextitem.path.is_relative_to(HERE)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[CHILD].run(item, nextitem if here else None):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


# In the child


class Reporting:
    """Runs the tests that the parent names, until it has no more, and sends their reports."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.lines = config, Connection(int(os.environ[LINES]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        while True:
            try:
                name, following = self.lines.recv()
            except EOFError:
                return True
            nextitem = items.get(following)
            self.config.hook.pytest_runtest_protocol(item=items[name], nextitem=nextitem)
            self.lines.send(None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self.config.hook.pytest_report_to_serializable
        self.lines.send(hook(config=self.config, report=report))


def pytest_configure(config: pytest.Config) -> None:
    if IN_CHILD:
        config.pluginmanager.register(Reporting(config))
