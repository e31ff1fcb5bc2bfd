"""Warnings are errors with the versions of constraints.txt, and are shown with others."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
WARNS = """
import warnings
warnings.warn("while imported", FutureWarning)
"""
TEST_WARNS = """
import warnings
def test_warns():
    warnings.warn("while run", DeprecationWarning)
"""


def run(folder: Path, pins: str) -> str:
    """What pytest prints of the tests in a folder, in a worker, with this constraints.txt."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    python = "for Python {}.{}.".format(*sys.version_info)
    (folder / "constraints.txt").write_text(f"# {python}\n{pins}\n")
    command = [sys.executable, "-m", "pytest", "-n1", "tests"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_errors_with_the_pinned_versions(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_imports.py").write_text(WARNS)
    (tmp_path / "tests" / "test_runs.py").write_text(TEST_WARNS)
    told = run(tmp_path, f"pytest=={version('pytest')}\nnot_installed==1.0")
    assert "1 failed, 1 error" in told, told
    assert "warnings: errors" in told


def test_shown_with_other_versions(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(WARNS)
    (tmp_path / "tests" / "test_runs.py").write_text(WARNS + TEST_WARNS)
    told = run(tmp_path, "pytest==0.1")
    assert "1 passed" in told, told
    assert f"not as in constraints.txt: pytest {version('pytest')}" in told
    assert "DeprecationWarning: while run" in told
