from pathlib import Path

import pytest

from lrcompress.errors import NoMatchError, SettingError
from lrcompress.tasks.docstring_source import docstring_splits, docstrings, mask_pattern, opening

SIZES = {"train": 8, "val": 2, "test": 2}
MODULE = '''"""Module {number} of {name} in {folder}, which says what functions there are in it."""

class Shape:
    """Shape {number} of {name} in {folder}, whose docstring is long enough to be taken.

    Args:
        corners: not taken.
    """

    async def area(self):
        """Short."""
'''


def make_library(root: Path, name: str, folders: int = 6, files: int = 2) -> None:
    for folder in [f"part{i}" for i in range(folders)] + ["tests", "_vendor/other"]:
        (root / name / folder).mkdir(parents=True)
        for number in range(files):
            text = MODULE.format(number=number, name=name.title(), folder=folder)
            (root / name / folder / f"module{number}.py").write_text(text)
    (root / name / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / name / "part0" / "python2.py").write_text("print 'no docstring'")


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("alphalib", "betalib"):
        make_library(tmp_path, name)
    monkeypatch.syspath_prepend(tmp_path)
    return ["alphalib", "betalib"]


def test_splits_are_balanced_and_never_share_a_folder(libraries: list[str]) -> None:
    splits = docstring_splits(libraries, SIZES)

    folders = {}
    for split, size in SIZES.items():
        labels = [label for _, label in splits[split]]
        assert {label: labels.count(label) for label in libraries} == dict.fromkeys(
            libraries, size // 2
        )
        folders[split] = {(label, text.split(" in ")[1][:5]) for text, label in splits[split]}
    assert not folders["train"] & folders["val"]
    assert not folders["train"] & folders["test"]
    assert not folders["val"] & folders["test"]


def test_no_text_occurs_twice_or_names_its_library(libraries: list[str]) -> None:
    texts = [
        text.lower() for rows in docstring_splits(libraries, SIZES).values() for text, _ in rows
    ]
    assert len(set(texts)) == len(texts)
    assert not any("alphalib" in text or "betalib" in text for text in texts)
    assert not any("tests" in text or "_vendor" in text for text in texts)


def test_the_order_of_the_file_system_does_not_matter(
    libraries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits, walk = docstring_splits(libraries, SIZES), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *args: reversed(list(walk(*args))))
    assert docstring_splits(libraries, SIZES) == splits


def test_sizes_that_do_not_divide_go_to_the_first(libraries: list[str]) -> None:
    splits = docstring_splits(libraries, {"train": 5, "val": 2, "test": 2})
    assert [label for _, label in splits["train"]] == ["alphalib"] * 3 + ["betalib"] * 2


def test_says_which_library_is_not_installed(libraries: list[str]) -> None:
    with pytest.raises(NoMatchError, match=r"'gammalib' is not installed .* or leave it out"):
        docstring_splits([*libraries, "gammalib"], SIZES)


def test_says_which_library_has_too_little(libraries: list[str]) -> None:
    with pytest.raises(SettingError, match=r"'alphalib' gave \d+ of 50 docstrings to train: lower"):
        docstring_splits(libraries, {"train": 100, "val": 2, "test": 2})


def test_what_one_library_lacks_the_others_give(libraries: list[str], tmp_path: Path) -> None:
    sizes = {"train": 36, "val": 12, "test": 12}
    make_library(tmp_path, "gammalib", folders=40)
    rows = docstring_splits(["alphalib", "gammalib"], sizes)
    assert {split: len(found) for split, found in rows.items()} == sizes
    labels = [label for _, label in rows["train"]]
    assert 9 <= labels.count("alphalib") < 18 < labels.count("gammalib")
    assert len({text for text, _ in rows["train"]}) == 36
    make_library(tmp_path, "deltalib", folders=12)
    with pytest.raises(SettingError, match=r"all libraries gave \d+ of 36 docstrings to train"):
        docstring_splits(["alphalib", "deltalib"], sizes)


def test_finds_docstrings_of_modules_classes_and_methods() -> None:
    found = docstrings(MODULE.format(number=1, name="x", folder="y"))
    assert [text.split()[0] for text in found] == ["Module", "Shape", "Short."]


def test_source_of_another_python_has_no_docstrings() -> None:
    assert docstrings("print 'x'") == []


def test_odd_escapes_in_other_peoples_source_are_no_warning() -> None:
    assert docstrings('"""A \\d digit."""') == ["A \\d digit."]


@pytest.mark.parametrize(
    "section", ["Parameters\n----------\na : int", ">>> f(1)\n1", ".. note:: x", "Returns:\n    1"]
)
def test_what_follows_the_prose_is_left_out(section: str) -> None:
    assert opening(f"One\nthing.\n\nMore.\n\n{section}") == "One thing. More."


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("PyTorch and torch.nn", "_ and _.nn"),
        ("pd.Series, nx and np", "_.Series, _ and _"),
        ("from_pandas", "from__"),
        ("input", "input"),
    ],
)
def test_masks_names_and_aliases(text: str, masked: str) -> None:
    assert mask_pattern([]).sub("_", text) == masked
