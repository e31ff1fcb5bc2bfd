"""Every method's metric against its definition, from statistics of made-up tokens."""

import re

import pytest
import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError, ObservationError, SettingError
from lrcompress.objective import FEW, METHODS, Metric, few_tokens, method_named, metric_of
from lrcompress.statistics.moments import INPUT_KINDS, OUTPUT_KINDS, Statistics, Sums, shapes

IN, OUT, EXAMPLES, LENGTH = 5, 4, 6, 3
NEAR = {"rtol": 1e-4, "atol": 1e-4}  # the sums are in float32
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def statistics(x: Tensor, g: Tensor) -> Statistics:
    """Of one layer, from inputs ``(examples, length, in)`` and gradients at its output."""
    fan_in, fan_out = x.shape[-1], g.shape[-1]
    held = Statistics(steps=1, source={"layer": "layer"})
    held.inputs["layer"] = Sums.zeros(shapes(INPUT_KINDS, fan_in, fan_out))
    held.outputs["layer"] = Sums.zeros(shapes(OUTPUT_KINDS, fan_in, fan_out))
    held.inputs["layer"].add_inputs_(x.flatten(0, 1))
    held.outputs["layer"].add_gradients_(g.flatten(0, 1), len(g))
    held.outputs["layer"].add_weighted_(x.flatten(0, 1), g.flatten(0, 1))
    held.outputs["layer"].add_fisher_(x, g)
    return held


@pytest.fixture
def x() -> Tensor:
    return torch.randn(EXAMPLES, LENGTH, IN) + torch.arange(IN)


@pytest.fixture
def g() -> Tensor:
    return torch.randn(EXAMPLES, LENGTH, OUT)


@each_method
def test_the_metric_is_what_the_table_says(method: str, x: Tensor, g: Tensor) -> None:
    tokens, gradients = x.flatten(0, 1).double(), g.flatten(0, 1).double()
    fisher = torch.stack([(gb.mT @ xb).square() for gb, xb in zip(g, x, strict=True)]).sum(0)
    moment = tokens.mT @ tokens / len(tokens)
    weights = gradients.square().sum(1)
    weighted = tokens.mT @ weights.diag() @ tokens / weights.sum()
    expected: dict[str, tuple[Tensor | None, Tensor | None, float | None]] = {
        "svd": (None, None, None),
        "fwsvd": (None, fisher.sum(0).double(), None),
        "asvd": (None, tokens.abs().sum(0), None),
        "drone": (None, moment, None),
        "row_fisher": (fisher.sum(1).double() / EXAMPLES, moment, 1 / float(moment.trace())),
        "kfac": (gradients.mT @ gradients / EXAMPLES, moment, 1.0),
        "kronecker": (gradients.mT @ gradients / EXAMPLES, moment, 1.0),
        "weighted_kfac": (gradients.mT @ gradients / EXAMPLES, weighted, 1.0),
    }
    found = metric_of(method, statistics(x, g), "layer", refit_bias=False)
    output, input_, scale = expected[method]
    for side, wanted in ((found.output, output), (found.input, input_)):
        assert (side is None) == (wanted is None)
        if side is not None and wanted is not None:
            assert side.dtype == torch.float64
            # the scale of a metric matters where it predicts the loss
            unit = 1.0 if scale is not None else wanted.sum() / side.sum()
            torch.testing.assert_close(side * unit, wanted, **NEAR)
    assert found.mean is None
    assert found.loss_scale == (None if scale is None else pytest.approx(scale, rel=1e-5))
    assert METHODS[method].comparable == (scale is not None and method != "kronecker")
    assert found.note == ""


def test_what_a_method_needs_follows_from_its_metric() -> None:
    gradients = {name for name, method in METHODS.items() if method.needs_gradients}
    assert gradients == {"fwsvd", "row_fisher", "kfac", "weighted_kfac", "kronecker"}
    assert METHODS["svd"].kinds == ()
    assert METHODS["kfac"].kinds == ("input_moment", "output_moment")


def test_half_the_squared_error_is_the_second_order_increase_of_the_loss() -> None:
    """With one token an example and inputs independent of gradients: ½ E (gᵀ Δ x)²."""
    x, g = torch.randn(8, 1, IN), torch.randn(9, 1, OUT)
    every = (x.repeat_interleave(9, 0), g.repeat(8, 1, 1))  # all pairs: independent exactly
    metric = metric_of("kfac", statistics(*every), "layer", refit_bias=False)
    assert metric.output is not None
    assert metric.input is not None
    assert metric.loss_scale is not None
    change = torch.randn(OUT, IN, dtype=torch.float64)
    predicted = 0.5 * metric.loss_scale * (metric.output @ change @ metric.input * change).sum()
    measured = 0.5 * ((every[1].double() @ change) * every[0].double()).sum(-1).square().mean()
    torch.testing.assert_close(predicted, measured, **NEAR)


