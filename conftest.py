"""Every process of the tests uses one core; warnings are errors where versions are as pinned.

pyproject.toml makes every warning an error. That stays so with the versions of constraints.txt,
which CI installs. Of any other the warnings are shown: a release of a library that deprecates
something must not fail the tests of one who has installed it.
"""

import os
import re
import sys
import warnings
from importlib.metadata import distributions
from pathlib import Path

import pytest

# torch reads it when it is imported, which is after this file
os.environ.setdefault("OMP_NUM_THREADS", "1")

CONSTRAINTS = Path(__file__).with_name("constraints.txt").read_text()


def unlike_pins() -> list[str]:
    """What is installed in another version than constraints.txt has, Python first."""
    (python,) = re.findall(r"for Python (3\.\d+)\.", CONSTRAINTS)
    pins = {"python": python, **dict(re.findall(r"^([^#=\s]+)==(\S+)", CONSTRAINTS, re.MULTILINE))}
    found = {"python": "{}.{}".format(*sys.version_info)}
    found |= {normal(one.name): one.version.partition("+")[0] for one in distributions()}
    here = {name: found.get(normal(name), pin) for name, pin in pins.items()}
    return [f"{name} {here[name]}" for name, pin in pins.items() if here[name] != pin]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


UNLIKE = unlike_pins()
if UNLIKE:
    warnings.simplefilter("default")  # for the conftest files


def pytest_configure(config: pytest.Config) -> None:
    if UNLIKE:
        config.getini("filterwarnings").remove("error")
        warnings.simplefilter("default")  # over what pytest has set up before it calls this


def pytest_report_header() -> str:
    if not UNLIKE:
        return "warnings: errors, as all versions are those of constraints.txt"
    more = f" and {len(UNLIKE) - 6} more" if len(UNLIKE) > 6 else ""
    return f"warnings: shown, no errors; not as in constraints.txt: {', '.join(UNLIKE[:6])}{more}"
