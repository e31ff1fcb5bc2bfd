"""How long a run is, and where its points lie, whatever makes its epochs differ."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

import lrcompress
from lrcompress.callbacks.trainer_state import run_lengths
from lrcompress.nn import LowRankLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:.*GradientAccumulationScheduler.*"),
]
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"align": 1, "verbose": False, "validate": False, "report_path": None}


class Looks(L.Callback):
    """Notes how long the run is thought to be, and before which step layers are factored."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.lengths = run_lengths(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, *_: object
    ) -> None:
        factored = any(isinstance(m, LowRankLinear) for m in module.modules())
        if factored and not hasattr(self, "first"):
            self.first = trainer.global_step


class Endless(IterableDataset[Any]):
    """Batches without a length."""

    def __init__(self, batches: list[Any], num: int) -> None:
        self.batches, self.num = batches, num

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.num):
            yield self.batches[number % len(self.batches)]


@pytest.mark.parametrize(
    ("scheduling", "at", "steps", "total"),
    [
        ({0: 3}, 0.5, 4, 8),  # 6 batches an epoch, 4 epochs
        ({0: 1, 1: 2, 3: 6}, 0.5, 6, 13),  # 6 + 3 + 3 + 1 steps
        ({0: 1, 1: 2, 3: 6}, "epoch:2", 9, 13),
        ({2: 4}, "epoch:3", 14, 16),  # of 4 batches, then of the two that are left
    ],
)
def test_a_point_lies_where_accumulation_puts_it(
    scheduling: dict[int, int],
    at: float | str,
    steps: int,
    total: int,
    tagger: Make,
    loader: Make,
    trainer: Make,
) -> None:
    looks, factorize = Looks(), lrcompress.Factorize(0.4, at, **QUIET)
    scheduler = GradientAccumulationScheduler(scheduling)
    run = trainer(factorize, looks, scheduler, max_epochs=4)
    run.fit(tagger(), loader())
    assert looks.lengths[0] == run.global_step == total
    assert [point.step for point in factorize.report.points] == [steps]
    assert looks.first == steps


def test_max_steps_and_accumulation_go_together(tagger: Make, loader: Make, trainer: Make) -> None:
    looks, factorize = Looks(), lrcompress.Factorize(0.4, 0.5, **QUIET)
    scheduler = GradientAccumulationScheduler({1: 2})
    run = trainer(factorize, looks, scheduler, max_epochs=None, max_steps=10)
    run.fit(tagger(), loader())
    assert looks.lengths[0] == run.global_step == 10
    assert [point.step for point in factorize.report.points] == [5]


@pytest.mark.parametrize(
    ("options", "limits", "steps"),
    [
        ({"at": "step:10", "window": "step:5"}, {"max_epochs": 3}, 10),
        ({"at": 0.5}, {"max_steps": 40, "max_epochs": None}, 20),  # the default window
        ({"at": "step:10"}, {"max_epochs": -1, "max_steps": 15}, 10),
        ({"at": "step:10", "restart_steps": 0.2}, {"max_epochs": 3}, 10),
    ],
)
def test_data_without_a_length_needs_none_where_a_step_or_max_steps_says_it(
    options: dict[str, Any],
    limits: dict[str, Any],
    steps: int,
    tagger: Make,
    batches: Make,
    trainer: Make,
) -> None:
    factorize = lrcompress.Factorize(0.4, **options, **QUIET)
    data = DataLoader(Endless(batches(), 8), batch_size=None)
    module = tagger()
    trainer(factorize, **limits).fit(module, data)
    (point,) = factorize.report.points
    assert point.step == steps
    assert point.observed["steps"] >= 1
    assert isinstance(module.blocks[0]["up"], LowRankLinear)


def test_losparse_needs_no_length_where_its_phases_are_steps(
    tagger: Make, batches: Make, trainer: Make
) -> None:
    losparse = lrcompress.LoSparse(
        0.5, prune_from="step:3", prune_until="step:8", verbose=False, report_path=None
    )
    data = DataLoader(Endless(batches(), 8), batch_size=None)
    trainer(losparse, max_epochs=3).fit(tagger(), data)
    assert [point.step for point in losparse.report.points] == [8]