def test_weighted_inputs_give_the_trace_of_the_fisher_exactly(x: Tensor, g: Tensor) -> None:
    metric = metric_of("weighted_kfac", statistics(x, g), "layer", refit_bias=False)
    assert metric.input is not None
    assert metric.output is not None
    tokens = zip(x.flatten(0, 1), g.flatten(0, 1), strict=True)
    exact = sum(float(torch.outer(gt, xt).square().sum()) for xt, gt in tokens) / EXAMPLES
    assert float(metric.input.trace() * metric.output.trace()) == pytest.approx(exact, rel=1e-4)


def test_weighted_inputs_ignore_tokens_that_no_loss_depends_on() -> None:
    """A classifier that reads the first token only."""
    x, g = torch.randn(6, 3, IN), torch.randn(6, 3, OUT)
    g[:, 1:] = 0
    other = x.clone()
    other[:, 1:] = torch.randn(6, 2, IN)
    one, two = (
        metric_of("weighted_kfac", statistics(xs, g), "layer", refit_bias=True) for xs in (x, other)
    )
    torch.testing.assert_close(one.input, two.input)
    torch.testing.assert_close(one.mean, x[:, 0].double().T @ weights_of(g[:, 0]), **NEAR)


def weights_of(g: Tensor) -> Tensor:
    weights = g.double().square().sum(1)
    return weights / weights.sum()


def test_both_methods_that_predict_the_loss_agree_where_the_rows_are_independent() -> None:
    """``kfac`` with a diagonal G is ``row_fisher`` where inputs and gradients are independent."""
    x, rows = torch.randn(8, 1, IN), torch.eye(OUT)[:, None] * torch.arange(1.0, OUT + 1)
    held = statistics(x.repeat_interleave(OUT, 0), rows.repeat(8, 1, 1))
    kfac, rowwise = (metric_of(m, held, "layer", refit_bias=False) for m in ("kfac", "row_fisher"))
    assert kfac.output is not None
    assert rowwise.output is not None
    assert rowwise.loss_scale is not None
    torch.testing.assert_close(rowwise.output.diag() * rowwise.loss_scale, kfac.output, **NEAR)
    torch.testing.assert_close(rowwise.input, kfac.input, **NEAR)


@pytest.mark.parametrize("method", ["drone", "kfac", "row_fisher", "weighted_kfac"])
def test_a_refitted_bias_leaves_the_error_about_the_mean(method: str, x: Tensor, g: Tensor) -> None:
    metric = metric_of(method, statistics(x, g), "layer", refit_bias=True)
    plain = metric_of(method, statistics(x, g), "layer", refit_bias=False)
    tokens = x.flatten(0, 1).double()
    even = torch.full((len(tokens),), 1 / len(tokens)).double()
    share = weights_of(g.flatten(0, 1)) if method == "weighted_kfac" else even
    torch.testing.assert_close(metric.mean, share @ tokens, **NEAR)
    assert metric.loss_scale == plain.loss_scale
    change = torch.randn(OUT, IN, dtype=torch.float64)
    errors = tokens @ change.mT
    best = share @ (errors - share @ errors).square().sum(1)  # the bias that takes up most
    assert metric.input is not None
    torch.testing.assert_close((change @ metric.input * change).sum(), best, **NEAR)


@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd"])
def test_methods_that_do_not_know_the_inputs_leave_the_bias_alone(
    method: str, x: Tensor, g: Tensor
) -> None:
    assert metric_of(method, statistics(x, g), "layer", refit_bias=True).mean is None


def test_each_side_is_shrunk_by_its_own_share(x: Tensor, g: Tensor) -> None:
    plain = metric_of("kfac", statistics(x, g), "layer", refit_bias=True)
    shrunk = metric_of("kfac", statistics(x, g), "layer", refit_bias=True, shrink=(0.25, 1.0))
    assert plain.input is not None
    assert plain.output is not None
    eye = torch.eye(IN).double()
    spread = plain.input.diagonal().mean()
    torch.testing.assert_close(shrunk.input, 0.75 * plain.input + 0.25 * spread * eye)
    expected = plain.output.diagonal().mean() * torch.eye(OUT).double()
    torch.testing.assert_close(shrunk.output, expected)


def test_svd_needs_no_statistics() -> None:
    assert metric_of("svd", Statistics(), "layer", refit_bias=True) == Metric()


