"""Formatting of values, types and names for error messages."""

import re
import sys
from collections.abc import Iterable, Iterator
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lrcompress.errors import nearest


def shown(value: Any) -> str:
    """Return a value as a message shows it, cut to 80 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def nearest_of(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that lists the nearest valid names; empty if none are known.

    Example:
        >>> nearest_of("kep", ["keep", "at"])
        '; nearest valid: keep'
    """
    names = nearest(name, known)
    return f"; nearest valid: {names}" if names else ""


def nearest_class(path: str, bases: tuple[type, ...]) -> str:
    """Return the end of a message that gives the paths of the nearest subclasses."""
    known = {cls.__name__: _public_path(cls) for cls in subclasses_of(bases)}
    if not known:
        return ""
    names = nearest(path.rpartition(".")[2], known).split(", ")
    return f"; nearest valid: {', '.join(known[name] for name in names)}"


def subclasses_of(bases: Iterable[type]) -> Iterator[type]:
    """Yield every public class that is imported and derives from one of the bases."""
    for base in bases:
        subclasses: list[type] = base.__subclasses__()
        for cls in subclasses:
            if not cls.__name__.startswith("_"):
                yield cls
            yield from subclasses_of([cls])


def _public_path(cls: type) -> str:
    """Return the shortest path under which a class can be imported from its own packages."""
    parts = cls.__module__.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    homes = [name for name in modules if getattr(sys.modules.get(name), cls.__name__, None) is cls]
    return f"{(homes or modules)[0]}.{cls.__name__}"


def _members(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in {Union, UnionType}:
        for member in get_args(hint):
            yield from _members(member)
    else:
        yield hint


def classes_in(hint: Any) -> Iterator[type]:
    """Yield the classes of which a recipe may give an instance for this type."""
    for member in _members(hint):
        if get_origin(member) is Literal:
            continue
        for inner in get_args(member):
            yield from classes_in(inner)
        if _is_class(member) and member.__module__.split(".")[0] not in sys.stdlib_module_names:
            yield member


def _is_class(hint: Any) -> bool:
    return isinstance(hint, type) and not get_args(hint) and not issubclass(hint, Enum)


def choices_in(hint: Any) -> list[str]:
    """Return the strings of which a value must be one, if the type lists any."""
    literals = [get_args(member) for member in _members(hint) if get_origin(member) is Literal]
    return [choice for choices in literals for choice in choices if isinstance(choice, str)]


def in_words(hint: Any) -> str:
    """Return a type as a message names it.

    Example:
        >>> in_words(list[int] | Literal["auto"] | None)
        "list[int] or 'auto' or null"
    """
    return " or ".join(_word(member) for member in _members(hint))


def _word(member: Any) -> str:
    if get_origin(member) is Literal:
        return " or ".join(repr(choice) for choice in get_args(member))
    if member is NoneType:
        return "null"
    if isinstance(member, type) and not get_args(member):
        return member.__name__
    return re.sub(r"\b(?:\w+\.)+", "", str(member))  # list[lightning.Callback] without the module
