"""Labels drawn from the model: the mean over draws is the Fisher information itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lrcompress.errors import NoMatchError, ObservationError, SettingError
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.fisher import LogitsCapture, drawn_loss

DRAWS = 20_000


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_mean_of_drawn_gradients_is_the_exact_fisher(generator: torch.Generator) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(3)
    recorder = Recorder(model, ["0"], ("output_moment", "input_fisher", "output_fisher"))
    with recorder.step(keep_outputs=True):
        logits = model(x.expand(DRAWS, 3))
        recorder.commit(DRAWS)
        torch.autograd.grad(drawn_loss(logits, generator), recorder.outputs)
    sums = recorder.statistics.of("0", recorder.kinds)

    chances = model(x).softmax(-1).detach()
    exact = chances.diag() - torch.outer(chances, chances)  # E (p − e_y)(p − e_y)ᵀ, over y from p
    squares = torch.outer(exact.diagonal(), x.square())
    for kind, expected in (
        ("output_moment", exact),
        ("input_fisher", squares.sum(0)),
        ("output_fisher", squares.sum(1)),
    ):
        torch.testing.assert_close(sums.moment(kind) / DRAWS, expected, rtol=0.05, atol=0.01)


def test_labels_are_drawn_as_often_as_the_model_says(generator: torch.Generator) -> None:
    logits = torch.tensor([1.0, 0.0, -2.0]).expand(DRAWS, 3).clone().requires_grad_()
    (slope,) = torch.autograd.grad(drawn_loss(logits, generator), logits)
    drawn = (slope < 0).float().mean(0)  # p − e_y is negative at the label alone
    torch.testing.assert_close(drawn, logits[0].softmax(-1), rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 3)])
def test_the_loss_is_the_mean_over_all_that_is_labelled(
    shape: tuple[int, ...], generator: torch.Generator
) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    loss = drawn_loss(logits, generator)
    assert loss.item() == pytest.approx(torch.tensor(3.0).log().item())
    (slope,) = torch.autograd.grad(loss, logits)
    rows = slope.reshape(-1, 3) * 6
    assert (rows.sort().values - torch.tensor([-2 / 3, 1 / 3, 1 / 3])).abs().max() < 1e-6


def test_draws_follow_their_own_generator_only() -> None:
    logits, state = torch.randn(50, 4), torch.get_rng_state()
    one, same, other = (drawn_loss(logits, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one == same != other
    assert torch.get_rng_state().equal(state)


def test_half_precision_logits_are_drawn_from_in_float32(generator: torch.Generator) -> None:
    loss = drawn_loss(torch.randn(5, 4, dtype=torch.bfloat16), generator)
    assert loss.dtype == torch.float32


def test_regression_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(SettingError, match=r"needs two logits or more, got 1; .*fisher='labels'"):
        drawn_loss(torch.randn(5, 1), generator)


class Inner(nn.Module):
    def __init__(self, *, named: bool = True) -> None:
        super().__init__()
        self.layer, self.named = nn.Linear(2, 3), named

    def forward(self, x: Tensor) -> Any:
        logits = self.layer(x)
        return SimpleNamespace(logits=logits) if self.named else logits


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def test_logits_are_found_by_their_name_in_the_output_of_a_submodule() -> None:
    model = Outer(Inner())
    tap = LogitsCapture(model)
    with tap.listening():
        output = model(torch.randn(4, 2))
    assert tap.take() is output.logits


def test_logits_of_a_transformers_model_are_found() -> None:
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    model = Outer(BertForSequenceClassification(config))
    tap = LogitsCapture(model)
    with tap.listening():
        output = model(torch.ones(2, 3, dtype=torch.long))
    assert tap.take() is output.logits


def test_logits_are_the_output_of_the_submodule_that_is_named() -> None:
    model = Outer(Inner(named=False))
    tap = LogitsCapture(model, "inner.layer")
    with tap.listening():
        output = model(torch.randn(4, 2))
    assert tap.take() is output


def test_a_submodule_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(NoMatchError, match=r"logits='inner.leyer' names no .*nearest: inner.layer"):
        LogitsCapture(Outer(Inner()), "inner.leyer")


def test_a_model_without_logits_is_told_what_to_name() -> None:
    model = Outer(Inner(named=False))
    tap = LogitsCapture(model)
    with tap.listening():
        model(torch.randn(4, 2))
    with pytest.raises(ObservationError, match=r"no module's output has \.logits; name the .*="):
        tap.take()


def test_a_named_submodule_that_gave_none_is_named() -> None:
    model = Outer(Inner())
    tap = LogitsCapture(model, "inner")  # its output is no tensor
    with tap.listening():
        model(torch.randn(4, 2))
    with pytest.raises(ObservationError, match=r"'inner' returned no tensor with a gradient"):
        tap.take()


def test_passes_without_gradients_and_earlier_steps_are_not_heard() -> None:
    model = Outer(Inner())
    tap = LogitsCapture(model)
    with tap.listening():
        model(torch.randn(4, 2))
    with tap.listening(), torch.no_grad():
        model(torch.randn(4, 2))
    with pytest.raises(ObservationError, match=r"found no logits"):
        tap.take()


def test_logits_are_taken_once() -> None:
    model = Outer(Inner())
    tap = LogitsCapture(model)
    with tap.listening():
        model(torch.randn(4, 2))
    tap.take()
    with pytest.raises(ObservationError, match=r"found no logits"):
        tap.take()


def test_hooks_are_gone_when_the_block_raises() -> None:
    model = Outer(Inner())
    tap = LogitsCapture(model)
    with pytest.raises(KeyboardInterrupt), tap.listening():
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())
