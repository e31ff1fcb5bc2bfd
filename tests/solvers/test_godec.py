"""GoDec against what it promises: exact recovery, errors that never rise, the same support."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError, ShapeError
from lrcompress.solvers.godec import godec


def mixture(out: int, inp: int, rank: int, entries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix of exactly low rank plus large entries, and where they are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    weight = weight @ torch.randn(rank, inp, generator=generator, dtype=torch.float64)
    support = torch.randperm(out * inp, generator=generator)[:entries].sort().values
    signs = torch.randint(0, 2, (entries,), generator=generator) * 2 - 1
    weight.view(-1)[support] += 10.0 * signs
    return weight, support


@pytest.mark.parametrize(("out", "inp"), [(40, 30), (25, 60)])
def test_recovers_low_rank_plus_sparse(out: int, inp: int) -> None:
    weight, support = mixture(out, inp, rank=3, entries=25)

    found = godec(weight, 3, 25, tolerance=1e-9, most_sweeps=500)

    assert found.support.tolist() == support.tolist()
    whole = found.left @ found.right
    whole.view(-1)[found.support] += found.values
    torch.testing.assert_close(whole, weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.left.mT @ found.left, torch.eye(3, dtype=torch.float64))
    assert found.errors[-1] == pytest.approx(float((weight - whole).norm() / weight.norm()))


@pytest.mark.parametrize(("rank", "entries"), [(1, 0), (4, 7), (8, 40), (0, 5), (20, 3)])
def test_the_error_never_rises_and_ends_at_the_tolerance(rank: int, entries: int) -> None:
    torch.manual_seed(1)
    weight = torch.randn(20, 30)

    found = godec(weight, rank, entries, tolerance=1e-3)

    errors = found.errors
    assert all(b <= a * (1 + 1e-12) + 1e-12 for a, b in pairwise(errors))
    assert errors[-2] - errors[-1] <= 1e-3 * errors[-2]
    assert all(a - b > 1e-3 * a for a, b in pairwise(errors[:-1]))


def test_without_entries_it_is_the_truncated_svd() -> None:
    torch.manual_seed(2)
    weight = torch.randn(12, 9) * torch.logspace(0, -2, 9)
    u, s, vh = torch.linalg.svd(weight.double())

    found = godec(weight, 3, 0, tolerance=0, most_sweeps=300)

    torch.testing.assert_close(found.left @ found.right, u[:, :3] * s[:3] @ vh[:3])
    assert not len(found.support)


def test_without_a_rank_it_is_the_largest_entries() -> None:
    weight = torch.tensor([[1.0, -7.0, 2.0], [4.0, 0.0, -3.0]])

    found = godec(weight, 0, 3)

    assert found.support.tolist() == [1, 3, 5]
    assert found.values.tolist() == [-7, 4, -3]
    assert (found.left @ found.right).count_nonzero() == 0


def test_a_seed_gives_the_same_support_and_leaves_random_numbers_alone() -> None:
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    state = torch.get_rng_state()
    first, second = (godec(weight, 2, 9, seed=5) for _ in range(2))
    assert torch.equal(first.support, second.support)
    assert torch.equal(first.left, second.left)
    assert torch.equal(torch.get_rng_state(), state)
    stored = weight.mT.contiguous().mT  # as a Conv1D holds it
    assert torch.equal(godec(stored, 2, 9, seed=5).support, first.support)


def test_a_weight_of_zeros_has_no_error() -> None:
    assert godec(torch.zeros(4, 4), 2, 2).errors == (0.0, 0.0), "and is done at once"


def test_says_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"weight must be a matrix, got shape \(4,\)"):
        godec(torch.zeros(4), 1, 1)
    with pytest.raises(ShapeError, match=r"rank must be from 0 to 2 for a weight \(2, 3\), got 3"):
        godec(torch.zeros(2, 3), 3, 1)
    with pytest.raises(ShapeError, match=r"entries must be from 0 to 6 for a weight .*, got -1"):
        godec(torch.zeros(2, 3), 1, -1)
    with pytest.raises(NotFiniteError, match=r"weight holds 1 non-finite of 6 values"):
        godec(torch.tensor([[1.0, 2.0, float("nan")], [0.0, 0.0, 0.0]]), 1, 1)


def test_sweeps_end_where_they_are_told_to_and_as_documented_by_default() -> None:
    torch.manual_seed(4)
    weight = torch.randn(12, 10)
    assert [len(godec(weight, 2, 9, tolerance=0, most_sweeps=n).errors) for n in (1, 3)] == [1, 3]
    documented = godec(weight, 2, 9, seed=0, tolerance=1e-4, most_sweeps=100)
    assert godec(weight, 2, 9).errors == documented.errors
    assert len(documented.errors) > 2
    assert len(godec(weight, 2, 9, tolerance=-1.0).errors) == 100, "whatever is gained"
