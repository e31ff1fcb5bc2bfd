"""``lrcompress guide``: a page of the guide, as it stands in the package."""

import sys
from pathlib import Path

import lrcompress
from lrcompress.errors import NoMatchError, RecipeError, nearest

FOLDER = Path(lrcompress.__file__).parent / "guide"
CONTENTS = "README"
USAGE = "lrcompress guide [TOPIC]"


def guide(options: list[str]) -> None:
    """Print a page of the guide, by default its contents.

    Args:
        options: of the command line, after ``guide``: nothing or a topic.

    Raises:
        RecipeError: if there are more.
        NoMatchError: if there is no such topic.
    """
    if len(options) > 1:
        raise RecipeError(f"expected one topic or none, got {len(options)}; usage: {USAGE}")
    if {"-h", "--help"} & {*options}:
        sys.stdout.write(f"usage: {USAGE}\n\n  TOPIC: {', '.join(topics())}\n")
        return
    topic = options[0] if options else CONTENTS
    if topic not in (*topics(), CONTENTS):
        raise NoMatchError(
            f"the guide has no page {topic!r}; nearest: {nearest(topic, topics())}; "
            f"all of them: {', '.join(topics())}"
        )
    sys.stdout.write((FOLDER / f"{topic}.md").read_text(encoding="utf-8"))


def topics() -> list[str]:
    """Return the names of all pages but the contents."""
    return sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != CONTENTS)
