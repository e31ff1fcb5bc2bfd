"""Before, after and at the end: what the figures are taken from."""

from dataclasses import replace

from lrcompress.report import LayerRecord, Report
from lrcompress.report.summary import final_figures, summary

from .conftest import factorized, pruned


def rows(report: Report) -> dict[str, list[str]]:
    found = summary(report)
    assert all(len(cells) == len(found.headings) for _, cells in found.rows)
    return {label: cells for label, cells in found.rows if label != "  kept"}


def test_layers_of_several_callbacks_are_counted_together(whole: Report) -> None:
    found = rows(whole)
    dense, after = 6 * 200, 4 * 120 + 2 * 200
    end = 4 * 120 + 2 * 60 + 35 + 36
    assert found["targeted parameters, not zero"] == [f"{n:,}" for n in (dense, after, end, end)]
    stored = 4 * 120 + 2 * 120
    assert found["… stored"] == [f"{n:,}" for n in (dense, after, stored, stored)]
    assert found["all parameters, stored"] == ["1,000", "800", "500", "500"]
    assert found["size, MiB"] == ["0.00", "0.00", "0.00", "0.00"]
    assert summary(whole).headings == ["before", "after, at 40", "after, at 80", "at the end"]


def test_metrics_and_times_stand_where_they_were_taken(whole: Report) -> None:
    found = rows(whole)
    assert found["val_loss"] == ["0.5000", "0.7000", "", "0.4500"]
    assert found["measured change of val_loss"] == ["", "+0.2000", "", "-0.0500"]
    assert "predicted change of loss" not in found
    assert found["seconds per step"] == ["0.3000", "", "", "0.2000"]
    assert found["… while pruning"] == ["", "", "0.2500", ""]


def test_the_end_is_the_last_validation_after_the_last_point() -> None:
    report = Report([factorized()], {}, {}, {"val_loss": ((40, 0.5), (60, 0.4)), "x": ((40, 1.0),)})
    assert final_figures(report) == ("at 60", {"val_loss": 0.4})
    assert rows(report)["val_loss"] == ["0.5000", "0.7000", "0.4000"]
    assert not summary(report).notes


def test_a_prediction_stands_where_nothing_was_measured(whole: Report) -> None:
    whole.points[0].metrics = {}
    assert rows(whole)["predicted change of loss"] == ["", "+1.2000", "", ""]
    assert summary(whole).notes[-1].startswith("predicted: of the training loss")


def test_a_run_that_was_not_validated_after_its_last_point_says_so() -> None:
    report = Report([factorized()], {}, {}, {"val_loss": ((40, 0.5),)})
    assert rows(report)["val_loss"] == ["0.5000", "0.7000", ""]
    assert summary(report).notes[0] == "not validated after the last point"


def test_layers_left_dense_are_counted_apart_from_the_model_before() -> None:
    point = pruned()
    point.layers.append(LayerRecord("model.layer.2.out", 10, 20, None, 0.0, 0.0))
    assert "1 of the targeted layers is left dense" in summary(Report([point])).notes
    point.layers.append(LayerRecord("model.layer.3.out", 10, 20, None, 0.0, 0.0))
    assert "2 of the targeted layers are left dense" in summary(Report([point])).notes


def test_a_second_fit_counts_from_the_model_that_it_began_with() -> None:
    point = factorized(model_before=700, model_after=600, bytes_before=2800, bytes_after=2400)
    point.layers[:] = [replace(x, stood=160) for x in point.layers]
    report = Report([point])
    found = [cells for _, cells in summary(report).rows][:4]
    sizes = [f"{4 * 160:,}", f"{4 * 120:,}", f"{4 * 120:,}"]
    assert found[0] == sizes
    assert found[1] == ["0.800", "0.600", "0.600"]  # of the dense weights, as keep is
    assert found[2:] == [["700", "600", "600"], ["1.000", "0.857", "0.857"]]
    assert summary(report).notes[0] == "not validated after the last point"
    assert not [note for note in summary(report).notes if "dense" in note]
