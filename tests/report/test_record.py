"""What a run lost and gained, counted and written down."""

import json
from pathlib import Path

import pytest

from lrcompress.report import LayerRecord, PointRecord, Report
from lrcompress.report.record import sum_or_none

FACTORED = LayerRecord("a", 10, 20, 4, 0.25, 0.125, "a note")
DENSE = LayerRecord("b", 10, 20, None, 0.0, 0.0)


def point(*layers: LayerRecord) -> PointRecord:
    return PointRecord("kfac", 7, list(layers), 1000, 700, {"steps": 3}, 1.5)


def test_parameters_are_counted_before_and_after() -> None:
    assert (FACTORED.before, FACTORED.after) == (200, 4 * 30)
    assert (DENSE.before, DENSE.after) == (200, 200)


def test_keep_is_what_remains_of_all_targeted_layers() -> None:
    assert point(FACTORED, DENSE).keep == 320 / 400


def test_the_predicted_loss_is_the_sum_unless_a_part_is_unknown() -> None:
    assert point(FACTORED, FACTORED, DENSE).predicted_loss == 0.25
    assert point(FACTORED, LayerRecord("c", 2, 2, 1, 0.5, None)).predicted_loss is None
    assert sum_or_none([]) == 0


@pytest.fixture
def report() -> Report:
    one, two = point(FACTORED, DENSE), point(FACTORED)
    one.metrics = {"before": {"val_loss": 0.5}, "after": {"val_loss": 0.7}}
    return Report([one, two], {"val_loss": 0.4}, {"dense": 0.1, "factored": 0.05})


def test_a_report_comes_back_from_json(report: Report) -> None:
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert Report.from_dict(Report().to_dict()) == Report()


def test_a_report_is_saved_as_json(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert text.endswith("}\n")
    assert Report.from_dict(json.loads(text)) == report
