"""Recipes of any keys and values: read, merged and overridden as plain mappings are."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lrcompress.recipe.sources import Recipe, plain

KEYS = st.text("abcxyz_", min_size=1, max_size=3)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("ab c:#'\"-{}[]0\nλ", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
RECIPES = st.dictionaries(KEYS, VALUES, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def read(*args: str) -> Any:
    recipe = Recipe(args)
    assert recipe.faults == []
    return plain(recipe.root)


def written(folder: Path, name: str, values: object) -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return f"--config={path}"


def merged(old: Any, new: Any) -> Any:
    """Mappings grow together, of all else the later is taken; a list stays one unless replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: merged(old.get(key), value) for key, value in new.items()}
    return new


@given(RECIPES)
def test_any_recipe_is_read_as_it_was_written(folder: Path, values: dict[str, Any]) -> None:
    option = written(folder, "one.yaml", values)
    assert read(option) == values
    assert read(option, option) == values
    assert read(written(folder, "again.yaml", read(option))) == values


@given(RECIPES, RECIPES)
def test_a_later_file_changes_what_it_names(
    folder: Path, values: dict[str, Any], later: dict[str, Any]
) -> None:
    options = [written(folder, f"{i}.yaml", given) for i, given in enumerate((values, later))]
    assert read(*options) == merged(values, later)


@given(RECIPES, KEYS, KEYS, st.lists(VALUES) | st.dictionaries(KEYS, VALUES))
def test_an_option_of_the_command_line_is_as_a_later_file(
    folder: Path, values: dict[str, Any], key: str, inner: str, value: Any
) -> None:
    if not isinstance(values.get(key), dict):  # what is no mapping cannot hold an option
        values = {name: held for name, held in values.items() if name != key}
    flow = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    found = read(written(folder, "one.yaml", values), f"--{key}.{inner}={flow}")
    assert found == merged(values, {key: {inner: value}})
