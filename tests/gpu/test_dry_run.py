"""What waits for a GPU runs without one: tests of this folder, and the benchmark's command."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HERE = "tests/gpu"
# A part of them, for time; all are tried by LRCOMPRESS_CARD=cpu pytest tests/gpu, and =standin.
SOME = [f"{HERE}/test_precision.py", f"{HERE}/test_draws_and_losses.py"]


def run(*command: str, **settings: str) -> str:
    known = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    known |= {"PYTHONPATH": str(ROOT), **settings}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=known, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("card", ["cpu", "standin"])
def test_tests_of_this_folder_pass_without_a_gpu(card: str) -> None:
    if card == "standin" and (sys.platform != "linux" or shutil.which("g++") is None):
        pytest.skip("no g++ to compile the stand-in device with, which is built for Linux")
    chosen = ["-q", "-p", "no:cacheprovider", "-n0"]
    said = run("-m", "pytest", *chosen, *SOME, LRCOMPRESS_CARD=card)
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None, said
    assert int(passed[1]) >= 25


def test_without_a_gpu_they_are_skipped_with_the_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("here is one")
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", f"{HERE}/test_precision.py")
    assert "passed" not in said
    assert "needs a GPU of CUDA: torch.cuda.is_available() is false" in said


def test_the_benchmark_prints_its_tables() -> None:
    said = run("tests/benchmarks/gpu.py", "--device=cpu", "--small", "--rounds=1")
    first = said.splitlines()[0]
    assert f"torch {torch.__version__}, CUDA" in first
    heads = [line for line in said.splitlines() if set(line) == {"|", "-"}]
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert len(heads) == 3
    assert len(rows) == 3 + 3 + 1 + 4  # heads, steps, one place to solve, layers
    figures = [float(cell) for row in rows for cell in re.findall(r"\d+\.\d+", row)]
    assert len(figures) > 20
    assert all(figure >= 0 for figure in figures)
