"""A block that fails leaves layers, gradients and optimizers as they were."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from lrcompress.nn import LowRankLinear
from lrcompress.structure.surgery import carry_later, replace_, swap_parameters_
from lrcompress.structure.transaction import all_or_nothing, undone


def trained() -> tuple[nn.Sequential, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def replace_first_(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    old = model[0]
    assert isinstance(old, nn.Linear)
    new = LowRankLinear.in_place_of(old, 2)
    replace_(model, "0", new)
    fresh = (new.right.weight, new.left.weight)
    swap_parameters_([optimizer], [old.weight], fresh, carry_later(fresh))
    with torch.no_grad():
        old.bias.add_(1)


def replace_and_fail_(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    with all_or_nothing(model, ["0"], [optimizer]) as put_away:
        replace_first_(model, optimizer)
        put_away(["0"])
        raise RuntimeError("failed")


def test_a_failure_puts_everything_back() -> None:
    model, optimizer = trained()
    before = copy.deepcopy(model.state_dict())
    slopes: list[Any] = [p.grad for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    old = model[0]
    with pytest.raises(RuntimeError, match="failed"):
        replace_and_fail_(model, optimizer)
    assert model[0] is old
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is g for p, g in zip(model.parameters(), slopes, strict=True))
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_a_block_that_ends_stays() -> None:
    model, optimizer = trained()
    with all_or_nothing(model, ["0"], [optimizer]) as put_away:
        replace_first_(model, optimizer)
        put_away(["0"])
    assert isinstance(model[0], LowRankLinear)
    assert all(p in optimizer.state for p in model.parameters())


def test_a_block_on_trial_is_undone_however_it_ends() -> None:
    model, optimizer = trained()
    before, layers = copy.deepcopy(model.state_dict()), list(model)
    held = copy.deepcopy(optimizer.state_dict())
    for failure in (None, RuntimeError("failed")):
        caught = nullcontext() if failure is None else pytest.raises(RuntimeError, match="failed")
        with caught, undone(model, ["0"]) as put_away:
            replace_(model, "0", LowRankLinear.in_place_of(model[0], 2))
            with torch.no_grad():
                layers[0].bias.add_(1)
            put_away(["0"])
            if failure:
                raise failure
        assert list(model) == layers
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
    torch.testing.assert_close(optimizer.state_dict(), held, rtol=0, atol=0)
