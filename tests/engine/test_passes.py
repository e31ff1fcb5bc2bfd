"""Further passes run alike, and leave the random numbers of training alone."""

import pytest
import torch
from torch import Tensor, nn

from lrcompress.engine.passes import Passes, random_state_kept
from lrcompress.errors import SettingError

Batch = Tensor


def drawn(passes_over: list[Batch]) -> tuple[Passes, list[Tensor]]:
    seen: list[Tensor] = []

    def run(model: nn.Module, batch: Batch) -> None:
        seen.append(model(batch))

    return Passes(passes_over, run, lambda _: (None, None, None)), seen


def test_dropout_drops_the_same_each_time_and_training_goes_on_as_if_there_had_been_no_pass() -> (
    None
):
    model, batch = nn.Dropout(0.5), torch.ones(64)
    passes, seen = drawn([batch])
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    for _ in range(2):
        passes.run_alike(model, batch)
        torch.rand(1)
    torch.manual_seed(3)
    passes.run_alike(model, batch)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert 0 < int((seen[0] == 0).sum()) < 64
    assert torch.equal(torch.rand(4), wanted)


def test_random_numbers_are_given_back_when_the_block_fails() -> None:
    def failing() -> None:
        with random_state_kept(model):
            torch.rand(1)
            raise KeyError

    model = nn.Linear(2, 2)
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with pytest.raises(KeyError):
        failing()
    assert torch.equal(torch.rand(4), wanted)


def test_an_iterator_cannot_be_gone_through_again() -> None:
    with pytest.raises(SettingError, match="an iterator and can be gone through once; give a list"):
        drawn(iter([torch.ones(2)]))  # type: ignore[arg-type]
