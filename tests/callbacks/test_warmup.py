"""Learning rates that rise again, by one callback or by several."""

from contextlib import ExitStack

import pytest
import torch

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
