"""Statistics of what is left of a layer, beside those of a layer that never had more."""

import pytest
import torch

from lrcompress.errors import ObservationError
from lrcompress.objective import metric_of
from lrcompress.statistics.moments import (
    INPUT_KINDS,
    KINDS,
    OUTPUT_KINDS,
    Statistics,
    Sums,
    shapes,
)
from lrcompress.statistics.narrowed import NarrowedStatistics

ROWS, COLUMNS = torch.tensor([0, 2, 3]), torch.tensor([1, 4, 5, 6])


def seen(x: torch.Tensor, g: torch.Tensor, kinds: tuple[str, ...]) -> Statistics:
    every = shapes(kinds, x.shape[1], g.shape[1])
    sides = [{k: v for k, v in every.items() if k.startswith("input") == side} for side in (1, 0)]
    read, gave = (Sums.zeros(side) for side in sides)
    read.add_inputs_(x)
    if "output_moment" in gave.values:
        gave.add_gradients_(g, 5)
    return Statistics({"a": read}, {"a": gave}, {"a": "a"}, 1, 0, len(x))


def test_are_those_of_a_layer_with_these_features_alone() -> None:
    torch.manual_seed(0)
    kinds = ("input_moment", "output_moment")
    x, g = torch.randn(20, 7), torch.randn(20, 4)
    whole = seen(x, g, kinds)
    own = NarrowedStatistics(whole=whole, rows={"a": ROWS}, columns={"a": COLUMNS}).of("a", kinds)
    left = seen(x[:, COLUMNS], g[:, ROWS], kinds).of("a", kinds)
    assert own.values.keys() == left.values.keys()
    for kind, value in left.values.items():
        torch.testing.assert_close(own.moment(kind), left.moment(kind))
        assert own.values[kind].shape == value.shape
    assert (own.tokens, own.examples) == (left.tokens, left.examples)
    other = NarrowedStatistics(whole=whole, rows={"b": ROWS}).of("a", kinds)
    assert all(torch.equal(other.values[k], v) for k, v in whole.of("a", kinds).values.items())


def test_every_sum_is_cut_along_the_side_it_is_of() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(5, 4, 7), torch.randn(5, 4, 4)
    read, gave = (Sums.zeros(shapes(kinds, 7, 4)) for kinds in (INPUT_KINDS, OUTPUT_KINDS))
    read.add_inputs_(x.reshape(-1, 7))
    gave.add_gradients_(g.reshape(-1, 4), 5)
    gave.add_weighted_(x.reshape(-1, 7), g.reshape(-1, 4))
    gave.add_fisher_(x, g)
    whole = Statistics({"a": read}, {"a": gave}, {"a": "a"}, 1, 0, 20)
    every = whole.of("a", KINDS)
    own = NarrowedStatistics(whole=whole, rows={"a": ROWS}, columns={"a": COLUMNS}).of("a", KINDS)
    energy = every.moment("input_moment").diagonal()
    scale = {"output_fisher": energy[COLUMNS].sum() / energy.sum()}
    assert own.values.keys() == every.values.keys()
    for kind in own.values:
        kept = ROWS if kind in ("output_moment", "output_fisher") else COLUMNS
        value = every.moment(kind)
        wanted = (
            value if not value.ndim else value[kept][:, kept] if value.ndim > 1 else value[kept]
        )
        torch.testing.assert_close(own.moment(kind), scale.get(kind, 1.0) * wanted)
    assert (own.tokens, own.examples, own.skipped) == (20, 5, 0)


def test_gradients_are_as_large_whichever_inputs_are_left() -> None:
    """By ``row_fisher`` ``Σ_j F_ij / trace C``: the same ``G`` for all and for some columns."""
    torch.manual_seed(0)
    x = torch.randn(20, 7)
    whole = seen(x, torch.randn(20, 4), ("input_moment", "output_moment"))
    whole.outputs["a"].values["output_fisher"] = torch.rand(4)
    given = {"refit_bias": False}
    every = metric_of("row_fisher", whole, "a", **given)
    own = NarrowedStatistics(whole=whole, columns={"a": COLUMNS})
    some = metric_of("row_fisher", own, "a", **given)
    torch.testing.assert_close(some.output * some.loss_scale, every.output * every.loss_scale)
    torch.testing.assert_close(some.input, every.input[COLUMNS][:, COLUMNS])


def test_what_was_not_observed_is_named() -> None:
    statistics = NarrowedStatistics(
        whole=seen(torch.ones(2, 3), torch.ones(2, 2), ("input_moment",))
    )
    with pytest.raises(ObservationError, match="layer 'a' needs output_moment"):
        statistics.of("a", ("output_moment",))
