"""The guide's table of what works with what: each row is kept by a test that is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from lrcompress.cli.guide import FOLDER

ROOT = Path(__file__).parents[1]
PAGE = FOLDER / "works-with.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| what")
]
# Without them a row would be kept by a test that never runs.
SKIPS = {"skip", "xfail", "gpu"}


def test_there_are_rows_of_every_kind() -> None:
    headings = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    assert headings[:4] == ["Lightning", "Callbacks", "Optimizers", "Libraries"]
    assert len(ROWS) > 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_the_test_of_a_row_is_there_and_runs(row: list[str]) -> None:
    _, works, named = row
    path, _, test = named.strip("` |").partition("::")
    assert re.match(r"yes|no|they|factors|a warning|`compress\(\)`", works)
    assert test in functions_in(ROOT / path), named


@cache
def functions_in(path: Path) -> set[str]:
    """Return the tests of a file that are not skipped."""
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    return {
        one.name
        for one in functions
        if not SKIPS
        & {n.attr for d in one.decorator_list for n in ast.walk(d) if isinstance(n, ast.Attribute)}
    }
