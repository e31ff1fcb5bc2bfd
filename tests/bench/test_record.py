"""Figures against their definitions."""

import json

import pytest

from lrcompress.bench import LayerTime, Run, Speed
from lrcompress.bench.record import ideal_speedup

FAST = LayerTime("fast", 4, 8, 1, 0.375, 2.0, 1.0, 0.5, 0.5)
SLOW = LayerTime("slow", 4, 8, 2, 0.75, 1.0, 1.5, 0.25, 1.5)


def test_a_speed_is_median_percentile_and_throughput() -> None:
    speed = Speed([float(x) for x in range(1, 102)], 4, 10, 20)
    assert (speed.median, speed.p95, speed.throughput) == (51.0, 96.0, 4 / 51)
    assert Speed([3.0], 1, None, None).p95 == 3.0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_ideal_is_amdahls(share: float) -> None:
    before, keep = 7.0, 0.2
    after = before * (1 - share) + before * share * keep
    assert ideal_speedup(share, keep) == pytest.approx(before / after)
    assert ideal_speedup(1.0 + share, keep) is None


def test_a_run_compares_time_with_the_ideal_and_names_slow_layers() -> None:
    speeds = {name: Speed([1.0], 2, None, None) for name in ("a", "b")}
    run = Run("eager", "cpu", 2, 8, speeds, faster=1.5, ideal=2.0, layers=[FAST, SLOW])
    assert run.share_of_ideal == 0.75
    assert run.slower == [SLOW]
    written = json.loads(json.dumps(run.to_dict()))
    assert written["layers"][1] == vars(SLOW)
    assert written["speeds"]["a"]["throughput"] == 2.0
    assert (written["batch"], written["share_of_ideal"]) == (2, 0.75)
    assert Run("eager", "cpu", 2, 8, speeds).share_of_ideal is None
