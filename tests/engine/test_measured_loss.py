"""What `compress` measures: the mean loss of its batches, before and after."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompress import Report, compress
from lrcompress.report.record import PointRecord
from lrcompress.report.summary import PREDICTED, summary

Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def batches() -> list[Batch]:
    """Of several sizes."""
    return [(torch.randn(n, 8), torch.randint(3, (n,))) for n in (7, 3, 12)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def noisy(model: nn.Module, batch: Batch) -> Tensor:
    return loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))


def compressed(model: nn.Module, batches: Any, loss: Any = loss, **settings: Any) -> PointRecord:
    given = {"keep": 0.4, "mask": None, "examples": lambda batch: len(batch[0])} | settings
    return compress(model, batches, loss, **given)


def by_hand(model: nn.Module, batches: list[Batch]) -> float:
    """The mean over all examples at once, without dropout."""
    model = copy.deepcopy(model).eval()
    return loss(model, tuple(torch.cat(part) for part in zip(*batches, strict=True))).item()  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["kfac", "drone"])
def test_it_is_the_mean_over_all_examples_before_and_after(
    method: str, model: nn.Module, batches: list[Batch]
) -> None:
    before = by_hand(model, batches)
    record = compressed(model, batches, method=method)
    after = by_hand(model, batches)
    assert after != pytest.approx(before, rel=1e-3)
    assert record.metrics["before"] == {"observed_loss": pytest.approx(before, rel=1e-5)}
    assert record.metrics["after"] == {"observed_loss": pytest.approx(after, rel=1e-5)}
    assert f"loss of the observed batches {before:.4f} → {after:.4f}" in str(record)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_report_shows_it_in_place_of_what_was_predicted(
    model: nn.Module, batches: list[Batch]
) -> None:
    record = compressed(model, batches)
    rows = [label for label, _ in summary(Report([record])).rows]
    assert "measured change of observed_loss" in rows
    assert PREDICTED not in rows
    record.metrics = {}
    assert PREDICTED in [label for label, _ in summary(Report([record])).rows]


def test_the_model_is_the_same_as_where_nothing_is_measured(
    model: nn.Module, batches: list[Batch]
) -> None:
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    compressed(model, batches, noisy)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    record = compressed(other, iter(batches), noisy)
    assert torch.equal(torch.get_rng_state(), state)
    assert record.metrics == {}
    assert "predicted change of the loss" in str(record)
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize("wrapped", [False, True])
def test_both_times_batches_count_as_many_terms(
    wrapped: bool, model: nn.Module, batches: list[Batch]
) -> None:
    """Also where the loss's graph alone tells how many there are, for it has none afterwards."""

    class Pair:
        """A batch in which no tensor is found."""

        def __init__(self, batch: Batch) -> None:
            self.batch = batch

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch.batch if wrapped else batch)

    given = [Pair(batch) for batch in batches] if wrapped else batches
    compressed(model, given, loss_of, examples=None)
    record = compressed(model, given, loss_of, examples=None, keep=0.9)  # nothing to change
    assert record.metrics["before"] == pytest.approx(record.metrics["after"])


def test_nothing_is_measured_where_nothing_is_observed(
    model: nn.Module, batches: list[Batch]
) -> None:
    assert compressed(model, batches, method="svd").metrics == {}


def test_nothing_is_measured_where_a_batch_was_skipped(
    model: nn.Module, batches: list[Batch]
) -> None:
    batches[1][0][0] = torch.nan
    record = compressed(model, batches)
    assert record.observed["skipped"] == 1
    assert record.metrics == {}


def test_a_loss_that_fails_afterwards_is_a_note(model: nn.Module, batches: list[Batch]) -> None:
    def failing(of: nn.Module, batch: Batch) -> Tensor:
        if not isinstance(of[0], nn.Linear):  # type: ignore[index]
            raise ValueError("no such layer")
        return loss(of, batch)

    record = compressed(model, batches, failing)
    assert record.metrics == {}
    assert "its loss could not be measured: ValueError: no such layer" in record.note
    assert len(record.layers) == 2


def test_batches_may_come_in_another_order_and_are_read_twice(
    model: nn.Module, batches: list[Batch]
) -> None:
    begun = []  # a data loader draws random numbers, and starts workers, each time

    class Shuffled:
        def __iter__(self) -> Iterator[Batch]:
            begun.append(True)
            return iter([batches[i] for i in torch.randperm(3).tolist()])

    before = by_hand(model, batches)
    record = compressed(model, Shuffled())
    assert len(begun) == 2
    assert record.metrics["before"]["observed_loss"] == pytest.approx(before, rel=1e-5)
    assert record.metrics["after"]["observed_loss"] == pytest.approx(
        by_hand(model, batches), rel=1e-5
    )
