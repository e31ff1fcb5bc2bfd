"""Errors of single rows against the truncations themselves, taken away from the weight."""

import pytest
import torch
from torch import Tensor

from lrcompress.solvers.row_errors import row_energies
from lrcompress.solvers.truncation import truncate

KINDS = ["none", "diagonal", "full"]
SHAPES = [(5, 9), (9, 5), (6, 6)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["wide", "tall", "square"])
each_output = pytest.mark.parametrize("output", KINDS)
each_input = pytest.mark.parametrize("input_", KINDS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def metric(kind: str, size: int, samples: int = 40) -> Tensor | None:
    if kind == "none":
        return None
    x = randn(samples, size) * torch.logspace(0, 1, size).double()
    return x.square().mean(0) if kind == "diagonal" else x.mT @ x / samples


def whole(side: Tensor | None, size: int) -> Tensor:
    if side is None:
        return torch.eye(size, dtype=torch.float64)
    return side.diag() if side.ndim == 1 else side


def slow(w: Tensor, g: Tensor | None, c: Tensor | None, most: int) -> Tensor:
    """``G_ii (W − M_r)_i C (W − M_r)_iᵀ``, rank by rank and row by row."""
    heights, inputs = whole(g, w.shape[0]).diagonal(), whole(c, w.shape[1])
    rows = []
    for rank in range(most + 1):
        rest = w
        if rank:
            factors = truncate(w, g, c).factors(rank)
            rest = w - factors.left @ factors.right
        rows.append([float(heights[i] * (row @ inputs @ row)) for i, row in enumerate(rest)])
    return torch.tensor(rows).double()


def assert_agree(w: Tensor, g: Tensor | None, c: Tensor | None, most: int) -> None:
    energies = row_energies(w, g, c, truncate(w, g, c), most)
    expected = slow(w.double(), g, c, most)
    assert energies.dtype == torch.float64
    assert energies.shape == (most + 1, w.shape[0])
    assert (energies >= 0).all()
    torch.testing.assert_close(energies, expected, rtol=1e-6, atol=1e-9 * float(expected.max()))


@each_shape
@each_output
@each_input
def test_row_energies_are_those_of_the_remainder_at_every_rank(
    shape: tuple[int, int], output: str, input_: str
) -> None:
    w, g, c = randn(*shape), metric(output, shape[0]), metric(input_, shape[1])
    for most in (0, 1, 3, min(shape)):
        assert_agree(w, g, c, most)


@each_shape
@each_output
@pytest.mark.parametrize("samples", [1, 3])
def test_inputs_of_fewer_tokens_than_features_are_no_obstacle(
    shape: tuple[int, int], output: str, samples: int
) -> None:
    """Also at ranks beyond what the metric sees, where nothing is lost any more."""
    w, g, c = randn(*shape), metric(output, shape[0]), metric("full", shape[1], samples)
    assert_agree(w, g, c, min(shape))
    lost = row_energies(w, g, c, truncate(w, g, c), min(shape))
    assert (lost[samples:] <= 1e-9 * lost[0].max()).all()


@each_shape
def test_dead_inputs_are_no_obstacle(shape: tuple[int, int]) -> None:
    c = metric("full", shape[1])
    assert c is not None
    c[1], c[:, 1] = 0, 0
    assert_agree(randn(*shape), metric("full", shape[0]), c, 4)


@each_shape
@each_input
def test_with_a_diagonal_output_metric_rows_add_up_to_the_error(
    shape: tuple[int, int], input_: str
) -> None:
    w, g, c = randn(*shape), metric("diagonal", shape[0]), metric(input_, shape[1])
    solved = truncate(w, g, c)
    energies = row_energies(w, g, c, solved, min(shape))
    tails = [solved.energies[rank:].sum() for rank in range(min(shape) + 1)]
    scale = float(solved.energies.sum())
    torch.testing.assert_close(energies.sum(1), torch.stack(tails), rtol=1e-6, atol=1e-9 * scale)


@each_shape
def test_rows_the_loss_does_not_depend_on_lose_nothing(shape: tuple[int, int]) -> None:
    g = metric("diagonal", shape[0])
    assert g is not None
    g[2] = 0
    w, c = randn(*shape), metric("full", shape[1])
    assert not row_energies(w, g, c, truncate(w, g, c), 3)[:, 2].any()


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@each_shape
def test_energies_scale_with_both_metrics(shape: tuple[int, int], scale: float) -> None:
    w, g, c = randn(*shape), metric("full", shape[0]), metric("full", shape[1])
    assert g is not None
    assert c is not None
    plain = row_energies(w, g, c, truncate(w, g, c), 3)
    for pair in ((scale * g, c), (g, scale * c)):
        scaled = row_energies(w, *pair, truncate(w, *pair), 3)
        torch.testing.assert_close(scaled, scale * plain, rtol=1e-6, atol=0)


def test_a_weight_of_low_precision_is_measured_in_float64() -> None:
    w, c = randn(5, 9).bfloat16(), metric("full", 9)
    truncation = truncate(w.double(), None, c)
    exact = row_energies(w.double(), None, c, truncation, 3)
    torch.testing.assert_close(row_energies(w, None, c, truncation, 3), exact)


@each_shape
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_metrics_of_float32_are_taken_as_they_are(shape: tuple[int, int], kind: str) -> None:
    w, g, c = randn(*shape), metric(kind, shape[0]), metric(kind, shape[1])
    assert g is not None
    assert c is not None
    truncation, plain = truncate(w, g, c), truncate(w.float(), g.float(), c.float())
    found = row_energies(w.float(), g.float(), c.float(), plain, 3)
    assert found.dtype == torch.float64
    expected = row_energies(w, g, c, truncation, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
