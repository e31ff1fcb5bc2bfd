"""Drawn labels, distillation losses and measured layers on the card, beside the CPU's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompress
from lrcompress.bench.latency_ranks import relative_time
from lrcompress.distill.functional import (
    relation_kl_divergence,
    relative_squared_error,
    soft_kl_divergence,
)
from lrcompress.nn import LowRankLinear
from lrcompress.statistics.fisher import _drawn, drawn_loss


def test_drawn_labels_are_those_of_the_cpu(card: Any) -> None:
    logits = 3 * torch.randn(512, 5000)
    near, far = (
        _drawn(logits.to(place), torch.Generator().manual_seed(3)).cpu()
        for place in ("cpu", card.device)
    )
    assert far.unique().numel() > 100
    # the softmax of another device may round a chance across one of the numbers
    assert (near == far).float().mean() >= 0.99


def test_labels_are_drawn_as_often_as_the_model_says(card: Any) -> None:
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = chances.log().expand(40_000, -1).to(card.device)
    found = torch.bincount(_drawn(logits, torch.Generator().manual_seed(0)).cpu()) / 40_000
    torch.testing.assert_close(found, chances, rtol=0, atol=0.01)  # four deviations


def test_drawing_waits_for_nothing(card: Any) -> None:
    logits = torch.randn(64, 5000, device=card.device, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    drawn_loss(logits, generator).backward()
    with card.no_waits():
        drawn_loss(logits, generator).backward()
    assert bool(logits.grad.abs().sum() > 0)


def mask(device: torch.device) -> Tensor:
    return (torch.arange(24)[None] < torch.tensor([24, 7, 15, 2])[:, None]).long().to(device)


def logits(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    return soft_kl_divergence(student, teacher, 2.0, real)


def relations(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    return relation_kl_divergence((student, student), (teacher, teacher), (4, 4), real)


@pytest.mark.parametrize("loss", [logits, relative_squared_error, relations])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distillation_losses_are_those_of_float64_and_wait_for_nothing(
    card: Any, loss: Any, dtype: torch.dtype
) -> None:
    student, teacher = (torch.randn(4, 24, 64).to(dtype) for _ in range(2))
    exact = student.double().requires_grad_()
    wanted = loss(exact, teacher.double(), mask(torch.device("cpu")))
    wanted.backward()
    mine = student.to(card.device).requires_grad_()
    given = teacher.to(card.device), mask(card.device)
    loss(mine, *given).backward()
    mine.grad = None
    with card.no_waits():
        found = loss(mine, *given)
        found.backward()
    # of half precision the gradient is rounded, and products in it where there are some
    close = 1e-4 if dtype == torch.float32 else 2e-2
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=close)
    gap = (mine.grad.double().cpu() - exact.grad).norm() / exact.grad.norm()
    assert float(gap) < close


def test_layers_are_measured_where_they_are(card: Any) -> None:
    """A rank far below what saves operations is faster, one far above it is slower."""
    card.needs("cuda", "cpu", why="the stand-in's times are its own")
    size, tokens = (4096, 8192) if card.real else (512, 512)
    layer = nn.Linear(size, size, bias=False).to(card.device)
    torch.manual_seed(5)
    wanted = torch.rand(2, device=card.device)
    torch.manual_seed(5)
    small, large = (relative_time(layer, rank, tokens) for rank in (size // 32, size))
    assert small < 0.8 < 1.2 < large
    assert torch.equal(torch.rand(2, device=card.device), wanted)


def test_measured_layers_that_are_slower_stay(card: Any) -> None:
    """At one token a launch is all that counts, of which factors take two."""
    width = 64
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(3))).to(card.device)
    batches = [torch.randn(64, width, device=card.device) for _ in range(3)]
    record = lrcompress.compress(
        model, batches, lambda model, x: model(x).square().mean(),
        keep=0.5, targets=["*"], keep_measured=True, measured_tokens=1, mask=None,
    )  # fmt: skip
    stay = [layer.name for layer in record.layers if layer.rank is None]
    assert stay == ["0", "1", "2"]
    assert not any(isinstance(layer, LowRankLinear) for layer in model.modules())
