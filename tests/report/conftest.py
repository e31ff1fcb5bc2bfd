"""A run in which every entry of a report is there, and no two numbers are the same."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from lrcompress.report import LayerRecord, PointRecord, Report
from lrcompress.report.trials import SearchRecord, TrialRecord

NAMES = [f"model.layer.{block}.{kind}" for block in range(2) for kind in ("up", "down")]


def factorized(**others: Any) -> PointRecord:
    curve = ((1, 0.9), (4, 0.5), (8, 0.0))
    layers = [
        LayerRecord(name, 10, 20, 4, 0.2, 0.3, f"note on {name}", None, None, 0.1, curve)
        for name in NAMES
    ]
    figures = {"before": {"val_loss": 0.5, "acc": 0.9}, "after": {"val_loss": 0.7, "acc": 0.8}}
    observed = {"steps": 12, "tokens": 34567, "skipped": 1, "bytes": 2**20}
    given = {"metrics": figures, "observed": observed, "bytes_before": 4000, "bytes_after": 3000}
    sizes = {"layers": layers, "model_before": 1000, "model_after": 800}
    return PointRecord("kfac", 40, **(sizes | given | others))


def searched() -> PointRecord:
    trials = (
        TrialRecord(0.3, 0.297, 0.9, 0.0099, within=True, share=0.25),
        TrialRecord(0.5, 0.496, 0.915, -0.0051, within=True),
        TrialRecord(0.25, 0.248, None, None, within=False),
        TrialRecord(0.37, 0.361, 0.8931, 0.0168, within=True),
    )
    return factorized(search=SearchRecord("acc", "max", 0.9099, 0.01, 0.0201, 0.9098, 0.37, trials))


def pruned(**others: Any) -> PointRecord:
    scores = ((1, 0.9), (5, 0.2), (10, 0.01))
    layers = [
        LayerRecord(f"model.layer.{i}.out", 10, 20, 2, None, None, "", 3, 35 + i, importance=scores)
        for i in range(2)
    ]
    budget = ((50, 0.9), (60, 0.6))
    given = {"budget": budget, "bytes_before": 4000, "bytes_after": 2000, "seconds": 1.5}
    return PointRecord("LoSparse", 80, layers, 1000, 500, **(given | others))


@pytest.fixture
def whole() -> Report:
    return complete()


def complete() -> Report:
    history = {"val_loss": ((20, 0.6), (90, 0.45)), "acc": ((20, 0.85), (90, 0.88))}
    seconds = {"dense": 0.3, "pruning": 0.25, "factored": 0.2}
    return Report([factorized(), pruned()], {"val_loss": 0.45, "acc": 0.88}, seconds, history)


@pytest.fixture
def distinct() -> Callable[[Report], tuple[Report, list[float]]]:
    """The same report with a number of its own in every place, and these numbers."""

    def fill(report: Report) -> tuple[Report, list[float]]:
        numbers: list[float] = []
        whole, parts = itertools.count(1001), itertools.count(1001)

        def put(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: put(held) for key, held in value.items()}
            if isinstance(value, list | tuple):
                return [put(held) for held in value]
            if value is None or isinstance(value, str | bool):
                return value
            numbers.append(next(whole) if isinstance(value, int) else next(parts) / 1e4)
            return numbers[-1]

        data = {key: put(v) for key, v in report.to_dict().items() if key != "version"}
        return Report.from_dict({"version": 2, **data}), numbers

    return fill
