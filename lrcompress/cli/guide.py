"""``lrcompress guide``: a page of the guide, as it stands in the package, or which has a word."""

import re
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import lrcompress
from lrcompress.errors import NoMatchError, RecipeError

FOLDER = Path(lrcompress.__file__).parent / "guide"
CONTENTS = "README"
USAGE = "lrcompress guide [TOPIC]"
_NEAR = 0.7  # of letters, below which names are no misspelling of each other
_TERM = re.compile(r"^\| `?([\w -]+?)`? \|", re.MULTILINE)  # of a table, in its first column
_MOST = 12  # places that are listed


class Section(NamedTuple):
    """A part of a page."""

    topic: str
    heading: str
    text: str


def guide(options: list[str]) -> None:
    """Print a page of the guide, by default its contents, or which pages have the words given.

    Args:
        options: of the command line, after ``guide``: nothing, a topic, or words of a page.

    Raises:
        RecipeError: if there are more.
        NoMatchError: if there is no such topic, and no page has these words.
    """
    if len(options) > 1:
        raise RecipeError(
            f"expected one topic or none, got {len(options)}; usage: {USAGE}; put words to look "
            f'for in quotes: lrcompress guide "{" ".join(options)}"'
        )
    if {"-h", "--help"} & {*options}:
        sys.stdout.write(
            f"usage: {USAGE}\n\n  TOPIC: {', '.join(topics())};\n"
            "         or words, to see which pages have them\n"
        )
        return
    given = options[0] if options else CONTENTS
    topic = given if given == CONTENTS else given.lower()
    if topic in (*topics(), CONTENTS):
        sys.stdout.write((FOLDER / f"{topic}.md").read_text(encoding="utf-8"))
    else:
        sys.stdout.write(_places(given))


def topics() -> list[str]:
    """Return the names of all pages but the contents."""
    return sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != CONTENTS)


def sections() -> Iterator[Section]:
    """Yield the parts of all pages, each from its heading to the next."""
    for topic in topics():
        heading, lines, code = "", [""], False
        for line in (FOLDER / f"{topic}.md").read_text(encoding="utf-8").splitlines():
            code ^= line.startswith("```")
            if line.startswith("#") and not code:
                if heading:
                    yield Section(topic, heading, "\n".join(lines))
                heading, lines = line.lstrip("# "), []
            lines.append(line)
        yield Section(topic, heading, "\n".join(lines))


def _places(given: str) -> str:
    """Return which pages have words: in a heading or as a term, else in their text.

    Raises:
        NoMatchError: if none has; with what is spelt nearly so, where something is.
    """
    every = list(sections())
    found = [_line(x.topic, x.heading) for x in every if _has(x.heading, given)]
    found += [
        _line(x.topic, f"{x.heading}, {term}")
        for x in every
        for term in _TERM.findall(x.text)
        if x.heading == "Glossary" and _has(term, given)
    ]
    found = found or [_line(x.topic, x.heading) for x in every if _has(x.text, given)]
    if found:
        more = f"  … and {len(found) - _MOST} more\n" if len(found) > _MOST else ""
        return (
            f"no page is named {given!r}; it stands in\n\n{''.join(found[:_MOST])}{more}\n"
            "lrcompress guide TOPIC prints the page; TOPIC is the first word of a line\n"
        )
    near = _near(given, every)
    raise NoMatchError(
        f"the guide has no page {given!r}, and no page has it"
        + (f"; nearest: {', '.join(near)}" if near else "")
        + f"; its pages: {', '.join(topics())}"
    )


def _line(topic: str, heading: str) -> str:
    return f"  {topic:<16} {heading}\n"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _has(text: str, given: str) -> bool:
    """Return whether a text has all words given, or longer ones that begin with them."""
    there, asked = _words(text), _words(given)
    return bool(asked) and all(any(x.startswith(word) for x in there) for word in asked)


def _near(given: str, every: list[Section]) -> list[str]:
    """Return topics, and words of headings, that are spelt nearly so."""
    words = {word for x in every for word in _words(x.heading) if len(word) > 3}
    return get_close_matches(given.lower(), [*topics(), *sorted(words - {*topics()})], 3, _NEAR)
