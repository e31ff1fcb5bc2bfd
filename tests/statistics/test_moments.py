"""Sums and counts against their definitions, and how parts of them add up."""

import pytest
import torch
from torch import Tensor

from lrcompress.errors import CheckpointError, ObservationError, ShapeError
from lrcompress.linalg import packed_shape
from lrcompress.statistics.moments import (
    INPUT_KINDS,
    KINDS,
    LARGE,
    OUTPUT_KINDS,
    TABLE_KINDS,
    Statistics,
    Sums,
    _over_tokens,
    shapes,
)

IN, OUT = 5, 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def sums(*kinds: str, device: str | None = None) -> Sums:
    return Sums.zeros(shapes(kinds or KINDS, IN, OUT), device)


def test_every_kind_has_a_shape_and_inputs_bring_their_sum() -> None:
    assert shapes(KINDS, IN, OUT) == {
        "input_moment": packed_shape(IN),
        "input_sum": (IN,),
        "input_abs": (IN,),
        "output_moment": packed_shape(OUT),
        "weighted_moment": packed_shape(IN),
        "weighted_sum": (IN,),
        "weight": (),
        "input_fisher": (IN,),
        "output_fisher": (OUT,),
    }
    assert "input_sum" in shapes(["input_moment"], IN, OUT)
    assert "input_sum" not in shapes(OUTPUT_KINDS, IN, OUT)
    weighted = {"output_moment", "weighted_moment", "weighted_sum", "weight"}
    assert shapes(["weighted_moment"], IN, OUT).keys() == weighted
    assert shapes(["output_moment"], IN, LARGE) == {"output_moment": packed_shape(LARGE)}
    assert shapes(["output_moment"], IN, LARGE + 1) == {"output_moment": (LARGE + 1,)}


def test_symmetric_sums_are_where_they_are_offloaded_to() -> None:
    beside = Sums.zeros(shapes(KINDS, IN, OUT), "meta")
    held = Sums.zeros(shapes(KINDS, IN, OUT), "meta", offload="cpu")
    assert {tensor.device.type for tensor in beside.named_tensors().values()} == {"meta"}
    away = {name for name, tensor in held.named_tensors().items() if not tensor.is_meta}
    assert away == {"input_moment", "output_moment", "weighted_moment"}


def test_what_came_from_a_file_moves_beside_the_layer_but_for_symmetric_sums() -> None:
    held = sums(*KINDS)
    before = held.named_tensors()
    held.beside_(torch.device("cpu"))
    assert all(tensor is before[name] for name, tensor in held.named_tensors().items())
    held.beside_(torch.device("meta"))
    away = {name for name, tensor in held.named_tensors().items() if not tensor.is_meta}
    assert away == {"input_moment", "output_moment", "weighted_moment"}
    assert held.named_tensors().keys() == before.keys()


def test_tokens_are_counted_where_float32_would_stall() -> None:
    held = sums("input_moment")
    held.tokens += 2**24
    held.add_inputs_(torch.randn(1, IN))
    assert held.tokens.item() == 2**24 + 1


def test_sums_over_tokens_of_half_precision_are_in_float32() -> None:
    assert _over_tokens(torch.ones(3001, 1, dtype=torch.bfloat16)).item() == 3001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_table_are_counted_and_their_gradients_squared(dtype: torch.dtype) -> None:
    held, rows = Sums.zeros(shapes(TABLE_KINDS, IN, 4)), torch.tensor([[2], [0], [2]])
    g = torch.randn(3, IN).to(dtype)
    held.add_rows_(rows)
    assert (held.tokens, held.examples, held.skipped) == (3, 0, 0)
    for scale, given in ((1.0, {}), (3.0, {"scale": 3.0})):
        before = held.moment("token_fisher").clone()
        held.add_row_gradients_(rows, g, 2, **given)
        squares = (scale * g.float()).square().sum(1)
        wanted = torch.stack([squares[1], torch.tensor(0.0), squares[0] + squares[2], before[3]])
        torch.testing.assert_close(held.moment("token_fisher") - before, wanted)
    assert held.moment("token_count").tolist() == [1, 0, 2, 0]
    assert (held.tokens, held.examples, held.skipped) == (9, 4, 0)


