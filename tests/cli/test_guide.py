"""``lrcompress guide``: pages and topics that there are not."""

import subprocess
import sys

import pytest

from lrcompress.cli import main
from lrcompress.cli.guide import FOLDER, sections, topics


def test_every_topic_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"concepts", "factorize", "troubleshooting"} <= {*topics()}
    for topic in topics():
        assert main(["guide", topic]) == 0
        assert capsys.readouterr().out == (FOLDER / f"{topic}.md").read_text()


def test_without_a_topic_the_contents_name_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guide"]) == 0
    contents = capsys.readouterr().out
    assert [topic for topic in topics() if f"[{topic}]({topic}.md)" not in contents] == []
    assert main(["guide", "--help"]) == 0
    assert ", ".join(topics()) in capsys.readouterr().out


def test_an_unknown_topic_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guide", "factorise"]) == 1
    assert "no page 'factorise', and no page has it; nearest: factorize" in capsys.readouterr().err
    assert main(["guide", "concepts", "resume"]) == 2
    said = capsys.readouterr().err
    assert "expected one topic or none, got 2" in said
    assert 'lrcompress guide "concepts resume"' in said


def test_nothing_is_called_near_that_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guide", "xyz"]) == 1
    said = capsys.readouterr().err
    assert f"no page 'xyz', and no page has it; its pages: {', '.join(topics())}" in said
    assert "nearest" not in said
    assert main(["guide", "?"]) == 1
    assert "nearest" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "places"),
    [
        ("glossary", ["concepts Concepts and glossary", "concepts Glossary"]),
        ("Mask", ["troubleshooting Masks", "your-module Batches and padding masks"]),
        ("mask", ["concepts Glossary, mask"]),
        ("resume a run", ["resume Resume, load, and what happens when a run is killed"]),
        ("killed run", ["resume When a run is killed, or the disk is full"]),
        ("platon", ["losparse Options"]),  # of no heading
    ],
)
def test_words_are_found_in_headings_and_else_in_pages(
    words: str, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["guide", words]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"no page is named {words!r}; it stands in\n\n")
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert [place for place in places if place not in lines] == []


def test_a_topic_may_be_written_as_the_class_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guide", "LoSparse"]) == 0
    assert capsys.readouterr().out == (FOLDER / "losparse.md").read_text()


def test_a_comment_of_a_code_block_is_no_heading_and_long_lists_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not [x for x in sections() if x.heading.startswith(("pip", "!"))]
    assert {x.topic for x in sections()} == {*topics()}
    assert main(["guide", "layers"]) == 0
    assert "troubleshooting Layers and patterns" in " ".join(capsys.readouterr().out.split())
    assert main(["guide", "are"]) == 0  # of many texts
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 17
    assert " more\n" in said


@pytest.mark.parametrize(
    "words", [["guide"], ["guide", "resume"], ["guide", "glossary"], ["--help"], ["--version"]]
)
def test_reading_waits_for_no_library(words: list[str]) -> None:
    """Importing torch, Lightning and transformers takes seconds."""
    ask = f"import sys; from lrcompress.cli import main; main({words}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    loaded = {*done.stdout.splitlines()[-1].split()}
    assert "lrcompress.cli" in loaded
    heavy = {"torch", "lightning", "transformers", "datasets", "jsonargparse", "matplotlib", "rich"}
    assert not heavy & loaded
