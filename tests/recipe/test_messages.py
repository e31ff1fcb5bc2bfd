"""What messages about recipes say of values, types and names."""

import sys
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Optional, Union

import lightning as L
import pytest
import torch
from torch import nn

from lrcompress.recipe.messages import (
    choices_in,
    classes_in,
    in_words,
    nearest_class,
    nearest_of,
    shown,
    subclasses_of,
)


class Base:
    pass


class KeepRanks(Base):
    pass


class _Hidden(Base):
    pass


class Below(_Hidden):
    pass


class Color(Enum):
    red = 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        ("a", "'a'"),
        ([None, 1], "[None, 1]"),
        ("a" * 78, "'" + "a" * 78 + "'"),
        ("a" * 79, "'" + "a" * 78 + "…"),
    ],
)
def test_values_are_shown_in_at_most_80_characters(value: Any, text: str) -> None:
    assert shown(value) == text
    assert len(text) <= 80


def test_names_that_are_near_are_proposed_and_none_where_none_is_known() -> None:
    assert nearest_of("kep", ["keep", "at"]) == "; nearest valid: keep"
    assert nearest_of("kep", []) == ""


def test_subclasses_are_all_that_have_a_public_name() -> None:
    assert list(subclasses_of([Base])) == [KeepRanks, Below]
    assert list(subclasses_of([KeepRanks, Base])) == [KeepRanks, Below]
    assert list(subclasses_of([])) == []


def test_the_nearest_class_is_given_by_the_shortest_path_it_can_be_imported_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = KeepRanks.__module__
    assert nearest_class("some.where.KeepRank", (Base,)) == f"; nearest valid: {here}.KeepRanks"
    assert nearest_class("KeepRanks", (KeepRanks,)) == ""
    root, own = type("Root", (), {}), "outer.inner.deep"
    made = type("Made", (root,), {"__module__": own})
    for name in ("outer", "outer.inner", own):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for holder in (own, "outer.inner"):
        setattr(sys.modules[holder], "Made", made)  # noqa: B010
        assert nearest_class("outer.Mode", (root,)) == f"; nearest valid: {holder}.Made"
    setattr(sys.modules["outer"], "Made", root)  # noqa: B010
    assert nearest_class("outer.Mode", (root,)) == "; nearest valid: outer.inner.Made"


@pytest.mark.parametrize(
    ("hint", "classes"),
    [
        (int, []),
        (Path | Color | None, []),
        (nn.Module, [nn.Module]),
        (Optional[nn.Module], [nn.Module]),  # noqa: UP045
        (Union[L.Callback, list[nn.Module]], [L.Callback, nn.Module]),  # noqa: UP007
        (dict[str, list[L.Callback | nn.Module]] | Literal["x"], [L.Callback, nn.Module]),
        (Literal["x"], []),
        (Any, []),
    ],
)
def test_classes_are_those_of_which_an_instance_may_be_given(hint: Any, classes: Any) -> None:
    assert list(classes_in(hint)) == classes


def test_choices_are_the_strings_of_all_literals() -> None:
    assert choices_in(Literal["a", 1] | int | Literal["b"] | None) == ["a", "b"]
    assert choices_in(Literal["a", "b"]) == ["a", "b"]
    assert choices_in(str) == []


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "int"),
        (int | None, "int or null"),
        (Literal["auto", 2] | float, "'auto' or 2 or float"),
        (list[L.Callback] | L.Callback | None, "list[Callback] or Callback or null"),
        (dict[str, torch.Tensor], "dict[str, Tensor]"),
        (Any, "Any"),
    ],
)
def test_types_are_named_without_their_modules(hint: Any, words: str) -> None:
    assert in_words(hint) == words
