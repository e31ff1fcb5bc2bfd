"""The modes of schedule-free optimizers; what becomes of their state is tested in neighbours."""

import pytest
import schedulefree
import torch
from torch import nn

from lrcompress.structure.schedule_free import (
    averaged,
    begin_averages_,
    is_schedule_free,
    unknown_schedule_free,
)


def stepped() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = schedulefree.AdamWScheduleFree([parameter], lr=0.1)
    optimizer.train()
    for _ in range(3):
        parameter.grad = torch.randn(3, 2)
        optimizer.step()
    return parameter, optimizer


def test_the_mode_of_before_is_restored_after_an_error_and_after_hooks() -> None:
    _, optimizer = stepped()

    def fail() -> None:
        with averaged([optimizer]):
            assert not optimizer.param_groups[0]["train_mode"]
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail()
    assert optimizer.param_groups[0]["train_mode"]
    optimizer.eval()
    with averaged([optimizer]):
        optimizer.train()
    assert not optimizer.param_groups[0]["train_mode"]


def test_averages_begin_with_the_parameters() -> None:
    parameter, optimizer = stepped()
    with pytest.raises(RuntimeError, match="averages begin within averaged"):
        begin_averages_([optimizer])
    with averaged([optimizer]):
        average = parameter.detach().clone()
        begin_averages_([optimizer])
    torch.testing.assert_close(parameter.detach(), average)  # in training mode too
    assert optimizer.state[parameter]["z"].equal(average)


def test_others_are_left_as_they_are() -> None:
    parameter = nn.Parameter(torch.ones(3))
    plain = torch.optim.SGD([parameter], lr=0.1)
    with averaged([plain]):
        begin_averages_([plain])
    assert not is_schedule_free(plain)
    assert not unknown_schedule_free(plain)
    assert unknown_schedule_free(schedulefree.ScheduleFreeWrapper(plain))
