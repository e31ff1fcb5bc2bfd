"""How what remains is shared out: what may be asked for, and what is left on the way."""

import dataclasses
import math
from typing import Any

import pytest

from lrcompress.errors import SettingError
from lrcompress.pruning import LoSparseBudget, Quota


@pytest.mark.parametrize(
    ("given", "sparse", "start_rank", "competes"),
    [
        ({}, True, None, False),
        ({"low_rank_share": 0.5}, True, None, False),
        ({"low_rank_share": 0.5, "initial_rank": 0.4}, True, 0.4, False),
        ({"low_rank_share": 1}, False, 1.0, False),
        ({"low_rank_share": 1.0, "initial_rank": 0.4}, False, 0.4, False),
        ({"low_rank_share": "auto"}, True, None, False),
        ({"low_rank_share": "auto", "initial_rank": 1}, True, 1, True),
        ({"granularity": "entries"}, True, None, False),
        ({"granularity": "entries", "initial_rank": 0.4}, True, 0.4, False),
    ],
)
def test_shares_say_what_there_is_to_prune(
    given: dict[str, Any], sparse: bool, start_rank: float | None, competes: bool
) -> None:
    shares = LoSparseBudget(keep=0.3, **given)
    assert shares.sparse == sparse
    assert shares.start_rank == start_rank
    assert shares.competes == competes


def test_by_default_shares_are_those_of_losparse() -> None:
    shares = LoSparseBudget(keep=0.2)
    assert (shares.low_rank_share, shares.initial_rank) == (0.25, None)
    assert (shares.row_score, shares.granularity, shares.revive) == ("mean", "rows", False)


@pytest.mark.parametrize("keep", [0, -1, 1.5, math.nan, "0.3", True, None])
def test_a_keep_out_of_range_is_refused(keep: Any) -> None:
    with pytest.raises(SettingError, match=rf"^keep must be above 0 and at most 1 .*got {keep!r}"):
        LoSparseBudget(keep=keep)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan, True, None, "0.5", "all"])
def test_a_low_rank_share_out_of_range_is_refused(share: Any) -> None:
    message = rf"^low_rank_share must be above 0 and at most 1, or 'auto', got {share!r}$"
    with pytest.raises(SettingError, match=message):
        LoSparseBudget(keep=0.3, low_rank_share=share)


@pytest.mark.parametrize("rank", [0, -0.1, 1.1, 8, math.nan, True, "auto", "0.5"])
def test_an_initial_rank_that_is_no_share_is_refused(rank: Any) -> None:
    message = rf"^initial_rank is a share of the full rank, above 0 and at most 1, got {rank!r}$"
    with pytest.raises(SettingError, match=message):
        LoSparseBudget(keep=0.3, initial_rank=rank)


@pytest.mark.parametrize("score", ["max", "", None])
def test_an_unknown_row_score_is_refused(score: Any) -> None:
    with pytest.raises(
        SettingError, match=rf"^row_score must be one of mean, group, got {score!r}"
    ):
        LoSparseBudget(keep=0.3, row_score=score)


@pytest.mark.parametrize("granularity", ["row", "", None])
def test_an_unknown_granularity_is_refused(granularity: Any) -> None:
    message = rf"^granularity must be one of rows, entries, got {granularity!r}$"
    with pytest.raises(SettingError, match=message):
        LoSparseBudget(keep=0.3, granularity=granularity)


@pytest.mark.parametrize("share", [1, 1.0, "auto"])
def test_entries_need_a_budget_of_their_own(share: Any) -> None:
    message = (
        "^granularity='entries' prunes a sparse part of its own budget: "
        rf"low_rank_share must be a number below 1, got {share!r}$"
    )
    with pytest.raises(SettingError, match=message):
        LoSparseBudget(keep=0.3, granularity="entries", low_rank_share=share)


def test_shares_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoSparseBudget(keep=0.3).keep = 0.5  # type: ignore[misc]


def test_a_quota_falls_from_what_there_is_to_what_stays() -> None:
    quota = Quota(("rows",), 1000, 200)
    assert [quota.at(share) for share in (1.0, 0.5, 0.125, 0.0)] == [1000, 600, 300, 200]
