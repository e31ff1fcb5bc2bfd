"""Runs side by side: their figures, and the front of those that no other beats."""

from pathlib import Path

from lrcompress.report import Report
from lrcompress.report.comparison import front, fronts, side_by_side, write_comparison

from .conftest import factorized, pruned


def runs(whole: Report) -> dict[str, Report]:
    small = Report([pruned(metrics={"after": {"acc": 0.7}})], {"acc": 0.86}, {"factored": 0.1})
    return {"both": whole, "small": small}


def test_every_run_has_a_column_and_blanks_where_it_knows_nothing(whole: Report) -> None:
    table = side_by_side(runs(whole))
    found = dict(table.rows)
    assert table.headings == ["both", "small"]
    assert found["method"] == ["kfac, LoSparse", "LoSparse"]
    assert found["all parameters"] == ["500", "500"]
    assert found["acc at the end"] == ["0.8800", "0.8600 (−0.0200)"]
    assert found["  kept"] == ["0.500", "0.500"]
    assert found["acc just after"] == ["", "0.7000"]
    assert found["val_loss at the end"] == ["0.4500", ""]
    assert found["seconds per step, factored"] == ["0.2000", "0.1000 (−0.1000)"]


def test_what_was_run_is_told_as_far_as_it_differs(whole: Report) -> None:
    one, other = runs(whole).values()
    one.about = {"seed": "1", "model": "Tagger"}
    other.about = {"seed": "2", "model": "Tagger", "data": "Files"}
    found = dict(side_by_side({"a": one, "b": other}).rows)
    assert found["seed"] == ["1", "2"]
    assert found["data"] == ["", "Files"]
    assert "model" not in found


def test_a_figure_from_before_the_end_says_when() -> None:
    early = Report([factorized()], {}, {}, {"acc": ((60, 0.5),)})
    assert dict(side_by_side({"a": early}).rows)["acc at the end"] == ["0.5000 (at 60)"]


def test_the_front_is_what_no_other_run_beats_in_both() -> None:
    ends = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.9), (2.0, 0.7), (2.5, 0.6)]
    assert front(ends, more_is_better=True) == [(1.0, 0.5), (2.0, 0.9)]
    assert front(ends, more_is_better=False) == [(1.0, 0.5)]


def test_each_figure_has_its_front(whole: Report) -> None:
    loss, accuracy = fronts(runs(whole))
    assert (loss.title, accuracy.title) == ("val_loss against size", "acc against size")
    drawn = {str(line.get_label()): line for line in accuracy.figure.axes[0].lines}
    assert list(drawn["small"].get_xdata()) == [500 / 1e6]  # type: ignore[arg-type]
    assert list(drawn["small"].get_ydata()) == [0.86]  # type: ignore[arg-type]
    *_, dashed = accuracy.figure.axes[0].lines
    assert list(dashed.get_ydata()) == [0.88]  # type: ignore[arg-type]


def test_the_page_has_the_table_and_the_figures(whole: Report, tmp_path: Path) -> None:
    write_comparison(runs(whole), tmp_path / "new" / "page.html")
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    for _, cells in side_by_side(runs(whole)).rows:
        for cell in cells:
            assert f"<td>{cell}</td>" in text
