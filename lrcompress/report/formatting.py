"""Format numbers, for terminal tables and the HTML page, and text for any console."""

import codecs

PLAIN = "lrcompress.plain"  # an error handler of codecs: plain characters for those that lack
_PLAIN = {"→": "->", "×": "x", "–": "-", "−": "-", "…": "."}


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in lacking), error.end


codecs.register_error(PLAIN, _plain)


def printable(text: str, encoding: str) -> str:
    """Return text with other characters in place of those that an encoding does not have.

    Example:
        >>> printable("64×128 → 64×8, ½", "ascii")
        '64x128 -> 64x8, ?'
    """
    return text.encode(encoding, PLAIN).decode(encoding)


def number(value: float | None) -> str:
    """Return a number as text: integers in full, others to four places.

    Example:
        >>> [number(x) for x in (1234567, 0.25, 0.00012345, 12.0, None)]
        ['1,234,567', '0.2500', '1.23e-04', '12.0000', '']
    """
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:,.4f}"


def count(value: int) -> str:
    """Return a number of parameters in the unit that a reader would say.

    Example:
        >>> [count(x) for x in (950, 48_200, 7_012_345, 8_030_000_000)]
        ['950', '48.2 k', '7.01 M', '8.03 B']
    """
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return str(value)


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds, the two largest of them.

    Example:
        >>> [duration(x) for x in (0.4, 61, 3_725.0)]
        ['0 s', '1 min 1 s', '1 h 2 min']
    """
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (whole, "s")]
    first = next((i for i, (number, _) in enumerate(parts) if number), 2)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2])


def change(value: float | None) -> str:
    """Return a difference with its sign.

    Example:
        >>> change(0.5), change(-0.00001), change(None)
        ('+0.5000', '-1.00e-05', '')
    """
    return "" if value is None else f"{'+' if value >= 0 else ''}{number(float(value))}"


def share(value: float) -> str:
    """Return a share of a whole.

    Example:
        >>> share(0.3)
        '0.300'
    """
    return f"{value:.3f}"


def mebibytes(value: int | None) -> str:
    """Return bytes in MiB.

    Example:
        >>> mebibytes(3 * 2**19), mebibytes(None)
        ('1.50', '')
    """
    return "" if value is None else f"{value / 2**20:,.2f}"
