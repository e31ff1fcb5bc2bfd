"""Sums that live elsewhere than what is added; waits are in tests/accelerator/test_costs.py."""

import pytest
import torch

from lrcompress.linalg import packed_shape, symmetric
from lrcompress.statistics.offload import Arrival, add_offloaded_gram_, settle_


def test_what_is_there_already_is_added_at_once() -> None:
    total, arriving = torch.zeros(packed_shape(3)), []
    x = torch.randn(5, 3)
    add_offloaded_gram_(total, x, 2.0, arriving)
    torch.testing.assert_close(symmetric(total), 4 * x.mT @ x)
    assert arriving == []


def test_what_has_arrived_is_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.zeros(2)
    arriving = [Arrival(total, torch.full((2,), float(i)), torch.device("cpu")) for i in (1, 2)]
    waited: list[object] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for _ in range(2):
        settle_([arriving, []])
    assert total.tolist() == [3.0, 3.0]
    assert waited == [torch.device("cpu")]  # the device of both


def test_a_sum_that_is_nowhere_takes_no_memory() -> None:
    total, arriving = torch.zeros(packed_shape(3), device="meta"), []
    add_offloaded_gram_(total, torch.randn(5, 3), 1.0, arriving)
    assert total.is_meta
    assert arriving == []