@each_method
def test_statistics_that_are_missing_are_named(method: str) -> None:
    if method == "svd":
        return
    with pytest.raises(ObservationError, match=f"'layer' needs .*{METHODS[method].kinds[-1]}"):
        metric_of(method, Statistics(), "layer", refit_bias=False)


@pytest.mark.parametrize(("method", "kind"), [("kfac", "output_moment"), ("asvd", "input_abs")])
def test_statistics_that_are_not_finite_are_named(
    method: str, kind: str, x: Tensor, g: Tensor
) -> None:
    held = statistics(x, g)
    held.of("layer", [kind]).values[kind].view(-1)[0] = torch.nan
    with pytest.raises(NotFiniteError, match=f"{kind} of layer 'layer' holds a NaN or an infinity"):
        metric_of(method, held, "layer", refit_bias=False)


@pytest.mark.parametrize("method", ["kfac", "row_fisher", "weighted_kfac"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_side_that_is_all_zero_is_the_identity_says_so_and_predicts_nothing(
    method: str, side: str, x: Tensor, g: Tensor
) -> None:
    held = statistics(x * (side != "input"), g * (side != "output"))
    metric = metric_of(method, held, "layer", refit_bias=False)
    assert getattr(metric, side) is None
    assert metric.loss_scale == 0
    assert f"the {side} metric was all zero: identity" in metric.note


@pytest.mark.parametrize("features", [1, IN])
def test_an_input_that_never_changes_costs_the_bias_nothing(features: int) -> None:
    for _ in range(8):  # float32 sums leave a little above or below nothing
        same = torch.randn(features).expand(400, 2, features)
        held = statistics(same, torch.randn(400, 2, OUT))
        metric = metric_of("kfac", held, "layer", refit_bias=True)
        assert metric.input is None
        assert metric.loss_scale == 0


def test_a_method_that_cannot_compare_layers_stays_so_without_inputs(g: Tensor) -> None:
    held = statistics(torch.zeros(EXAMPLES, LENGTH, IN), g)
    assert metric_of("drone", held, "layer", refit_bias=False).loss_scale is None


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    every = ", ".join(METHODS)
    with pytest.raises(SettingError, match=f"one of {every}; got 'kfac2', nearest: kfac$"):
        method_named("kfac2")  # near to weighted_kfac as well


@each_method
def test_units_of_inputs_and_gradients_are_units_of_the_metric(
    method: str, x: Tensor, g: Tensor
) -> None:
    plain = metric_of(method, statistics(x, g), "layer", refit_bias=True)
    for of_x, of_g in ((1e-3, 1e3), (1e3, 1e-3)):
        scaled = metric_of(method, statistics(of_x * x, of_g * g), "layer", refit_bias=True)
        assert scaled.note == plain.note == ""
        for one, other in ((plain.input, scaled.input), (plain.output, scaled.output)):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(other / other.norm(), one / one.norm(), **NEAR)


def test_features_that_sum_to_nothing_are_a_metric_all_the_same() -> None:
    """As those of a LayerNorm: no entry of the sum of all of them is left, but the trace is."""
    x = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    metric = metric_of("drone", statistics(x, torch.ones(1, 2, OUT)), "layer", refit_bias=False)
    torch.testing.assert_close(metric.input, torch.tensor([[2.5, -2.5], [-2.5, 2.5]]).double())
    assert metric.note == ""


def test_a_single_token_is_counted_once() -> None:
    x, g = torch.randn(1, 1, IN), torch.randn(1, 1, OUT)
    metric = metric_of("kfac", statistics(x, g), "layer", refit_bias=False)
    torch.testing.assert_close(metric.input, torch.outer(x[0, 0], x[0, 0]).double(), **NEAR)
    torch.testing.assert_close(metric.output, torch.outer(g[0, 0], g[0, 0]).double(), **NEAR)


def test_a_side_that_a_method_does_not_look_at_is_not_shrunk(x: Tensor, g: Tensor) -> None:
    metric = metric_of("drone", statistics(x, g), "layer", refit_bias=False, shrink=(0.5, 0.5))
    assert metric.output is None
    assert metric.input is not None


def test_few_tokens_are_told_by_the_methods_whose_metric_is_full() -> None:
    for method, chosen in METHODS.items():
        full = chosen.input in ("input_moment", "weighted_moment")
        assert bool(few_tokens(method, FEW * 100 - 1, 100)) == full
        assert few_tokens(method, FEW * 100, 100) == ""
    told = r"^1,023 tokens .* up to 256 inputs, which is too few: .*; observe 2,048 or more$"
    assert re.match(told, few_tokens("kfac", 1023, 256))
