"""Which entries stay, against sorting them all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompress.errors import SettingError
from lrcompress.pruning.dsee import prune_
from lrcompress.pruning.magnitude import check_scope, largest, largest_entries


@pytest.mark.parametrize("keep", [0.0, 0.013, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_largest_stay_and_no_others(keep: float, scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.rand(shape, generator=generator)
        for name, shape in (("a", (7, 9)), ("b", (30,)), ("c", (2, 3)))
    }
    stays = dict(largest(scores, keep, scope))
    assert {n: x.shape for n, x in stays.items()} == {n: x.shape for n, x in scores.items()}
    groups = [[name] for name in scores] if scope == "layer" else [list(scores)]
    for names in groups:
        flat = torch.cat([scores[name].flatten() for name in names])
        found = torch.cat([stays[name].flatten() for name in names])
        wanted = sorted(flat.tolist(), reverse=True)[: round(keep * len(flat))]
        assert sorted(flat[found].tolist(), reverse=True) == wanted


def test_of_equal_ones_the_first_stay_and_infinite_ones_always_do() -> None:
    scores = {"a": torch.ones(4), "b": torch.tensor([1.0, torch.inf, -1.0, 0.0])}
    stays = dict(largest(scores, 0.5, "global"))
    assert stays["a"].tolist() == [True, True, True, False]
    assert stays["b"].tolist() == [False, True, False, False]


def slow(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The same by the ``count``-th largest of all entries in one tensor, as it was once."""
    flat = torch.cat([one.flatten() for one in scores.values()])
    stays = torch.zeros(len(flat), dtype=torch.bool)
    if count:
        least = flat.kthvalue(len(flat) - count + 1).values
        stays = flat > least
        ties = (flat == least).nonzero().squeeze(1)
        stays[ties[: count - int(stays.sum())]] = True
    parts = torch.split(stays, [one.numel() for one in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def some_scores(seed: int, dtype: torch.dtype, kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (40, 30), "b": (17,), "c": (0,), "d": (30, 40), "e": (25, 25)}
    scores = {name: torch.randn(s, generator=generator).abs() for name, s in shapes.items()}
    if kind == "ties and zeros":
        scores = {
            name: ((one * 3).round() / 3).clamp(min=0.3) - 0.3 for name, one in scores.items()
        }
        scores["b"] = -scores["b"]  # zeros of both signs are equal
    elif kind == "any size":
        for place, one in enumerate(scores.values()):
            one *= 10.0 ** (7 * place - 18 - 30 * (one > 1))  # some too small for a normal number
    elif kind == "masked":
        for one in scores.values():
            one[one < 0.4] = -1
            one[one > 2] = torch.inf
    scores["d"] = scores["d"].mT  # as the weight of a Conv1D
    return {name: one.to(dtype) for name, one in scores.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties and zeros", "any size", "masked"])
def test_masks_are_those_of_a_sort_of_all_entries(kind: str, dtype: torch.dtype) -> None:
    scores = some_scores(1, dtype, kind)
    total = sum(one.numel() for one in scores.values())
    for count in (0, 1, 2, 100, total // 3, total // 2, total - 100, total - 1, total):
        found, wanted = dict(largest_entries(scores, count)), slow(scores, count)
        assert list(found) == list(wanted)
        assert all(found[name].equal(wanted[name]) for name in scores)
        assert all(mask.is_contiguous() for mask in found.values())


def test_layers_of_unlike_types_are_compared_as_numbers() -> None:
    halves = some_scores(2, torch.bfloat16, "plain")
    scores = some_scores(3, torch.float32, "plain") | {"a": halves["a"], "e": halves["e"].half()}
    for count in (1, 500, 2000):
        found, wanted = dict(largest_entries(scores, count)), slow(scores, count)
        assert all(found[name].equal(wanted[name]) for name in scores)


def test_those_of_minus_infinity_are_never_taken() -> None:
    none = [[False, False]] * 2
    scores = {"a": torch.tensor([-torch.inf, -2.0]), "b": torch.tensor([-torch.inf, 1.0])}
    for count, wanted in (
        (-3, none),
        (0, none),
        (1, [none[0], [False, True]]),
        (4, [[False, True]] * 2),
    ):
        assert [mask.tolist() for _, mask in largest_entries(scores, count)] == wanted
    assert dict(largest_entries({}, 3)) == {}


@pytest.mark.parametrize("keep", [0.001, 0.5, 0.9])
def test_memory_is_that_of_the_largest_layer(keep: float, counting: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(200, 200, bias=False) for _ in range(12)]
    model = nn.Sequential(*layers, nn.Linear(200, 400, bias=False))
    model[3].weight.data.copy_(torch.randint(-9, 10, (200, 200)) / 9)  # ties
    weights = {f"{i}": layer.weight.detach().clone() for i, layer in enumerate(model)}
    wanted = slow({name: w.abs() for name, w in weights.items()}, round(keep * 560_000))
    with counting() as counted:
        prune_(model, list(weights), keep, "global")
    for name, weight in weights.items():
        assert model.get_submodule(name).weight.equal(weight * wanted[name])
    # scores, and two masks of a byte each
    assert counted.peak < 400 * 200 * (4 + 2) + 10_000
    assert counted.now < 10_000


def test_says_which_scopes_there_are() -> None:
    check_scope("layer")
    with pytest.raises(SettingError, match="scope must be one of global, layer, got 'model'"):
        check_scope("model")
