"""What was tried is read back as it was, and said in words."""

import json
from dataclasses import asdict

from lrcompress.report.trials import (
    LatencyRecord,
    LatencyTrial,
    SearchRecord,
    TrialRecord,
    latency_from,
    search_from,
)

MET = LatencyRecord(0.5, 0.49, (4, 128), 0.2, (LatencyTrial(0.5, 0.6), LatencyTrial(0.4, 0.49)))


def test_records_come_back_from_json() -> None:
    trials = (
        TrialRecord(0.5, 0.49, 0.8, 0.1, True),
        TrialRecord(0.4, 0.4, None, None, False, 0.25),
    )
    search = SearchRecord("val_accuracy", "max", 0.9, 0.1, 0.2, 0.9, 0.5, trials)
    assert search_from(json.loads(json.dumps(asdict(search)))) == search
    assert latency_from(json.loads(json.dumps(asdict(MET)))) == MET
    assert search_from(None) is latency_from(None) is None


def test_a_latency_is_said_to_be_met_or_missed() -> None:
    assert MET.note == (
        "the model takes 0.49 of its time before, measured on a batch of 4 × 128, for latency=0.5"
    )
    missed = LatencyRecord(0.2, 0.31, (4,), 0.2)
    assert missed.note == (
        "latency=0.2 is missed: the model takes 0.31 of its time before, measured on a batch of 4"
    )


def test_a_latency_that_cannot_be_reached_is_said_with_the_nearest() -> None:
    trials = LatencyTrial(0.6, 0.7), LatencyTrial(0.05, 0.31)
    left = LatencyRecord(0.2, 0.31, (4,), 0.2, trials, taken=False)
    assert left.note == (
        "latency=0.2 cannot be reached, and the layers stay as they were: with the least sizes, "
        "0.050 of the parameters, the model takes 0.31 of its time before, measured on a batch of "
        "4; nearest: latency=0.32"
    )
    slower = LatencyRecord(0.2, 1.1, (4,), 0.2, (LatencyTrial(0.05, 1.1),), taken=False)
    assert slower.note.endswith("measured on a batch of 4; give keep= in place of it")
    data = asdict(MET)
    del data["taken"]  # as reports of before have it
    assert latency_from(data) == MET
