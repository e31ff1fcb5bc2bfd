"""Mutation testing: which changes of a module do its tests not notice?

``python tests/benchmarks/mutants.py lrcompress/budget.py`` changes one thing after another in the
functions of a module, runs the tests that mirror it (here ``tests/test_budget.py``; others may be
named after it) and shows the changes that all of them passed. It needs ``pip install mutmut``.
"""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import libcst
from mutmut import __main__ as mutmut
from mutmut.configuration import config
from mutmut.mutation import file_mutation
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.mutators import mutation_operators, operator_string
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.stats import status_by_exit_code

skips = file_mutation.MutationVisitor._skip_node_and_children
arrangement = file_mutation.function_trampoline_arrangement
arguments = PytestRunner._pytest_args_regular_run


def is_decorated(function: Any) -> bool:
    """Whether in a way that mutmut leaves out, such as ``@property`` or ``@torch.no_grad()``."""
    known = ("staticmethod", "classmethod")
    names = [getattr(one.decorator, "value", None) for one in function.decorators]
    return bool(names) and not (len(names) == 1 and names[0] in known)


def skips_fewer(visitor: Any, node: Any) -> bool:
    if isinstance(node, libcst.FunctionDef) and is_decorated(node):
        node = node.with_changes(decorators=[])
    return skips(visitor, node)


def decorated_arrangement(function: Any, mutants: Any, class_name: str | None) -> Any:
    """Put decorators around the choice between a function and its mutants, and none within."""
    if not is_decorated(function):
        return arrangement(function, mutants, class_name)
    bare = function.with_changes(decorators=[])
    declared, (choice, *versions), assigned, names = arrangement(bare, mutants, class_name)
    choice = choice.with_changes(decorators=[*function.decorators, *choice.decorators])
    return declared, [choice, *versions], assigned, names


def changed_strings(node: Any) -> Any:
    """Leave sentences alone: tests hold messages to what matters in them."""
    return () if " " in getattr(node, "value", "") else operator_string(node)


def quickest_first(runner: Any, tests: Any) -> list[str]:
    return arguments(runner, sorted(tests, key=lambda test: state().duration_by_test.get(test, 0)))


def main(module: str, *more: str) -> None:
    below = Path(module).relative_to("lrcompress")
    mirror = Path("tests") / below.with_name(f"test_{below.name}")
    config().only_mutate = [module]
    config().pytest_add_cli_args_test_selection = [str(mirror), *more]
    shutil.rmtree("mutants", ignore_errors=True)
    mutmut._run((), max_children=1)
    results = json.loads((Path("mutants") / f"{module}.meta").read_text())["exit_code_by_key"]
    found = {name: status_by_exit_code[code] for name, code in results.items()}
    for name, status in found.items():
        if status not in ("killed", "timeout"):
            print(f"\n{status}: {name}\n{get_diff_for_mutant(name, path=module)}")
    print(module, dict(Counter(found.values())))


if __name__ == "__main__":
    file_mutation.MutationVisitor._skip_node_and_children = skips_fewer
    file_mutation.function_trampoline_arrangement = decorated_arrangement
    PytestRunner._pytest_args_regular_run = quickest_first
    at = next(
        i for i, (_, operator) in enumerate(mutation_operators) if operator is operator_string
    )
    mutation_operators[at] = (libcst.BaseString, changed_strings)
    main(*sys.argv[1:])
