"""``lrcompress guide``: pages and topics that there are not."""

import subprocess
import sys

import pytest

from lrcompress.cli import main
from lrcompress.cli.guide import FOLDER, topics


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
    assert "no page 'factorise'; nearest: factorize" in capsys.readouterr().err
    assert main(["guide", "concepts", "resume"]) == 2
    assert "expected one topic or none, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["guide"], ["guide", "resume"], ["--help"], ["--version"]])
def test_reading_waits_for_no_library(words: list[str]) -> None:
    """Importing torch, Lightning and transformers takes seconds."""
    ask = f"import sys; from lrcompress.cli import main; main({words}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    loaded = {*done.stdout.splitlines()[-1].split()}
    assert "lrcompress.cli" in loaded
    heavy = {"torch", "lightning", "transformers", "datasets", "jsonargparse", "matplotlib", "rich"}
    assert not heavy & loaded
