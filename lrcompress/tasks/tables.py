"""Tables of text: reading local files, and picking columns by name or position."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    List,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from lrcompress.errors import NoMatchError, SettingError, nearest

TEXT = (Value("string"), Value("large_string"))
WORDS = tuple(List(value) for value in TEXT)
DELIMITERS = {".csv": ",", ".tsv": "\t"}
READERS = {
    ".json": Dataset.from_json,
    ".jsonl": Dataset.from_json,
    ".parquet": Dataset.from_parquet,
    ".txt": partial(Dataset.from_text, keep_linebreaks=True),
}


def read_table(file: str, header: bool = True, quoting: bool | None = None) -> Dataset:
    """Return the rows of a local file; those of CSV and TSV are all text, "NA" included.

    Args:
        file: ``.csv``, ``.tsv``, ``.json``, ``.jsonl``, ``.parquet``, or ``.txt``, whose lines
            are the rows of a column ``text``; UTF-8, with or without a byte order mark.
        header: whether the first line of a CSV or TSV names the columns; otherwise they are
            named "0", "1", ….
        quoting: whether a CSV or TSV puts fields in double quotes; by default a CSV does and
            a TSV does not.

    Raises:
        NoMatchError: if there is no such file.
        SettingError: if the extension is unknown, or the file is empty or ragged.
    """
    path = Path(file).expanduser()
    known = (*DELIMITERS, *READERS)
    if path.suffix not in known:
        raise SettingError(
            f"{file}: unknown extension {path.suffix!r}; expected {', '.join(known)}; "
            f"nearest: {nearest(path.suffix, known, count=1)}"
        )
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*") if p.is_file()]
        near = nearest(path.name, siblings) or (
            "none" if path.parent.is_dir() else "none, nor its folder"
        )
        raise NoMatchError(f"there is no file {path.absolute()}; nearest there: {near}")
    if path.stat().st_size == 0:
        raise SettingError(f"{file} is empty")
    if path.suffix in READERS:
        with quiet():
            table = READERS[path.suffix](str(path))
    else:
        table = _read_delimited(path, header, path.suffix == ".csv" if quoting is None else quoting)
    if len(table) == 0:
        raise SettingError(f"{file} has no rows")
    return table


def _read_delimited(path: Path, header: bool, quoting: bool) -> Dataset:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(
            lines,
            delimiter=DELIMITERS[path.suffix],
            quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        )
        rows: list[list[str]] = []
        for row in filter(None, reader):
            if rows and len(row) != len(rows[0]):
                raise SettingError(
                    f"{path}, line {reader.line_num}: expected {len(rows[0])} fields as in the "
                    f"first line, got {len(row)}; is quoting={quoting} right?"
                )
            rows.append(row)
    if len(rows) <= header:
        return Dataset.from_dict({})
    names = rows.pop(0) if header else [str(i) for i in range(len(rows[0]))]
    if len(set(names)) < len(names):
        raise SettingError(f"{path}: columns {names} are not all different; is header=True right?")
    columns = zip(*rows, strict=True)
    return Dataset.from_dict(
        {name: list(column) for name, column in zip(names, columns, strict=True)}
    )


def pick_columns(
    table: Dataset,
    text: Sequence[int | str],
    label: int | str,
    where: str,
    kinds: Sequence[Any] = TEXT,
) -> Dataset:
    """Return a table of the columns ``text``, with a second one ``pair``, and ``label``.

    Args:
        table: has the columns.
        text: one or two columns of text, by name or by position from 0.
        label: the column of labels.
        where: the file or data set, for messages.
        kinds: what the columns of text may hold.

    Raises:
        NoMatchError: if there is no such column.
        SettingError: if a column is named twice, holds anything else, or misses values.
    """
    names = [_column(table, column, where) for column in (*text, label)]
    if len(set(names)) < len(names):
        raise SettingError(f"{where}: text and label must be different columns, got {names}")
    for name in names[:-1]:
        if table.features[name] not in kinds:
            raise SettingError(
                f"{where}: column {name!r} holds {table.features[name]}, expected "
                f"{'text' if kinds is TEXT else 'lists of words'}"
            )
    for name in names:
        empty = ("", None) if name == names[-1] else (None,)
        missing = [row for row, value in enumerate(table[name]) if value in empty or value != value]
        if missing:
            raise SettingError(
                f"{where}: column {name!r} misses {len(missing)} of {len(table)} values, the first "
                f"in row {missing[0]} (from 0)"
            )
    roles = ["text", "pair", "label"] if len(text) == 2 else ["text", "label"]
    return table.select_columns(names).rename_columns(dict(zip(names, roles, strict=True)))


def _column(table: Dataset, column: int | str, where: str) -> str:
    names: list[str] = table.column_names
    if isinstance(column, int):
        if not 0 <= column < len(names):
            raise NoMatchError(
                f"{where}: no column at position {column}, only 0 to {len(names) - 1}: {names}"
            )
        return names[column]
    if column not in names:
        first_row = ""
        if where.endswith(tuple(DELIMITERS)):
            first_row = "; if these are the first row's values, set header: false and give columns "
            first_row += "by position"
        raise NoMatchError(
            f"{where}: no column {column!r}; choose among those there are: {names}, "
            f"nearest: {nearest(column, names, 1)}{first_row}"
        )
    return column


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of ``datasets`` while the block runs."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
