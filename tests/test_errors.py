"""Every exception of the package has one base, and a built-in one that callers know."""

import inspect
import re

import pytest

from lrcompress import errors
from lrcompress.errors import LRCompressError, nearest

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, LRCompressError) and value != LRCompressError
]
DRAWN = dict(re.findall(r"[├└]── (\w+) .*\((\w+)\)", errors.__doc__ or ""))


def test_the_tree_in_the_docstring_names_every_class() -> None:
    assert list(DRAWN) == [kind.__name__ for kind in CLASSES]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_class_is_caught_by_the_base_and_by_the_built_in_drawn_beside_it(
    kind: type[LRCompressError],
) -> None:
    assert kind.__bases__[0] is LRCompressError
    assert kind.__bases__[1].__name__ == DRAWN[kind.__name__]


def test_nearest_puts_the_closest_name_first_and_gives_no_more_than_asked() -> None:
    known = ["layer.0.query", "layer.0.value", "layer.1.query", "pooler"]
    assert nearest("layer.1.qeury", known, 1) == "layer.1.query"
    assert len(nearest("layer", known, 2).split(", ")) == 2


def test_nearest_lists_the_first_names_when_none_is_close() -> None:
    assert nearest("zzz", ["one", "two", "three", "four"]) == "one, two, three"
    assert nearest("zzz", []) == ""
