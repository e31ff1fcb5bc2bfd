"""Learning rates that rise again, by one callback or by several."""

import csv
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

import lrcompress
from lrcompress.callbacks.warmup import _RATES, LearningRateWarmup
from lrcompress.schedules import Warmup


class Noting(torch.optim.SGD):
    """SGD that notes the rate of each step."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(2, requires_grad=True)], lr=0.1)
        self.taken: list[float] = []

    def step(self, closure: None = None) -> None:
        self.taken.append(self.param_groups[0]["lr"])


def test_a_rate_is_put_back_after_each_step_whatever_restarts_there_are() -> None:
    optimizer = Noting()
    first, second = LearningRateWarmup(Warmup(4, 1.0)), LearningRateWarmup(Warmup(2, 0.5))
    with ExitStack() as one:
        first.attach([optimizer], one)
        optimizer.step()
        with ExitStack() as other:
            second.attach([optimizer], other)
            for _ in range(3):
                optimizer.step()
                assert optimizer.param_groups[0]["lr"] == 0.1
        optimizer.step()
    optimizer.step()
    rises = [0.25, 0.5 * 0.5, 0.5 * 0.75, 0.5 * 1.0, 1.0, 1.0]  # scales multiply, the lowest rise
    assert optimizer.taken == pytest.approx([0.1 * rise for rise in rises])
    assert (first.taken, second.taken) == (5, 3)
    assert not _RATES
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_steps_are_those_of_the_first_optimizer() -> None:
    optimizers = [Noting(), Noting()]
    restart = LearningRateWarmup(Warmup(2, 1.0))
    with ExitStack() as stack:
        restart.attach(optimizers, stack)
        for number in (1, 0, 1, 0):
            optimizers[number].step()
    assert restart.taken == 2
    assert [optimizer.taken for optimizer in optimizers] == [[0.05, 0.1], [0.05, 0.1]]


class NotingAdamW(torch.optim.AdamW):
    """AdamW that notes the rate of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.taken: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.taken.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
@pytest.mark.parametrize("interval", ["step", None])
def test_a_monitor_logs_the_rates_that_steps_are_made_with(
    interval: str | None,
    tagger: Callable[..., Any],
    loader: Callable[..., Any],
    trainer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
    restart = {"restart_steps": 4, "restart_scale": 0.5}
    callback = lrcompress.Factorize(0.5, at="step:8", every_n_steps=2, **restart, **options)
    monitor, logger = LearningRateMonitor(interval), CSVLogger(tmp_path)
    run = trainer(callback, monitor, logger=logger, log_every_n_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", NotingAdamW)
        run.fit(tagger(), loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    name = "lr-NotingAdamW/pg1"
    logged = {int(row["step"]): float(row[name]) for row in rows if row[name]}
    scale = [1.0] * 8 + [0.125, 0.25, 0.375] + [0.5] * 7
    expected = [0.01 * 0.97**step * factor for step, factor in enumerate(scale)]
    assert [logged[step] for step in range(18)] == pytest.approx(expected)
    assert run.optimizers[0].taken == pytest.approx(expected)
    assert not {"on_train_batch_start", "on_train_epoch_start"} & vars(monitor).keys()
    assert not _RATES
