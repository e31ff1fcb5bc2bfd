"""State of few bits goes through a change of parameters, and stays of few bits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao import optim

from lrcompress.structure.low_bit_state import is_low_bit, plain
from lrcompress.structure.surgery import carry_dense, swap_parameters_, unknown_state

OUT, IN, RANK = 128, 96, 48  # smaller ones have ordinary state
KINDS: dict[str, tuple[Callable[..., Any], float]] = {
    "8 bit": (optim.AdamW8bit, 0.1),  # relative error of the moments
    "4 bit": (optim.AdamW4bit, 0.5),
    "fp8": (optim.AdamWFp8, 0.1),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.compiler.set_stance("force_eager"):
        yield


def stepped(kind: str) -> tuple[nn.Parameter, Any]:
    weight = nn.Parameter(torch.randn(OUT, IN))
    optimizer = KINDS[kind][0]([weight], lr=0.01)
    for _ in range(3):
        weight.grad = torch.randn(OUT, IN)
        optimizer.step()
    return weight, optimizer


@each_kind
@pytest.mark.parametrize("rank", [RANK, 5])
def test_moments_are_carried_and_training_goes_on(kind: str, rank: int) -> None:
    weight, optimizer = stepped(kind)
    assert is_low_bit(optimizer.state[weight]["exp_avg"])
    assert unknown_state(optimizer, [weight]) == []
    before = {key: plain(value) for key, value in optimizer.state[weight].items()}
    left, right = (nn.Parameter(torch.randn(*s)) for s in ((OUT, rank), (rank, IN)))
    swap_parameters_([optimizer], [weight], [right, left], carry_dense(left, right, False))

    assert weight not in optimizer.state
    first, second = (optimizer.state[right][key] for key in ("exp_avg", "exp_avg_sq"))
    assert is_low_bit(first) == is_low_bit(second) == (rank == RANK)
    assert relative(plain(first), left.detach().mT @ before["exp_avg"]) < KINDS[kind][1]
    assert float(plain(second).min()) >= 0
    assert float(optimizer.state[left]["step"]) == 3
    for parameter in (left, right):
        parameter.grad = torch.randn_like(parameter)
        was = parameter.detach().clone()
        optimizer.step()
        assert 0 < float((parameter.detach() - was).abs().max()) < 0.1


def relative(found: Tensor, value: Tensor) -> float:
    return float((found - value).norm() / value.norm())
