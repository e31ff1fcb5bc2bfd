"""``lrcompress report``: the page of one run, or several runs side by side."""

import argparse
from pathlib import Path
from typing import NoReturn

import rich
from typing_extensions import override

from lrcompress.errors import RecipeError, ReportError
from lrcompress.report import Report
from lrcompress.report.comparison import side_by_side, write_comparison
from lrcompress.report.page import write_page
from lrcompress.report.tables import columns_table, summary_table


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; {self.format_usage().strip()}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("lrcompress report", allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="report.json or its folder")
    parser.add_argument("--out", type=Path, help="the page to write")
    return parser


def report(options: list[str]) -> None:
    """Write a page and print a table of the reports of some runs.

    Args:
        options: of the command line, after ``report``.

    Raises:
        RecipeError: if an option is wrong.
        ReportError: if a report cannot be read, or its run reached no point.
    """
    given = _parser().parse_args(options)
    reports = {name: Report.load(path) for name, path in _named(given.runs).items()}
    for name, one in reports.items():
        if not one.points:
            raise ReportError(f"{name}: the run reached no point, so there is nothing to show")
    if len(reports) == 1:
        (path,), (one,) = map(Path, given.runs), reports.values()
        beside = path / "report.html" if path.is_dir() else path.with_suffix(".html")
        page = given.out or beside
        write_page(one, page)
        rich.print(summary_table(one))
    else:
        page = given.out or Path("comparison.html")
        write_comparison(reports, page)
        table = side_by_side(reports)
        rich.print(columns_table("lrcompress: runs side by side", table.headings, table.rows))
    rich.print(f"the page is {page}")


def _named(runs: list[str]) -> dict[str, Path]:
    """Return the runs by what their paths do not share, so that names are short and unlike."""
    paths = [Path(run) for run in dict.fromkeys(runs)]
    folders = [path.parent if path.name == "report.json" else path for path in paths]
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return {"/".join(p[-depth:]): path for p, path in zip(parts, paths, strict=True)}
