"""What waits for a GPU runs without one: tests of this folder, and the benchmark's command."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "gpu"
# A part of them, for time; all are tried by LRCOMPRESS_CARD=cpu pytest tests/gpu, and =standin.
SOME = ["test_precision.py", "test_draws_and_losses.py", "test_costs.py"]
Run = Callable[..., str]

# Each in a process that has imported what all of them do, without what tells it of others.
SCRIPT = """
import os, runpy, sys
for name in [*os.environ]:
    if name.startswith(("PYTEST_", "MASTER_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
os.environ |= {settings!r}
os.chdir({root!r})
sys.argv[:] = {command!r}
{start}
"""
TESTS = """
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture
def run(launch: Callable[..., list[str]], tmp_path: Path) -> Run:
    """Run a command of this folder in a process of its own; return what it printed."""

    def runs(start: str, *command: str, **settings: str) -> str:
        script = tmp_path / "script.py"
        given = {"root": str(ROOT), "settings": settings, "command": ["run", *command]}
        script.write_text(SCRIPT.format(start=start, **given))
        return launch(script, 1)[0]

    return runs


def chosen(*files: str) -> list[str]:
    known = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    options = ["-q", "-p", "no:cacheprovider", "-n0", f"-W{known}"]
    return [*options, *(str(HERE / name) for name in files)]


@pytest.mark.parametrize("card", ["cpu", "standin"])
def test_tests_of_this_folder_pass_without_a_gpu(card: str, run: Run) -> None:
    if card == "standin" and (sys.platform != "linux" or shutil.which("g++") is None):
        pytest.skip("no g++ to compile the stand-in device with, which is built for Linux")
    said = run(TESTS, *chosen(*SOME), LRCOMPRESS_CARD=card)
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None, said
    assert int(passed[1]) >= 25


def test_without_a_gpu_they_are_skipped_with_the_reason(run: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("here is one")
    said = run(TESTS, *chosen("test_precision.py"))
    assert "passed" not in said
    assert "needs a GPU of CUDA: torch.cuda.is_available() is false" in said


def test_the_benchmark_prints_its_tables(run: Run) -> None:
    start = "runpy.run_path('tests/benchmarks/gpu.py', run_name='__main__')"
    said = run(start, "--device=cpu", "--small", "--rounds=1")
    first = said.splitlines()[0]
    assert f"torch {torch.__version__}, CUDA" in first
    heads = [line for line in said.splitlines() if set(line) == {"|", "-"}]
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert len(heads) == 3
    assert len(rows) == 3 + 3 + 1 + 4  # heads, steps, one place to solve, layers
    figures = [float(cell) for row in rows for cell in re.findall(r"\d+\.\d+", row)]
    assert len(figures) > 20
    assert all(figure >= 0 for figure in figures)
