"""Masks at the edges of what they fit, what is said then, and tokens of several uses together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lrcompress.errors import ObservationError, ShapeError
from lrcompress.statistics.masks import Mask, Tokens, batch_mask, by_example, joined

REAL = torch.tensor([[1, 1, 1], [1, 1, 0]])
IDS = torch.tensor([[7, 12, 30], [40, 1, 0]])
RAGGED = torch.arange(6) < torch.tensor([[6], [2], [3], [5]])


def numbered(*sizes: int) -> Tensor:
    return torch.arange(torch.Size(sizes).numel(), dtype=torch.float32).reshape(sizes)


# What is said


@pytest.mark.parametrize(
    ("batch", "mask", "told"),
    [
        ({"ids": IDS, "y": IDS[0]}, "y", r"lambda batch: batch\['input_ids'\] != 0, or mask=None"),
        (
            torch.ones(2, 3, 4),
            lambda batch: batch[0, 0],
            r"has Tensor; give a function such as lambda",
        ),
        ("text", lambda _: REAL[0], r"has str; give a function such as lambda batch: batch\[0\]"),
    ],
)
def test_where_nothing_is_like_a_mask_a_function_is_proposed(
    batch: Any, mask: Any, told: str
) -> None:
    with pytest.raises(ShapeError, match=told):
        batch_mask(batch, mask, "Owner")


def test_three_odd_values_are_shown_and_both_sides_are_named() -> None:
    for mask, words in (
        ("ids", "1 at tokens and 0 at padding"),
        ("~ids", "1 at padding and 0 at tokens"),
    ):
        with pytest.raises(ObservationError, match=f"is {words}, and .* with 7, 12, 30; the batch"):
            batch_mask({"ids": IDS}, mask, "Owner")


@pytest.mark.parametrize("mask", ["m", "~m"])
@pytest.mark.parametrize("found", [-REAL, REAL / 2])
def test_only_floats_below_zero_are_added_to_scores(found: Tensor, mask: str) -> None:
    with pytest.raises(ObservationError, match="; name another with mask="):
        batch_mask({"m": found}, mask, "Owner")


@pytest.mark.parametrize(
    ("batch", "source"), [(IDS, "a.b"), ((IDS, REAL), "X1"), ({"a": {"b": REAL}}, "a.b.c.d")]
)
def test_keys_that_lead_nowhere_are_missing(batch: Any, source: str) -> None:
    found, missing = batch_mask(batch, source, "Owner")
    assert found is None
    assert f"the batch's {source!r}, which this batch does not have" in str(missing)


def test_a_key_may_lead_through_several_mappings() -> None:
    assert batch_mask({"a": {"b": {"c": REAL}}}, "a.b.c", "Owner") == (REAL, None)


def test_by_default_a_layer_is_read_by_observe() -> None:
    told = r"layer 'layer' reads \(4, 5, 1\), and .* tokens: observe cannot tell"
    with pytest.raises(ObservationError, match=told):
        Mask(RAGGED).fit(numbered(4, 5, 1))


# What fits


@pytest.mark.parametrize("sizes", [(4, 6, 2), (6, 4, 2), (24, 2), (4, 3, 6, 2)])
@pytest.mark.parametrize("first", [False, True])
def test_tokens_are_on_the_device_of_what_is_read(sizes: tuple[int, ...], first: bool) -> None:
    found = Mask(RAGGED).fit(torch.empty(sizes, device="meta"), sequence_first=first)
    assert found.real is not None
    assert found.real.is_meta


@pytest.mark.parametrize(
    ("rows", "sizes"), [(4, (25, 1)), (2, (1, 9, 1)), (2, (1, 4, 1)), (3, (3, 1))]
)
def test_what_has_no_tokens_of_its_own_is_whole(rows: int, sizes: tuple[int, ...]) -> None:
    x = numbered(*sizes)
    assert Mask(RAGGED[:rows]).fit(x).of(x).equal(x.reshape(-1, 1))


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        (RAGGED[:, :4], (4, 3, 5, 1)),  # as many examples as tokens, and neither is an axis
        (RAGGED, (4, 8, 1)),  # longer than the mask
        (torch.zeros(4, 6), (4, 5, 1)),  # no token to cut at
        (torch.ones(4, 20) * (torch.arange(20) < 9), (4, 8, 1)),  # shorter than the longest
    ],
)
def test_what_is_of_other_sizes_does_not_fit(grid: Tensor, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ObservationError, match="cannot tell which are padding"):
        Mask(grid).fit(numbered(*sizes))


def test_batches_are_cut_to_the_next_multiple_of_eight() -> None:
    wide, x = torch.ones(4, 20) * (torch.arange(20) < 9), numbered(4, 16, 1)
    assert Mask(wide).fit(x).of(x).equal(x[:, :9].reshape(-1, 1))


@pytest.mark.parametrize("features", [1, 2, 5])
def test_choices_stay_together_however_many_features_there_are(features: int) -> None:
    grid = torch.arange(5) < torch.tensor([[5, 2, 3], [4, 1, 2]])[..., None]
    mask, x = Mask(grid), 1 + numbered(2, 3, 5, features)
    wanted = torch.where(grid[..., None], x, 0).reshape(2, 15, features)
    for layout in (x, x.flatten(0, 1), x.flatten(0, 2)):
        assert mask.fit(layout).by_example(layout).equal(wanted)
    heads = x.flatten(0, 1)[:, None].expand(-1, 4, -1, -1)  # (6, 4, 5, features)
    found = mask.fit(heads).by_example(heads)
    assert found.equal(
        wanted.view(2, 3, 1, 5, features).expand(-1, -1, 4, -1, -1).reshape(2, 60, features)
    )


# Several uses


def test_tokens_of_uses_come_one_after_the_other_and_of_one_without_a_copy() -> None:
    parts = [(1 + numbered(4, 6, 2), Mask(RAGGED).fit(numbered(4, 6, 2))) for _ in range(3)]
    one = parts[0][0][RAGGED]
    for count in (1, 2, 3):
        assert joined(parts[:count]).equal(torch.cat([one] * count))
    whole = numbered(4, 6, 2)
    assert joined([(whole, Tokens())]).data_ptr() == whole.data_ptr()


def test_uses_by_as_many_examples_come_together_along_their_tokens() -> None:
    x, g = 1 + numbered(4, 6, 2), -1 - numbered(4, 6, 3)
    more, other = numbered(4, 2, 2), numbered(4, 2, 3)
    places = numbered(1, 6, 2), numbered(1, 6, 3)
    real = Mask(RAGGED).fit(x)
    together, apart = by_example([(x, g, real), (*places, Tokens()), (more, other, Tokens())])
    zeroed = [torch.where(RAGGED[..., None], y, 0) for y in (x, g)]
    for found, first, second in zip(together, zeroed, (more, other), strict=True):
        assert found.equal(torch.cat([first, second], 1))
    for found, wanted in zip(apart, places, strict=True):
        assert found.equal(wanted)
