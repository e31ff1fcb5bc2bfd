"""The shape of the package, kept by test: imports point down, modules stay small."""

import ast
import itertools
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lrcompress

ROOT = Path(lrcompress.__file__).parent
LAYERS = [
    {"errors", "files", "linalg", "schedules", "distributed"},
    {"solvers", "budget", "keep_search", "importance", "report"},
    {"statistics", "nn", "objective"},
    {"structure", "bench"},
    {"engine", "export"},
    {"pruning", "embedding", "tasks"},
    {"callbacks", "distill"},
    {"recipe", "cli", "__main__"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
STRANGERS = ({"statistics", "solvers"},)  # they meet in the engine
# The only modules that stand beside the folders.
ROOT_MODULES = {"errors", "files", "linalg", "schedules", "distributed"}
ROOT_MODULES |= {"objective", "importance", "budget", "keep_search"}
KNOW_LIGHTNING = {"tasks", "callbacks", "distill", "recipe", "cli"}
# What an exported folder is made for, and what draws a report; the other lower levels need neither.
ALSO = {
    "export": {"transformers", "safetensors"},
    "report": {"jinja2", "markupsafe", "matplotlib", "numpy"},
}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@cache
def nodes(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text()))]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def units_imported(path: Path) -> set[str]:
    """The units of the package that a file imports, other than its own."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("lrcompress.")}
    return (names & LEVEL.keys()) - {unit_of(path)}


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 30
    assert {"engine", "callbacks", "tasks"} <= {unit_of(path) for path in MODULES}


@each_module
def test_every_unit_has_its_place(path: Path) -> None:
    assert unit_of(path) in LEVEL


def test_what_stands_beside_the_folders() -> None:
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == ROOT_MODULES | {"__init__", "__main__"}


@each_module
def test_nothing_is_imported_within_a_function(path: Path) -> None:
    functions = [n for n in nodes(path) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = [node for function in functions for node in ast.walk(function)]
    assert not [ast.unparse(n) for n in inner if isinstance(n, ast.Import | ast.ImportFrom)]


@each_module
def test_imports_point_down(path: Path) -> None:
    here = unit_of(path)
    upward = {unit for unit in units_imported(path) if LEVEL[unit] > LEVEL[here]}
    assert not upward, f"{here} (level {LEVEL[here]}) imports {sorted(upward)}"


def test_no_two_units_import_each_other() -> None:
    """Within a level too: between units there is no cycle of any length."""
    below: dict[str, set[str]] = {}
    for path in MODULES:
        below.setdefault(unit_of(path), set()).update(units_imported(path))
    reached = dict(below)
    for _ in below:
        reached = {
            unit: units.union(*(reached.get(other, set()) for other in units))
            for unit, units in reached.items()
        }
    assert not [unit for unit, units in reached.items() if unit in units]


@each_module
def test_strangers_do_not_know_each_other(path: Path) -> None:
    here = unit_of(path)
    for pair in STRANGERS:
        assert here not in pair or not units_imported(path) & pair


@each_module
def test_only_the_upper_levels_know_lightning(path: Path) -> None:
    known = [n for n in imports(path) if n.split(".")[0] in ("lightning", "pytorch_lightning")]
    assert unit_of(path) in KNOW_LIGHTNING or not known


@each_module
def test_the_lower_levels_know_torch_and_rich_alone(path: Path) -> None:
    allowed = {"lrcompress", "torch", "rich", *sys.stdlib_module_names}
    allowed |= ALSO.get(unit_of(path), set())
    strange = {name.split(".")[0] for name in imports(path)} - allowed
    assert unit_of(path) in {*KNOW_LIGHTNING, "__main__"} or not strange


@each_module
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


@each_module
def test_files_are_named_for_what_they_do(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc", "base"}


def test_tests_mirror_the_package() -> None:
    here = Path(__file__).parent
    tests = {p.relative_to(here) for p in here.rglob("test_*.py")}
    lower = [p for p in MODULES if unit_of(p) not in KNOW_LIGHTNING and p.stem[0] != "_"]
    wanted = {p.relative_to(ROOT).with_name(f"test_{p.name}") for p in lower}
    assert wanted <= tests, sorted(map(str, wanted - tests))


def test_every_pair_of_levels_is_disjoint() -> None:
    for one, other in itertools.combinations(LAYERS, 2):
        assert not one & other
