"""What a run lost and gained, counted and written down."""

import json
from pathlib import Path

import pytest

from lrcompress.errors import ReportError
from lrcompress.report import LayerRecord, PointRecord, Report
from lrcompress.report.record import sum_or_none

from .conftest import factorized, pruned, searched

FACTORED = LayerRecord("a", 10, 20, 4, 0.25, 0.125, "a note")
DENSE = LayerRecord("b", 10, 20, None, 0.0, 0.0)


def point(*layers: LayerRecord) -> PointRecord:
    return PointRecord("kfac", 7, list(layers), 1000, 700, {"steps": 3}, 1.5)


def test_parameters_are_counted_before_and_after() -> None:
    assert (FACTORED.before, FACTORED.after) == (200, 4 * 30)
    assert (DENSE.before, DENSE.after) == (200, 200)


def test_keep_is_what_remains_of_all_targeted_layers() -> None:
    assert point(FACTORED, DENSE).keep == 320 / 400


def test_a_point_is_printed_in_a_line() -> None:
    one = point(FACTORED, DENSE)
    said = (
        "kfac: 2 layers keep 0.800 of their parameters, the model 0.700; predicted change of the "
        "loss +0.1250"
    )
    assert str(one) == said
    one.note = "as asked"
    assert str(one) == f"{said}; as asked"
    unknown = str(point(LayerRecord("c", 2, 2, 1, 0.5, None)))
    assert "predicted" not in unknown


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


def test_every_entry_comes_back_from_a_file(whole: Report, tmp_path: Path) -> None:
    whole.save(tmp_path / "report.json")
    assert Report.load(tmp_path) == Report.load(tmp_path / "report.json") == whole


def test_zeros_that_are_stored_count_apart() -> None:
    layer = LayerRecord("a", 10, 20, 4, None, None, rows=3, entries=41)
    assert (layer.after, layer.stored) == (4 * 30 + 41, 4 * 30 + 3 * 20)
    assert DENSE.stored == DENSE.after == 200


def test_several_callbacks_have_one_report(whole: Report) -> None:
    first = Report([factorized()], {"acc": 0.9}, {"dense": 0.3, "factored": 0.2})
    times = {"dense": 0.35, "pruning": 0.25, "factored": 0.1}
    second = Report([pruned()], {"acc": 0.9}, times)
    joined = Report.joined([Report(), second, first])
    assert [point.method for point in joined.points] == ["kfac", "LoSparse"]
    assert joined.seconds_per_step == {"dense": 0.3, "pruning": 0.25, "factored": 0.1}
    assert Report.joined([Report(), first]) is first
    assert Report.joined([]) == Report()
    before, between, end = (joined.layers_after(i) for i in (-1, 0, 1))
    assert [layer.rank for layer in before] == [None] * 6
    assert [layer.rank for layer in between] == [4] * 4 + [None] * 2
    assert [layer.rank for layer in end] == [4] * 4 + [2] * 2


def test_points_at_one_step_follow_each_other_as_their_callbacks_do() -> None:
    def record(step: int, before: int, after: int) -> PointRecord:
        return PointRecord("kfac", step, [DENSE], before, after)

    one = Report([record(10, 900, 800), record(20, 800, 700)])
    other = Report([record(5, 1000, 900), record(20, 700, 600)])
    joined = Report.joined([one, other])
    assert [(p.step, p.model_before) for p in joined.points] == [
        (5, 1000),
        (10, 900),
        (20, 800),
        (20, 700),
    ]
    assert joined.points[-1].model_after == 600


def test_the_share_of_the_model_is_that_of_the_one_before_the_first_change() -> None:
    assert point(FACTORED).figures()["keep_model"] == 0.7
    assert point(FACTORED).figures(1400)["keep_model"] == 0.5


def test_a_history_keeps_the_last_of_those_that_are_too_near() -> None:
    report = Report()
    for step in range(0, 101, 2):
        report.note(step, {"loss": float(step)}, gap=10)
    report.note(100, {"loss": 7.0}, gap=10)
    steps = [step for step, _ in report.history["loss"]]
    assert all(third - first >= 10 for first, third in zip(steps, steps[2:], strict=False))
    assert 10 < len(steps) < 20
    assert report.history["loss"][-1] == (100, 7.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"this is no report: expected a mapping with points, got '\[1\]'"),
        ('{"version": 3}', "expected a report of version 1 to 2, got 3"),
        ('{"points": []}', r"this is no report: KeyError\('final'\)"),
        ('{"points": [{"layers": []}], "final": {}, "seconds_per_step": {}}', "is no report"),
        ('{"points": [7], "final": {}, "seconds_per_step": {}}', "this is no report: TypeError"),
        ('{"poin', "report.json cannot be read as a report: Unterminated string"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ReportError, match=message):
        Report.load(tmp_path)


def test_a_report_that_is_not_there_is_named(tmp_path: Path) -> None:
    below = tmp_path / "logs" / "version_0" / "report.json"
    below.parent.mkdir(parents=True)
    below.write_text("{}")
    with pytest.raises(ReportError, match=r"no such report; below it: .*version_0.report.json"):
        Report.load(tmp_path)
    with pytest.raises(ReportError, match=r"none.json: there is no such report$"):
        Report.load(tmp_path / "none.json")
    with pytest.raises(ReportError, match="a point without layers"):
        Report.from_dict(
            {
                **Report([point(FACTORED)]).to_dict(),
                "points": [{**point(FACTORED).__dict__, "layers": []}],
            }
        )


def test_what_was_tried_comes_back_from_a_file(tmp_path: Path) -> None:
    report = Report([searched()])
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path) == report
    assert "NaN" not in (tmp_path / "report.json").read_text()
