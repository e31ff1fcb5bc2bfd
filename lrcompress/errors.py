"""Every exception this package raises.

    LRCompressError
    ├── ShapeError        arguments that do not fit together            (ValueError)
    ├── SettingError      an argument outside what it may be            (ValueError)
    ├── NotFiniteError    a NaN or an infinity reached a solver         (ArithmeticError)
    ├── NoMatchError      a pattern or a name that matches nothing      (LookupError)
    ├── LayerError        a layer that cannot be observed or factored   (TypeError)
    ├── ObservationError  statistics that are missing or contradictory  (RuntimeError)
    ├── PlatformError     a trainer, strategy or callback in the way    (RuntimeError)
    ├── CheckpointError   a file that does not hold what was expected   (RuntimeError)
    ├── ExportError       an export that cannot be made, or differs     (RuntimeError)
    ├── ReportError       a report that cannot be read                  (RuntimeError)
    └── RecipeError       a recipe that cannot be read, all its errors  (ValueError)

Each message says what was expected, what was found, and where it was found.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class LRCompressError(Exception):
    """The base of every exception this package raises."""


class ShapeError(LRCompressError, ValueError):
    """Arguments whose shapes do not fit together."""


class SettingError(LRCompressError, ValueError):
    """An argument outside the values it may take."""


class NotFiniteError(LRCompressError, ArithmeticError):
    """A NaN or an infinity reached a solver."""


class NoMatchError(LRCompressError, LookupError):
    """A pattern or a name that matches nothing."""


class LayerError(LRCompressError, TypeError):
    """A layer that cannot be observed or factored."""


class ObservationError(LRCompressError, RuntimeError):
    """Statistics that are missing, empty or contradict each other."""


class PlatformError(LRCompressError, RuntimeError):
    """A trainer, strategy or other callback that this one cannot work with."""


class CheckpointError(LRCompressError, RuntimeError):
    """A checkpoint that does not hold what was expected."""


class ExportError(LRCompressError, RuntimeError):
    """A model that cannot be exported, or an export that computes something else."""


class ReportError(LRCompressError, RuntimeError):
    """A report that cannot be read."""


class RecipeError(LRCompressError, ValueError):
    """A recipe that cannot be read; the message lists all its errors."""


@contextmanager
def naming_layer(name: str) -> Iterator[None]:
    """Say of a NaN or an infinity in the block which layer it is of.

    Raises:
        NotFiniteError: that of the block, with the name.
    """
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"layer {name!r}: {error}") from error


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return the known names closest to ``name``, comma separated, for an error message.

    Args:
        name: what was given.
        known: the valid names; the first of them are returned if none is close.
        count: at most so many.

    Example:
        >>> nearest("kfca", ["svd", "kfac", "drone"])
        'kfac'
    """
    names = list(known)
    found = get_close_matches(name, names, n=count, cutoff=0.4) or names[:count]
    return ", ".join(found)


def nearest_hint(given: object, known: Iterable[object]) -> str:
    """Return, for a message, the valid value that is spelt most nearly so; "" where none is near.

    Example:
        >>> nearest_hint("pivot", ["balanced", "pivoted"]), nearest_hint("rows", ["balanced"])
        ("; nearest: 'pivoted'", '')
    """
    words = [x for x in known if isinstance(x, str)]
    found = get_close_matches(str(given).lower(), words, n=1)
    return f"; nearest: {found[0]!r}" if found else ""


def share_hint(given: object) -> str:
    """Return, for a message, the share that was meant by a percentage; "" where none was.

    Example:
        >>> share_hint(30), share_hint("30 %"), share_hint(-1)
        ('; did you mean 0.3?', '; did you mean 0.3?', '')
    """
    text = str(given).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return ""
    meant = 2 <= number <= 100 or (text.endswith("%") and 0 < number <= 100)
    return f"; did you mean {number / 100:g}?" if meant else ""