def test_inputs_are_summed_as_defined() -> None:
    held, x, y = sums(*INPUT_KINDS), torch.randn(7, IN), torch.randn(2, IN)
    held.add_inputs_(x)
    held.add_inputs_(y)
    both = torch.cat([x, y])
    torch.testing.assert_close(held.moment("input_moment"), both.mT @ both)
    torch.testing.assert_close(held.moment("input_sum"), both.sum(0))
    torch.testing.assert_close(held.moment("input_abs"), both.abs().sum(0))
    assert (held.tokens, held.examples, held.skipped) == (9, 0, 0)


def test_gradients_are_summed_as_defined() -> None:
    held, g = sums("output_moment"), torch.randn(6, OUT)
    held.add_gradients_(g, examples=2)
    torch.testing.assert_close(held.moment("output_moment"), g.mT @ g)
    assert (held.tokens, held.examples, held.skipped) == (6, 2, 0)


def test_inputs_are_weighted_by_their_squared_gradient() -> None:
    held, x, g = sums("weighted_moment"), torch.randn(6, IN), torch.randn(6, OUT)
    held.add_weighted_(x, g)
    weights = g.square().sum(1)
    torch.testing.assert_close(held.moment("weighted_moment"), x.mT @ weights.diag() @ x)
    torch.testing.assert_close(held.moment("weighted_sum"), weights @ x)
    torch.testing.assert_close(held.moment("weight"), weights.sum())


@pytest.mark.parametrize("spoiled", ["x", "g"])
def test_weighted_inputs_that_are_not_finite_add_nothing(spoiled: str) -> None:
    held, x, g = sums("weighted_moment"), torch.randn(6, IN), torch.randn(6, OUT)
    (x if spoiled == "x" else g)[2, 1] = torch.inf
    held.add_weighted_(x, g)
    assert all(not value.any() for value in held.values.values())


# 5·4/(5 + 4) = 2.2: sequences of two take the short way, longer ones the long way
@pytest.mark.parametrize("length", [1, 2, 3, 11])
def test_the_fisher_is_the_squared_gradient_of_each_example(length: int) -> None:
    held = sums("input_fisher", "output_fisher")
    x, g = torch.randn(3, length, IN), torch.randn(3, length, OUT)
    held.add_fisher_(x, g)
    squares = sum((g[b].mT @ x[b]).square() for b in range(3))
    assert isinstance(squares, Tensor)
    torch.testing.assert_close(held.moment("input_fisher"), squares.sum(0))
    torch.testing.assert_close(held.moment("output_fisher"), squares.sum(1))
    assert (held.tokens, held.examples, held.skipped) == (3 * length, 3, 0)
    held.add_fisher_(x, g, examples=2)
    torch.testing.assert_close(held.moment("input_fisher"), 2 * squares.sum(0))
    torch.testing.assert_close(held.moment("output_fisher"), 2 * squares.sum(1))
    assert (held.tokens, held.examples, held.skipped) == (6 * length, 5, 0)


def test_one_side_of_the_fisher_can_be_had_alone() -> None:
    x, g = torch.randn(3, 2, IN), torch.randn(3, 2, OUT)
    both, one = sums("input_fisher", "output_fisher"), sums("output_fisher")
    both.add_fisher_(x, g)
    one.add_fisher_(x, g)
    assert one.values.keys() == {"output_fisher"}
    assert one.moment("output_fisher").equal(both.moment("output_fisher"))


