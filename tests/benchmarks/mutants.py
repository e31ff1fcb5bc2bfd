"""Mutation testing: which changes of a module do its tests not notice?

``python tests/benchmarks/mutants.py lrcompress/budget.py`` changes one thing after another in the
functions of a module, runs the tests that mirror it (here ``tests/test_budget.py``; others may be
named after it) and shows the changes that all of them passed. It needs ``pip install mutmut``.
"""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import zip_longest
from pathlib import Path
from typing import Any

import libcst
import pytest
from _pytest.config import _prepareconfig
from mutmut import __main__ as mutmut
from mutmut.configuration import config
from mutmut.mutation import file_mutation
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.mutators import mutation_operators, operator_string
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import change_cwd
from mutmut.workers.isolation import ForkRunner

skips = file_mutation.MutationVisitor._skip_node_and_children
arrangement = file_mutation.function_trampoline_arrangement
startup, shutdown = ForkRunner.startup, ForkRunner.shutdown
TIMEOUT = 36  # what mutmut reads an exit code as


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


def seconds(test: str) -> float:
    """Return how long a test takes without a change; before any ran, 0."""
    return state().duration_by_test.get(test, 0)


def quickest_first(tests: Any) -> list[str]:
    """One case of every test first, then a second one of each, and so on."""
    before: Counter[str] = Counter()
    turns = []
    for test in sorted(tests, key=seconds):
        name = test.partition("[")[0]
        turns.append((before[name], test))
        before[name] += 1
    return [test for _, test in sorted(turns, key=lambda turn: turn[0])]


class Impatience:
    """Ends the process of a change by which one test takes far longer than without it."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        signal.signal(signal.SIGVTALRM, lambda *_: os._exit(TIMEOUT))
        signal.setitimer(signal.ITIMER_VIRTUAL, 10 + 10 * seconds(item.nodeid))
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def collected(runner: Any) -> Any:
    """Return a session of pytest with all tests; each change is tried in a fork of it."""
    called = ["--rootdir=.", "-q", "-o", "tmp_path_retention_policy=none", "--basetemp=temporary"]
    called += [*runner._pytest_add_cli_args, *runner._pytest_add_cli_args_test_selection]
    with redirect_stdout(Path(os.devnull).open("w")):
        settings = _prepareconfig(called, [Impatience()])
        settings._do_configure()
        session: Any = pytest.Session.from_config(settings)
        settings.hook.pytest_sessionstart(session=session)
        settings.hook.pytest_collection(session=session)
    return session


def run_collected(runner: Any, *, mutant_name: str | None, tests: Any) -> int:
    """Run tests without collecting them anew, until one fails."""
    _held = sys.stdout  # what closes unseen is a warning, and this one is mutmut's
    with change_cwd("mutants"):
        if not hasattr(runner, "session"):
            runner.session = collected(runner)
        session = runner.session
        items = {item.nodeid: item for item in session.items}
        chosen = [items[test] for test in quickest_first(tests or items)]
        session.testsfailed = 0
        for item, following in zip_longest(chosen, chosen[1:]):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                session._setupstate.teardown_exact(None)
                return 1
    return 0


def check(runner: Any) -> None:
    """Check that all tests pass in a fork without a change: some libraries do not outlive one."""
    if not (child := os.fork()):
        with Path(os.devnull).open("w") as sys.stdout:
            os._exit(runner.test_runner.run_tests(mutant_name="", tests=[]))
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit("a test fails in a fork of this process, without a change")


def start(runner: Any) -> None:
    startup(runner)
    check(runner)


def end(runner: Any) -> None:
    shutdown(runner)
    check(runner)


def main(module: str, *more: str) -> None:
    below = Path(module).relative_to("lrcompress")
    mirror = Path("tests") / below.with_name(f"test_{below.name}")
    config().only_mutate = [module]
    config().pytest_add_cli_args_test_selection = [str(mirror)] * mirror.exists() + [*more]
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
    PytestRunner.run_tests = run_collected
    ForkRunner.startup, ForkRunner.shutdown = start, end
    at = next(
        i for i, (_, operator) in enumerate(mutation_operators) if operator is operator_string
    )
    mutation_operators[at] = (libcst.BaseString, changed_strings)
    main(*sys.argv[1:])
