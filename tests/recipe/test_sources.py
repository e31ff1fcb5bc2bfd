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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_options_may_be_short_apart_from_their_values_and_in_any_order(here: Path) -> None:
    Path("one.yaml").write_text("a: {b: 1}")
    assert read("-c", "one.yaml", "--a.c", "x", "--print_config", "--d=y") == {
        "a": {"b": 1, "c": "x"},
        "d": "y",
    }
    recipe = Recipe(["stray", "--a", "--b=1", "word"])
    assert plain(recipe.root) == {"b": "1"}
    assert recipe.faults == [
        "command line: expected --key=value, found 'stray'",
        "command line: a: expected a value, found none",
        "command line: expected --key=value, found 'word'",
    ]


def test_a_section_may_be_a_file_and_a_value_further_in_is_none(here: Path) -> None:
    Path("part.yml").write_text("b: 1")
    Path("one.yaml").write_text("a: part.yml\nc: {d: part.yml}")
    assert read("--config=one.yaml") == {"a": {"b": 1}, "c": {"d": "part.yml"}}
    assert read("--a=part.yml", "--c.d=part.yml") == {"a": {"b": 1}, "c": {"d": "part.yml"}}
    recipe = Recipe(["--x=1", "--a=none.yml"])
    assert plain(recipe.root) == {"x": "1"}
    assert recipe.complete is False
    assert recipe.faults[0].startswith("none.yml: expected a file, found none")


def test_a_key_written_twice_is_found_wherever_it_stands(here: Path) -> None:
    Path("one.yaml").write_text("a:\n- x: {y: 1,\n    y: 2}\nb: {c: 1}\nb: 2")
    assert Recipe(["--config=one.yaml"]).faults == [
        "one.yaml:3: a[0].x.y: expected once, found again after line 2",
        "one.yaml:5: b: expected once, found again after line 4",
    ]


def test_what_is_appended_grows_a_list_whatever_was_there() -> None:
    assert read("--a+=x") == {"a": ["x"]}
    assert read("--a=x", "--a+=y", "--a+=[u, v]") == {"a": ["x", "y", "u", "v"]}
    assert read("--a=[{b: 1}, {b: 2}]", "--a.c=3", "--a+={b: 4}") == {
        "a": [{"b": 1}, {"b": 2, "c": "3"}, {"b": 4}]
    }


def test_a_class_is_given_by_its_path_alone_and_options_below_it_are_its_arguments() -> None:
    assert read("--a=some.Class", "--a.b=1") == {
        "a": {"class_path": "some.Class", "init_args": {"b": "1"}}
    }
    both = {"class_path": "other.Class", "init_args": {"b": "1", "c": "2"}}
    assert read("--a=some.Class", "--a.b=1", "--a=other.Class", "--a.c=2") == {"a": both}
    same = {"class_path": "some.Class", "init_args": {"b": "1"}}
    assert read("--a={class_path: some.Class}", "--a.b=1", "--a=some.Class") == {"a": same}


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
