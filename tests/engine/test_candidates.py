"""Layers as candidates for ranks: what they cost, and between which ranks they lie."""

import pytest
from torch import nn

from lrcompress.engine.candidates import candidates, parameters_of
from lrcompress.engine.settings import Settings
from lrcompress.errors import SettingError
from lrcompress.nn import LowRankLinear


def model() -> nn.Module:
    return nn.ModuleDict({"plain": nn.Linear(12, 8), "factored": LowRankLinear(12, 8, 3)})


NAMES = ("plain", "factored")


def test_a_layer_that_is_factored_gets_no_higher_rank_than_it_has() -> None:
    plain, factored = candidates(model(), NAMES, Settings(), {})
    assert (plain.in_features, plain.out_features) == (12, 8)
    assert plain.highest is None
    assert factored.highest == 3


def test_factors_cost_what_they_are_stored_as() -> None:
    (balanced,) = candidates(model(), ("plain",), Settings(), {})
    (pivoted,) = candidates(model(), ("plain",), Settings(storage="pivoted"), {})
    assert parameters_of(balanced, 3) is None  # a pair of factors, as any record counts it
    assert parameters_of(pivoted, 3) == 3 * (12 + 8 - 3)
    assert parameters_of(pivoted, None) is None


def test_layers_have_ranks_or_keeps_of_their_own() -> None:
    given = Settings(ranks={"plain": 2}, keeps={"fact*": 0.5})
    plain, factored = candidates(model(), NAMES, given, {})
    assert (plain.rank, plain.keep, factored.rank, factored.keep) == (2, None, None, 0.5)
    both = Settings(ranks={"*": 2}, keeps={"plain": 0.5})
    with pytest.raises(SettingError, match="layer 'plain' is given both a rank and a keep"):
        candidates(model(), NAMES, both, {})
