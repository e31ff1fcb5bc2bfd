"""Inputs weighted by squared gradients, against the definition."""

import pytest
import torch
from torch import Tensor, nn

from lrcompress.objective import metric_of
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.moments import Statistics


class First(nn.Module):
    """A classifier that reads the first token only, as BERT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh()[:, 0])


@pytest.fixture
def model() -> First:
    torch.manual_seed(0)
    return First()


def observed(model: nn.Module, *batches: tuple[Tensor, Tensor]) -> Statistics:
    recorder = Recorder(model, ["layer"], ["weighted_moment"])
    for x, y in batches:
        with recorder.step():
            loss = nn.functional.cross_entropy(model(x), y)
            recorder.commit(float(len(y)))
            loss.backward()
    return recorder.statistics


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 3, 5), torch.arange(12) % 2


def per_token_gradients(model: First, x: Tensor, y: Tensor) -> Tensor:
    caught: list[Tensor] = []
    handle = model.layer.register_forward_hook(lambda module, args, out: caught.append(out))
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    handle.remove()
    return torch.autograd.grad(loss, caught)[0].reshape(-1, 4)


def test_weighs_every_token_by_its_squared_gradient(model: First) -> None:
    x, y = data()
    g, flat = per_token_gradients(model, x, y), x.reshape(-1, 5)
    weight = g.square().sum(1)

    sums = observed(model, (x, y)).outputs["layer"]

    expected = sum(w * torch.outer(t, t) for w, t in zip(weight, flat, strict=True))
    torch.testing.assert_close(sums.moment("weighted_moment"), expected)
    torch.testing.assert_close(sums.values["weighted_sum"], (weight[:, None] * flat).sum(0))
    torch.testing.assert_close(sums.values["weight"], weight.sum())


def test_parts_add_up_to_the_whole(model: First) -> None:
    x, y = data()
    whole = observed(model, (x, y))
    parts = observed(model, (x[:3], y[:3]))
    parts.merge_(observed(model, (x[3:], y[3:])))
    for name, value in whole.outputs["layer"].values.items():
        torch.testing.assert_close(parts.outputs["layer"].values[name], value)


def test_tokens_that_the_loss_ignores_do_not_count(model: First) -> None:
    x, y = data()
    other = x.clone()
    other[:, 1:] = 100 * torch.randn(12, 2, 5)
    first, second = (
        metric_of("weighted_kfac", observed(model, (inputs, y)), "layer", refit_bias=True)
        for inputs in (x, other)
    )
    assert first.input is not None
    assert second.input is not None
    torch.testing.assert_close(first.input, second.input)
    torch.testing.assert_close(first.mean, second.mean)


def test_the_metric_has_the_trace_of_the_fisher_over_tokens(model: First) -> None:
    x, y = data()
    g, flat = per_token_gradients(model, x, y), x.reshape(-1, 5)
    fisher = sum(
        float(torch.outer(a, b).square().sum()) for a, b in zip(g, flat, strict=True)
    ) / len(y)
    metric = metric_of("weighted_kfac", observed(model, (x, y)), "layer", refit_bias=False)
    assert metric.input is not None
    assert metric.output is not None
    assert float(metric.input.trace() * metric.output.trace()) == pytest.approx(fisher, rel=1e-5)


def test_a_step_that_is_not_finite_adds_nothing(model: First) -> None:
    x, y = data()
    good = observed(model, (x, y))
    bad = x.clone()
    bad[0, 0, 0] = float("nan")
    both = observed(model, (x, y), (bad, y))
    for name, value in good.outputs["layer"].values.items():
        torch.testing.assert_close(both.outputs["layer"].values[name], value)
