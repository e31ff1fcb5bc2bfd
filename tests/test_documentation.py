"""Documentation: its code runs, its links lead somewhere, its sentences are short."""

import csv
import functools
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer

from lrcompress.cli import main
from lrcompress.cli.bench import _parser as bench_parser
from lrcompress.cli.export import _checked as check_export
from lrcompress.cli.guide import FOLDER
from lrcompress.cli.report import _parser as report_parser
from lrcompress.errors import SettingError, ShapeError
from lrcompress.nn import KINDS
from lrcompress.objective import METHODS
from lrcompress.schedules import Point
from lrcompress.statistics.masks import batch_mask
from lrcompress.tasks import TextClassification, TextData

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    RECIPES / "README.md",
    ROOT / "tests" / "benchmarks" / "README.md",
    *sorted(FOLDER.glob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
GENERATED = re.compile(r"<!-- architectures -->.*<!-- end of architectures -->", re.DOTALL)
OF_RECIPES = {"fit", "validate", "test", "plan", "factor"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_blocks(*languages: str) -> Any:
    found = [page for page in PAGES if any(blocks(page, one) for one in languages)]
    return pytest.mark.parametrize("page", found, ids=name_of)


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    return GENERATED.sub("", BLOCK.sub("", page.read_text()))


@each_page
def test_blocks_are_of_a_language_that_is_checked(page: Path) -> None:
    kinds = {kind for kind, _ in BLOCK.findall(page.read_text())}
    assert kinds <= {"python", "yaml", "bash", "text"}
    assert page.read_text().count("```") == 2 * len(BLOCK.findall(page.read_text()))


def given(folder: Path, written: Path) -> dict[str, Any]:
    """What a reader has: a module, its data and what else blocks do not say themselves."""
    module = TextClassification(str(folder), num_labels=2)
    batch = {"input_ids": torch.randint(5, 40, (8, 6)), "attention_mask": torch.ones(8, 6).long()}
    batch["labels"] = batch["input_ids"][:, 0] % 2
    columns = TensorDataset(*batch.values())
    return {
        "module": module,
        "data": TextData(str(folder), ["sentence"], "label", train=str(written), max_length=16),
        "model": module.model,
        "loader": DataLoader(columns, batch_size=4, shuffle=True),
        "batches": [batch],
        "loss": lambda model, one: model(**one).loss,
        "tokenizer": AutoTokenizer.from_pretrained(folder),
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a reader: with the repository's recipes, one of them his own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(RECIPES)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    shutil.copy(RECIPES / "quickstart.yaml", "recipe.yaml")
    rows = [f"a {word} film\t{label}" for label, word in enumerate(("dull", "good"))] * 8
    for name in ("train", "dev"):
        Path(f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return tmp_path


@with_blocks("python")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_python_blocks_run_one_after_the_other(page: Path, here: Path, tiny_bert: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    with patch.dict(METHODS), patch.dict(cast("dict[str, Any]", KINDS)):  # examples add to them
        for block in blocks(page, "python"):
            names |= given(tiny_bert, here / "train.tsv")
            exec(compile(block, name_of(page), "exec"), names)


@with_blocks("yaml")
def test_yaml_blocks_are_recipes_or_parts_of_one(
    page: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = yaml.safe_load(Path("recipe.yaml").read_text())
    for block in blocks(page, "yaml"):
        part = yaml.safe_load(block)
        assert part.keys() <= whole.keys()
        Path("one.yaml").write_text(yaml.safe_dump(whole | part))
        check_recipe("fit", "--config", "one.yaml")


@with_blocks("bash")
def test_commands_exist_and_have_these_options(page: Path, here: Path) -> None:
    for block in blocks(page, "bash"):
        for words in commands(block):
            check_command(words)


def commands(block: str) -> Iterator[list[str]]:
    for line in block.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            if words := shlex.split(command, comments=True):
                yield words


def check_command(words: list[str]) -> None:
    first, *rest = words
    if first == "torchrun" and "-m" in words:
        first, *rest = words[words.index("-m") + 1 :]
    if first == "lrcompress":
        check_verb(*rest)
    elif first == "pip":
        check_install(rest)
    elif first in ("python", "sbatch", "torchrun"):
        check_script(rest)
    elif first == "pytest":
        assert all((ROOT / word).exists() for word in rest if word[0] != "-"), words
    else:
        assert first in ("ruff", "mypy", "pre-commit", "sphinx-build", ".ci/run"), words


def check_verb(verb: str, *options: str) -> None:
    if verb in OF_RECIPES:
        check_recipe(verb, *options)
    elif verb == "export":
        check_export([*options])
    elif verb in ("bench", "report"):
        (bench_parser if verb == "bench" else report_parser)().parse_args(options)
    else:
        assert main([verb, *options]) == 0


@functools.cache
def check_recipe(verb: str, *options: str) -> None:
    with pytest.raises(SystemExit) as ended:  # after the recipe was read and checked
        main([verb, *options, "--print_config"])
    assert ended.value.code == 0


def check_install(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [extra for word in words for extra in re.findall(r"\[(\w+)\]", word)]
    assert words[0] == "install"
    assert {*asked} <= extras["optional-dependencies"].keys()
    assert all((ROOT / word).is_file() for word in words if word.endswith(".txt"))


def check_script(words: list[str]) -> None:
    """The script, or the module after -m, is there; it has the options after it."""
    if words[0] == "-m":
        script = ROOT / f"{words[1].replace('.', '/')}.py"
        options = words[2:]
    else:
        at = next(number for number, word in enumerate(words) if word[0] != "-")
        script, options = ROOT / words[at], words[at + 1 :]
    text = script.read_text()
    for option in options:
        name = option.partition("=")[0]
        assert name[:2] != "--" or f'"{name}"' in text or name in text, option
        assert not name.startswith("recipes/") or (ROOT / name).is_file(), option


def slugs(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), target
        assert not anchor or anchor in slugs(to), target
        if page.parent == FOLDER:
            assert to.is_relative_to(FOLDER), f"{target}: the guide stands alone in a wheel"


@each_page
def test_sentences_are_short(page: Path) -> None:
    text = LINK.sub("link", re.sub(r"`[^`]*`", "code", prose(page)))
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#"))]
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:[*-]|\d\.) ", "\n".join(lines))
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.!?])\s", paragraph):
            assert len(sentence.split()) <= 35, sentence


def test_messages_in_troubleshooting_are_those_of_the_package() -> None:
    text = "".join(path.read_text() for path in (ROOT / "lrcompress").rglob("*.py"))
    source = re.sub(r"\{[^{}\n]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", text))
    page = prose(FOLDER / "troubleshooting.md").replace("\n", " ")
    told = re.findall(r"  `([^`]+)`[^`]*?:", page)
    parts = [part.strip(" ,") for message in told for part in message.split("…")]
    torchs = {"Missing key(s) in state_dict"}
    assert len(parts) > 20
    missing = {*parts} - torchs - {part for part in parts if part in source}
    assert not missing, sorted(missing)


def test_what_ends_a_run_before_it_began_is_in_troubleshooting() -> None:
    page = prose(FOLDER / "troubleshooting.md").replace("\n", " ")
    ids = torch.zeros(2, 3)
    with pytest.raises(ShapeError) as of_axes:
        batch_mask((ids, ids[0]), 1, "Factorize")
    with pytest.raises(SettingError) as of_end:
        Point.parse("step:9").step(9, 3)
    _, missing = batch_mask((ids,), "real", "Factorize")
    said = {
        "mask must be (examples, length) or": str(of_axes.value),
        "leaves padding out by the batch's": str(missing),
        "at or beyond the end of training": str(of_end.value),
    }
    for words, message in said.items():
        assert words in message
        assert any(words in told for told in re.findall(r"  `([^`]+)`[^`]*?:", page))


def test_the_figure_and_its_data_are_those_of_the_table() -> None:
    folder = ROOT / "tests" / "benchmarks"
    drawn = runpy.run_path(str(folder / "figure.py"))["drawn"]
    assert (folder / "accuracy.svg").read_text() == drawn()
    section = (folder / "README.md").read_text().split("\n## ")[1]
    told = [re.findall(r"[\w.–]+", line) for line in section.splitlines()]
    cells = {(row[0], row[1]): row[2:14] for row in told if row[1:2] in (["global"], ["uniform"])}
    places = [(0.5, "before"), (0.3, "before"), (0.2, "before"), (0.1, "before")]
    places += [(0.3, "after"), (0.1, "after")]
    with (folder / "methods.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] != "dense"]
    for row in rows:
        at = places.index((float(row["keep"]), row["training"])) + 6 * (row["task"] == "mrpc")
        assert cells[row["method"], row["ranks"]][at] == row["accuracy"], row
    assert len(rows) > 80


def test_the_readme_is_two_screens_long() -> None:
    words = re.findall(r"\w[^\s|]*", prose(ROOT / "README.md"))
    assert len(words) <= 900
