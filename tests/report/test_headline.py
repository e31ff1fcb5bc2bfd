"""The headline: figures of the record, as ratios."""

from dataclasses import replace

import pytest

from lrcompress.report import Report
from lrcompress.report.headline import Fact, headline
from lrcompress.report.summary import final_figures

from .conftest import factorized


def facts(report: Report) -> dict[str, Fact]:
    return {fact.what: fact for fact in headline(report)}


def test_ratios_are_those_of_the_record(whole: Report) -> None:
    found = facts(whole)
    first, last = whole.points[0], whole.points[-1]
    assert (first.model_before, last.model_after) == (1000, 500)
    size = found["parameters of the whole model"]
    assert (size.figure, size.detail) == ("−50 %", "1 k → 500")
    layers = found["parameters of the 6 targeted layers"]  # 1,200 before, 4 × 120 + 2 × 60 + 71
    assert (layers.figure, layers.detail) == ("−44 %", "1.2 k → 671")
    assert found["a training step"].figure == "1.50 × faster"
    assert found["val_loss"].figure == "0.5000 → 0.4500"
    assert found["acc"].figure == "0.9000 → 0.8800"
    assert found["acc"].detail == "before, after less training → at the end"


def test_what_got_slower_or_was_not_measured_says_so() -> None:
    slow = Report([factorized(metrics={})], {"acc": 0.9}, {"dense": 0.2, "factored": 0.25})
    found = facts(slow)
    assert found["a training step"].figure == "1.25 × slower"
    assert "acc" not in found  # nothing to hold it against
    unknown = facts(Report([factorized(bytes_before=None)]))
    assert not {"a training step", "MiB of memory for the weights"} & unknown.keys()


@pytest.mark.parametrize("step", [60, 90])
def test_figures_that_are_not_of_the_end_say_when(step: int) -> None:
    report = Report([factorized()], {}, {}, {"acc": ((20, 0.85), (step, 0.88))})
    assert final_figures(report)[0] == f"at {step}"
    assert facts(report)["acc"].detail == f"before, after less training → at {step}"


def test_a_second_fit_counts_from_what_stood_there() -> None:
    point = factorized(model_before=700, model_after=600)
    point.layers[:] = [replace(x, stood=160) for x in point.layers]
    found = facts(Report([point]))
    assert found["parameters of the 4 targeted layers"].detail == "640 → 480"
    assert found["parameters of the whole model"].figure == "−14 %"
