"""Matrix mathematics against its definitions."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrcompress import linalg
from lrcompress.linalg import add_gram_, balanced, root, shrunk, symmetric


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


PACKAGE = Path(linalg.__file__).parent
OTHERS = {"linalg.py", "solvers/kronecker.py"}  # there, also of what was in float64 before


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_float64_is_asked_for_where_the_device_is_looked_at(path: Path) -> None:
    """By :func:`~lrcompress.linalg.double`: some devices have none."""
    calls = [
        node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]
    found = [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "double"]
    assert not found or path.relative_to(PACKAGE).as_posix() in OTHERS


def test_float64_is_on_the_host_where_a_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, dtype=torch.bfloat16)
    assert linalg.double(x).dtype == torch.float64
    with torch.device("meta"):
        there = torch.ones(2)
    assert linalg.double(there).is_meta
    monkeypatch.setattr(linalg, "_WITHOUT_FLOAT64", {"meta"})
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        linalg.double(there)  # it would have been copied to the host


@pytest.mark.parametrize("features", [1, 5, 511, 512, 515, 600])
def test_add_gram_adds_the_product_whatever_the_blocks(features: int) -> None:
    x, y = torch.randn(7, features), torch.randn(3, features)
    total = torch.zeros(features, features)
    add_gram_(total, x)
    add_gram_(total, y)
    torch.testing.assert_close(symmetric(total), x.mT @ x + y.mT @ y, rtol=1e-5, atol=1e-5)


def test_add_gram_of_no_token_adds_nothing() -> None:
    total = torch.ones(4, 4)
    add_gram_(total, torch.zeros(0, 4))
    assert symmetric(total).equal(torch.ones(4, 4))


def test_symmetric_reads_the_upper_triangle_only() -> None:
    whole = torch.randn(5, 5)
    whole = whole + whole.mT
    assert symmetric(whole.triu() + torch.full((5, 5), 7.0).tril(-1)).equal(whole)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_shrunk_is_the_same_for_a_diagonal_and_for_its_matrix(share: float) -> None:
    diagonal = torch.rand(6)
    kept = diagonal.clone()
    expected = (1 - share) * diagonal + share * diagonal.mean()
    torch.testing.assert_close(shrunk(diagonal, share), expected)
    torch.testing.assert_close(shrunk(diagonal.diag(), share), expected.diag())
    assert diagonal.equal(kept), "the argument is left as it was"


def test_shrunk_keeps_the_trace_and_what_is_off_the_diagonal_in_proportion() -> None:
    x = torch.randn(9, 4)
    moment = x.mT @ x
    result = shrunk(moment, 0.25)
    torch.testing.assert_close(result.trace(), moment.trace())
    off = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(result[off], 0.75 * moment[off])


@pytest.mark.parametrize("tokens", [1, 3, 50], ids=["rank one", "singular", "definite"])
def test_root_times_its_transpose_is_the_moment(tokens: int) -> None:
    x = torch.randn(tokens, 6, dtype=torch.float64)
    moment = x.mT @ x
    r, triangular = root(moment)
    torch.testing.assert_close(r @ r.mT, moment, rtol=0, atol=1e-8 * float(moment.diagonal().max()))
    assert triangular == (tokens == 50)
    assert not triangular or r.equal(r.tril())


@pytest.mark.parametrize("least", [0.0, 1e-13, 1e-3])
def test_root_with_a_floor_can_be_inverted(least: float) -> None:
    energies = torch.tensor([4.0, 2.0, least, least], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    r, triangular = root(basis @ energies.diag() @ basis.mT, floor=1e-6)
    raised = basis @ energies.clamp(min=4e-6).diag() @ basis.mT
    torch.testing.assert_close(r @ r.mT, raised, rtol=0, atol=1e-9)
    gram = r.mT @ r
    assert triangular or gram.allclose(gram.diagonal().diag(), atol=1e-12)


def test_root_of_a_matrix_that_rounding_made_indefinite_is_finite() -> None:
    r, triangular = root(torch.diag(torch.tensor([1.0, -1e-17], dtype=torch.float64)))
    assert not triangular
    assert r.isfinite().all()


def norms(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left.norm(dim=0), right.norm(dim=1)


def test_balanced_factors_have_the_same_product_and_even_norms() -> None:
    left, right = torch.randn(7, 3) * torch.tensor([1e3, 1.0, 1e-3]), torch.randn(3, 5)
    even = balanced(left, right)
    torch.testing.assert_close(even[0] @ even[1], left @ right)
    torch.testing.assert_close(*norms(*even))


def test_balancing_twice_changes_nothing_more() -> None:
    once = balanced(torch.randn(7, 3), torch.randn(3, 5))
    torch.testing.assert_close(balanced(*once), once)


def test_a_component_that_is_zero_on_one_side_is_kept_alive_on_the_other() -> None:
    left, right = torch.randn(7, 2), torch.randn(2, 5)
    right[1] = 0
    even = balanced(left, right)
    torch.testing.assert_close(even[0] @ even[1], left @ right)
    assert even[0][:, 1].norm() > 1e-4 * even[0][:, 0].norm()


def test_balancing_zero_stays_zero_and_finite() -> None:
    left, right = balanced(torch.randn(4, 2), torch.zeros(2, 3))
    assert left.isfinite().all()
    assert right.equal(torch.zeros(2, 3))


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("name", ["eigh", "eigvalsh"])
def test_a_solver_that_gives_up_is_not_the_last(
    name: str, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = getattr(torch.linalg, name), []

    def gives_up(matrix: Tensor) -> object:
        calls.append(matrix)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return plain(matrix)

    x = torch.randn(3, 8, dtype=torch.float64)
    matrix = x.mT @ x  # of low rank, as moments of few tokens are
    expected = plain(matrix)
    monkeypatch.setattr(torch.linalg, name, gives_up)
    found = getattr(linalg, name)(matrix)
    values = (expected, found) if name == "eigvalsh" else (expected[0], found[0])
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)
    if name == "eigh":
        torch.testing.assert_close(found[1] * found[0] @ found[1].mT, matrix)
    assert len(calls) == failures + 1


def test_what_no_solver_can_do_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(matrix: Tensor) -> object:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):
        linalg.eigh(torch.eye(2))
