"""Padding and tokens the wrong way: when gradients are looked at, and what is said."""

import pytest
import torch

from lrcompress.errors import ObservationError
from lrcompress.statistics.masks import Mask, MaskSource, Tokens
from lrcompress.statistics.padding_check import PaddingCheck

RAGGED = torch.arange(6) < torch.tensor([[6], [2], [3], [5]])


def test_gradients_are_looked_at_once_and_none_say_nothing() -> None:
    check, tokens = PaddingCheck(), Mask(RAGGED).fit(torch.zeros(4, 6, 2))
    check.add(tokens, torch.zeros(4, 6, 2))
    check.check("Owner")
    assert check.wants(tokens)
    check.add(tokens, torch.ones(4, 6, 2))
    check.check("Owner")
    assert not check.wants(tokens)
    assert not check.wants(Tokens())


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("real", r"at its tokens \(mask='real'\).* name such a one as mask='~key'"),
        (1, r"\(mask=1\).* name such a one as mask='~key'"),
        (None, r"at its tokens\. A mask is nonzero at tokens; .* as mask='~key'"),
        ("~1", r"\(mask='~1'\)\. With ~ .* nonzero at tokens: leave the ~ out, mask='1'"),
    ],
)
def test_the_way_out_is_one_that_was_not_taken(source: MaskSource, told: str) -> None:
    check, tokens = PaddingCheck(), Mask(RAGGED).fit(torch.zeros(4, 6, 2))
    check.add(tokens, torch.where(RAGGED, 0.0, 1.0)[..., None])
    with pytest.raises(ObservationError, match="Owner: all gradients lie where .*" + told):
        check.check("Owner", source)


def test_gradients_that_cancel_out_are_gradients_all_the_same() -> None:
    check, tokens = PaddingCheck(), Mask(RAGGED).fit(torch.zeros(4, 6, 2))
    check.add(tokens, 1e-9 * torch.tensor([1.0, -1.0]).expand(4, 6, 2))
    check.check("Owner")
    assert not check.wants(tokens)


@pytest.mark.parametrize("first", [False, True])
def test_it_is_enough_that_one_layer_has_gradients_at_tokens(first: bool) -> None:
    check, tokens = PaddingCheck(), Mask(RAGGED).fit(torch.zeros(4, 6, 2))
    wrong, right = (torch.where(side == RAGGED, 1.0, 0.0)[..., None] for side in (False, True))
    for gradient in (right, wrong) if first else (wrong, right):
        check.add(tokens, gradient)
    check.check("Owner")
    assert not check.wants(tokens)
    check.add(tokens, wrong)  # it is no longer looked at
    check.check("Owner")


def test_what_an_interrupted_step_added_is_forgotten() -> None:
    check, tokens = PaddingCheck(), Mask(RAGGED).fit(torch.zeros(4, 6, 2))
    check.add(tokens, torch.where(RAGGED, 0.0, 1.0)[..., None])
    check.drop()
    check.check("Owner")
    assert check.wants(tokens)
    check.add(tokens, torch.where(RAGGED, 0.0, 1e-9)[..., None])
    with pytest.raises(ObservationError, match="all gradients lie"):
        check.check("Owner")
    check.check("Owner")  # what was told is told once
