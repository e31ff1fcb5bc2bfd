"""Labels as the numbers a loss takes: class ids, or floats for regression."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lrcompress.errors import SettingError, nearest


def label_ids(labels: Iterable[Any]) -> dict[str, int]:
    """Return the class id of every label, keyed by the label as text.

    Whole numbers that start at 0 are ids already. All other labels are numbered in sorted
    order, numbers by value and anything else by its text.

    Example:
        >>> label_ids(["pos", "neg", "pos"]), label_ids([5, 1, 3]), label_ids(["0", "2"])
        ({'neg': 0, 'pos': 1}, {'1': 0, '3': 1, '5': 2}, {'0': 0, '2': 2})
    """
    names = {str(label) for label in labels}
    try:
        ordered = sorted(names, key=int)
    except ValueError:
        ordered = sorted(names)
    if ordered[0] == "0" and all(name.isdecimal() for name in ordered):
        return {name: int(name) for name in ordered}
    return {name: i for i, name in enumerate(ordered)}


def class_labels(labels: Iterable[Any], ids: Mapping[str, int], where: str) -> list[int]:
    """Return the class id of each label.

    Raises:
        SettingError: if a label is not in ``ids``; the message begins with ``where``.
    """
    names = [str(label) for label in labels]
    unknown = sorted(set(names) - set(ids))
    if unknown:
        raise SettingError(
            f"{where}: label {unknown[0]!r} is not among the {len(ids)} training labels; "
            f"nearest: {nearest(unknown[0], ids)} (-1 often stands for labels kept secret)"
        )
    return [ids[name] for name in names]


def float_labels(labels: Iterable[Any], where: str) -> list[float]:
    """Return the labels as floats.

    Raises:
        SettingError: if a label is no finite number.
    """
    numbers = []
    for row, label in enumerate(labels):
        try:
            number = float(label)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SettingError(
                f"{where}: regression needs numbers as labels, got {label!r} in row {row} (from 0)"
            )
        numbers.append(number)
    return numbers