def test_moment_and_fisher_together_count_each_step_once() -> None:
    held, x, g = sums(*OUTPUT_KINDS), torch.randn(3, 2, IN), torch.randn(3, 2, OUT)
    held.add_gradients_(g.reshape(-1, OUT), 3)
    held.add_fisher_(x, g)
    assert (held.tokens, held.examples, held.skipped) == (6, 3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_in_float32_whatever_is_added(dtype: torch.dtype) -> None:
    held, x = sums(*INPUT_KINDS), torch.ones(3000, IN, dtype=dtype)  # bf16 would stall at 256
    held.add_inputs_(x)
    assert all(value.dtype == torch.float32 for value in held.values.values())
    assert held.moment("input_moment").equal(torch.full((IN, IN), 3000.0))
    assert held.moment("input_sum").equal(torch.full((IN,), 3000.0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_add_nothing_and_are_counted(value: float) -> None:
    held, x = sums(*INPUT_KINDS), torch.randn(7, IN)
    x[3, 2] = value
    held.add_inputs_(x)
    held.add_inputs_(x)
    assert all(not total.any() for total in held.values.values())
    assert (held.tokens, held.skipped) == (0, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_add_nothing_and_are_counted(value: float) -> None:
    held, x, g = sums(*OUTPUT_KINDS), torch.randn(3, 2, IN), torch.randn(3, 2, OUT)
    g[1, 1, 0] = value
    held.add_gradients_(g.reshape(-1, OUT), 3)
    held.add_fisher_(x, g)
    assert all(not total.any() for total in held.values.values())
    assert (held.tokens, held.examples, held.skipped) == (0, 0, 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("length", [2, 11])
def test_a_fisher_of_inputs_that_are_not_finite_adds_nothing(value: float, length: int) -> None:
    held, x, g = sums("input_fisher"), torch.randn(3, length, IN), torch.randn(3, length, OUT)
    x[1, 1, 0] = value
    held.add_fisher_(x, g)
    assert not held.moment("input_fisher").any()
    assert (held.tokens, held.examples, held.skipped) == (0, 0, 1)


@pytest.mark.parametrize("shape", [(7, IN + 1), (IN,), (2, 3, IN)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=rf"shape \(_, {IN}\), got \({', '.join(map(str, shape))}"):
        sums().add_inputs_(torch.zeros(shape))


def filled(*kinds: str) -> Sums:
    held = sums(*kinds)
    held.add_inputs_(torch.randn(3, IN))
    held.add_gradients_(torch.randn(3, OUT), 2)
    held.add_fisher_(torch.randn(2, 3, IN), torch.randn(2, 3, OUT))
    return held


def test_merged_sums_are_the_sums_of_both() -> None:
    one, other = filled(), filled()
    before = {kind: one.moment(kind) + other.moment(kind) for kind in KINDS}
    one.merge_(other)
    for kind in KINDS:
        torch.testing.assert_close(one.moment(kind), before[kind])
    assert (one.tokens, one.examples) == (12, 4)


def test_sums_come_back_from_their_state_and_do_not_follow_it() -> None:
    held = filled()
    state = held.state_dict()
    again = Sums.from_state(state, "cpu")
    for kind in KINDS:
        assert again.moment(kind).equal(held.moment(kind))
    assert (again.tokens, again.examples, again.skipped) == (6, 2, 0)
    for tensor in state.values():
        tensor.zero_()
    assert again.tokens == held.tokens == 6
    assert again.values["input_sum"].any()


def test_sums_come_to_the_device_they_are_asked_for() -> None:
    held = filled()
    away = Sums.from_state(held.state_dict(), "meta")
    assert all(tensor.is_meta for tensor in away.named_tensors().values())
    away.merge_(held)
    assert all(held.moment(kind, device="meta").is_meta for kind in KINDS)
    assert not any(tensor.is_meta for tensor in held.named_tensors().values())


@pytest.mark.parametrize("features", [1, 2, 5])
def test_symmetric_sums_that_were_kept_as_squares_are_taken(features: int) -> None:
    """As they were before version 0.2."""
    x = torch.randn(3, features)
    counts = dict.fromkeys(("tokens", "examples", "skipped"), torch.tensor(3))
    old = Sums.from_state({"input_moment": x.mT @ x, "input_sum": x.sum(0), **counts}, "cpu")
    assert old.values["input_moment"].shape == packed_shape(features)
    torch.testing.assert_close(old.moment("input_moment"), x.mT @ x)


def test_bytes_are_those_of_the_values() -> None:
    assert sums("input_moment").nbytes == 4 * (IN * IN + IN)


@pytest.fixture
def held() -> Statistics:
    """Statistics of two layers; ``"key"`` reads what ``"query"`` reads."""
    held = Statistics(steps=2, tokens=6)
    for name in ("query", "key"):
        held.source[name] = "query"
        held.outputs[name] = sums(*OUTPUT_KINDS)
        held.outputs[name].add_gradients_(torch.randn(6, OUT), 2)
    held.inputs["query"] = sums(*INPUT_KINDS)
    held.inputs["query"].add_inputs_(torch.randn(6, IN))
    return held


def test_both_sides_of_a_layer_come_together(held: Statistics) -> None:
    query, key = (held.of(name, KINDS) for name in ("query", "key"))
    assert key.values["input_moment"] is query.values["input_moment"]
    assert key.values["output_moment"] is held.outputs["key"].values["output_moment"]
    assert (key.tokens, key.examples) == (6, 2)


def test_a_kind_that_was_not_observed_is_named_with_the_nearest_layer(held: Statistics) -> None:
    del held.outputs["key"].values["output_fisher"]
    with pytest.raises(
        ObservationError, match=r"'key' needs output_fisher, which was not observed.*: key"
    ):
        held.of("key", ["input_moment", "output_fisher"])


def test_a_layer_that_was_not_watched_is_named_with_the_nearest(held: Statistics) -> None:
    with pytest.raises(ObservationError, match=r"'queri' .* nearest.*query"):
        held.of("queri", ["input_moment"])
    held.inputs["other"] = held.inputs["query"]
    held.source["other"] = "other"
    with pytest.raises(ObservationError, match=r"nearest to it: other"):
        held.of("others", ["input_moment"])
    with pytest.raises(ObservationError, match=r"'key' .* nearest to it: none$"):
        Statistics().of("key", ["input_moment"])


def test_a_layer_that_shares_nothing_is_found_by_its_own_name(held: Statistics) -> None:
    del held.source["query"]
    assert held.of("query", INPUT_KINDS).values.keys() >= {*INPUT_KINDS, *OUTPUT_KINDS}


def test_where_nothing_is_asked_for_nothing_need_have_been_seen() -> None:
    found = Statistics().of("never", [])
    assert found.values == {}
    counts = (found.tokens, found.examples, found.skipped)
    assert [(count.item(), count.dtype) for count in counts] == [(0, torch.int64)] * 3


@pytest.mark.parametrize(("side", "kind"), [("input", "input_abs"), ("output", "output_moment")])
def test_a_layer_of_which_no_finite_step_was_seen_is_refused(
    held: Statistics, side: str, kind: str
) -> None:
    getattr(held, f"{side}s")["query"] = sums(*INPUT_KINDS if side == "input" else OUTPUT_KINDS)
    with pytest.raises(
        ObservationError, match=rf"'query' was never seen at its {side} in 2 observed steps; .*"
    ):
        held.of("query", [kind])
    other = "output_moment" if side == "input" else "input_abs"
    assert held.of("query", [other]).values, "the other side can still be had"


def test_skipped_steps_are_the_loss_s_and_the_worst_layer_s(held: Statistics) -> None:
    assert held.num_skipped == Statistics().num_skipped == 0
    held.skipped = 2
    held.outputs["key"].add_gradients_(torch.full((1, OUT), torch.nan), 1)
    assert held.num_skipped == 3
    figures = {"steps": 2, "tokens": 6, "skipped": 3, "bytes": held.nbytes}
    assert held.figures() == figures


def test_what_is_cleared_was_never_seen(held: Statistics) -> None:
    held.skipped = 1
    held.clear_()
    assert held == Statistics()


def test_statistics_merge_counts_and_layers(held: Statistics) -> None:
    whole, held.skipped = Statistics(), 1
    whole.merge_(held)
    whole.merge_(held)
    torch.testing.assert_close(
        whole.of("key", KINDS).moment("output_moment"),
        2 * held.of("key", KINDS).moment("output_moment"),
    )
    assert (whole.steps, whole.tokens, whole.skipped) == (4, 12, 2)
    assert held.steps == 2
    assert held.outputs["key"].examples == 2, "what was merged is left as it was"


@pytest.mark.parametrize("there", ["key", "first"])
def test_statistics_of_layers_that_share_otherwise_are_not_merged(
    held: Statistics, there: str
) -> None:
    other = Statistics()
    other.merge_(held)
    other.source["key"] = there
    with pytest.raises(
        ObservationError, match=rf"'key' reads the tensor of 'query' here and of '{there}' there"
    ):
        held.merge_(other)


def test_gradients_of_different_layers_are_not_merged(held: Statistics) -> None:
    one, other = Statistics(), Statistics()
    one.outputs = {"query": held.outputs["query"]}
    other.outputs = {"key": held.outputs["key"]}
    with pytest.raises(ObservationError, match=r"different layers cannot be merged: 'key'"):
        one.merge_(other)


def test_statistics_of_different_kinds_are_not_merged(held: Statistics) -> None:
    other = Statistics()
    other.merge_(held)
    del other.inputs["query"].values["input_abs"]
    before = held.state_dict()
    with pytest.raises(ObservationError, match=r"'query'.*input_abs"):
        held.merge_(other)
    assert held.inputs["query"].tokens == before["inputs"]["query"]["tokens"]  # type: ignore[index]


def test_statistics_come_back_from_their_state(held: Statistics) -> None:
    held.skipped = 1
    again = Statistics()
    again.load_state_dict(held.state_dict(), "cpu")
    assert (again.steps, again.tokens, again.skipped) == (2, 6, 1)
    assert again.source == held.source
    for name in ("query", "key"):
        for kind in KINDS:
            assert again.of(name, KINDS).moment(kind).equal(held.of(name, KINDS).moment(kind))
    assert again.nbytes == held.nbytes > 0
    again.load_state_dict(held.state_dict(), "meta")
    assert all(sums.tokens.is_meta for sums in (again.inputs["query"], again.outputs["key"]))


@pytest.mark.parametrize("part", ["inputs", "outputs", "source", "counts"])
def test_a_state_that_lacks_a_part_is_refused_and_changes_nothing(
    held: Statistics, part: str
) -> None:
    state = held.state_dict()
    del state[part]
    empty = Statistics()
    with pytest.raises(CheckpointError, match=f"no statistics can be read.*{part}"):
        empty.load_state_dict(state, "cpu")
    assert empty == Statistics()


@pytest.mark.parametrize(
    "state",
    [
        {"inputs": [], "outputs": {}, "source": {}, "counts": [0, 0, 0]},
        {"inputs": {}, "outputs": {}, "source": {}, "counts": [0, 0]},
        {"inputs": {"a": {"input_sum": torch.zeros(2)}}, "outputs": {}, "source": {}, "counts": []},
    ],
)
def test_a_state_of_other_types_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"no statistics can be read from this state"):
        Statistics().load_state_dict(state, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_added_in_float32_whatever_autocast_says(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kinds = (*KINDS, "input_sum")
    x, g = torch.randn(4, 5, 6), torch.randn(4, 5, 3) * 1e-4
    found = []
    for enabled in (True, False):
        sums = Sums.zeros(shapes(kinds, 6, 3), "cpu")
        with torch.autocast("cpu", dtype, enabled=enabled):
            sums.add_inputs_(x.reshape(-1, 6))
            sums.add_gradients_(g.reshape(-1, 3), 4)
            sums.add_weighted_(x.reshape(-1, 6), g.reshape(-1, 3))
            sums.add_fisher_(x, g)
        found.append(sums.values)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
