"""Which entries stay, against sorting them all."""

import pytest
import torch

from lrcompress.errors import SettingError
from lrcompress.pruning.magnitude import check_scope, largest


@pytest.mark.parametrize("keep", [0.0, 0.013, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_largest_stay_and_no_others(keep: float, scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.rand(shape, generator=generator)
        for name, shape in (("a", (7, 9)), ("b", (30,)), ("c", (2, 3)))
    }
    stays = largest(scores, keep, scope)
    assert {n: x.shape for n, x in stays.items()} == {n: x.shape for n, x in scores.items()}
    groups = [[name] for name in scores] if scope == "layer" else [list(scores)]
    for names in groups:
        flat = torch.cat([scores[name].flatten() for name in names])
        found = torch.cat([stays[name].flatten() for name in names])
        wanted = sorted(flat.tolist(), reverse=True)[: round(keep * len(flat))]
        assert sorted(flat[found].tolist(), reverse=True) == wanted


def test_of_equal_ones_the_first_stay_and_infinite_ones_always_do() -> None:
    scores = {"a": torch.ones(4), "b": torch.tensor([1.0, torch.inf, -1.0, 0.0])}
    stays = largest(scores, 0.5, "global")
    assert stays["a"].tolist() == [True, True, True, False]
    assert stays["b"].tolist() == [False, True, False, False]


def test_says_which_scopes_there_are() -> None:
    check_scope("layer")
    with pytest.raises(SettingError, match="scope must be one of global, layer, got 'model'"):
        check_scope("model")
