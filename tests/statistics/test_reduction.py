"""Reducing statistics, as far as one process can tell; tests/test_distributed.py has four."""

import pytest
import torch

from lrcompress.distributed import ONE_PROCESS
from lrcompress.statistics.moments import KINDS, Statistics, Sums, shapes
from lrcompress.statistics.reduction import _buckets, all_reduce_, reduce_to_first_, reduced_bytes


def statistics() -> Statistics:
    torch.manual_seed(0)
    made = Sums.zeros(shapes(KINDS, 150, 70))
    for value in made.values.values():
        value.copy_(torch.randn(value.shape))
    return Statistics(inputs={"a": made}, source={"a": "a"}, steps=2, skipped=1, tokens=9)


@pytest.mark.parametrize("bucket", [1, 100, 1000, 1 << 20])
def test_buckets_hold_every_value_that_counts_once(bucket: int) -> None:
    one, other = statistics(), statistics()
    for value in other.inputs["a"].values.values():
        value.zero_()
    total = 0
    pairs = (_buckets([x.inputs["a"]], bucket) for x in (one, other))
    for parts, empty in zip(*pairs, strict=True):
        size = sum(part.numel() for part in parts)
        assert size <= bucket
        total += 4 * size
        for part, place in zip(parts, empty, strict=True):
            place.copy_(part)
    assert total + 8 * 3 == reduced_bytes(one)
    for kind, value in one.inputs["a"].values.items():
        assert torch.equal(other.inputs["a"].values[kind], value)


def test_the_bytes_are_those_of_one_triangle() -> None:
    sums = Sums.zeros(shapes(["input_moment"], 600, 1))  # five block rows, the last of 88
    rows = 128 * (600 + 472 + 344 + 216) + 88 * 88
    assert reduced_bytes(Statistics(inputs={"a": sums})) == 4 * (rows + 600) + 24


def test_one_process_keeps_what_it_has() -> None:
    one, other = statistics(), statistics()
    all_reduce_(one, ONE_PROCESS)
    reduce_to_first_(one, ONE_PROCESS)
    assert one.steps == 2
    assert torch.equal(
        one.inputs["a"].values["input_moment"], other.inputs["a"].values["input_moment"]
    )
    one.clear_()
    assert not one.inputs
    assert not one.source
    assert (one.steps, one.skipped, one.tokens) == (0, 0, 0)
