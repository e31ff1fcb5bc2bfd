"""Matrix mathematics against its definitions."""

import ast
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrcompress import linalg
from lrcompress.linalg import (
    add_gram_,
    balanced,
    finite_or_zero,
    for_gram,
    full_precision,
    least_squares,
    packed,
    packed_shape,
    per_example_squares,
    root,
    shrunk,
    symmetric,
    whitening,
)
from lrcompress.nn.kronecker import carry_kronecker
from lrcompress.solvers.kronecker import kronecker_sums, nearest_shape
from lrcompress.solvers.truncation import truncate
from lrcompress.statistics.moments import Sums, shapes
from lrcompress.structure.surgery import carry_dense, carry_factors, swap_parameters_


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


@pytest.mark.parametrize("features", [1, 5, 127, 129, 515, 768, 1030, 3100])
def test_add_gram_adds_the_product_whatever_the_blocks(features: int) -> None:
    x, y = torch.randn(7, features), torch.randn(3, features)
    total = torch.zeros(packed_shape(features))
    add_gram_(total, x)
    add_gram_(total, y)
    torch.testing.assert_close(symmetric(total), x.mT @ x + y.mT @ y, rtol=1e-5, atol=1e-5)


def test_add_gram_of_no_token_adds_nothing() -> None:
    total = torch.ones(packed_shape(4))
    add_gram_(total, torch.zeros(0, 4))
    assert symmetric(total).equal(torch.ones(4, 4))


def products_in_float32(x: Tensor, half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The Gram matrix by the product that CUDA has, with what it computes in place of it."""

    def addmm(
        total: Tensor,
        a: Tensor,
        b: Tensor,
        out_dtype: torch.dtype,
        *,
        beta: Any = 1,
        alpha: Any = 1,
    ) -> Tensor:
        assert a.dtype == b.dtype == half
        assert total.dtype == out_dtype == torch.float32
        return beta * total + alpha * (a.to(out_dtype) @ b.to(out_dtype))

    total = torch.ones(packed_shape(x.shape[1]))
    monkeypatch.setattr(linalg, "_sums_in_float32", lambda *_: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("addmm.dtype", addmm, "CPU")
        assert for_gram(x) is x
        add_gram_(total, x, 0.5)
    return symmetric(total)


@pytest.mark.skipif(not hasattr(torch.ops.aten.addmm, "dtype"), reason="torch 2.8 has it")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_products_of_halves_summed_in_float32_are_those_of_float32(
    half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(9, 515).to(half)
    assert for_gram(x).dtype == torch.float32  # a CPU has no such product
    total = torch.ones(packed_shape(515))
    add_gram_(total, for_gram(x), 0.5)
    torch.testing.assert_close(products_in_float32(x, half, monkeypatch), symmetric(total))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_on_cuda_products_of_halves_are_those_of_float32(half: torch.dtype) -> None:
    x = torch.randn(999, 515, device="cuda").to(half)
    whole = x.double().mT @ x.double()
    for given in (x, x.float()):
        total = torch.zeros(packed_shape(515), device="cuda")
        torch.set_float32_matmul_precision("high")
        try:
            add_gram_(total, for_gram(given))
        finally:
            torch.set_float32_matmul_precision("highest")
        torch.testing.assert_close(symmetric(total).double(), whole, rtol=1e-5, atol=1e-3)


BACKENDS = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
NEW = hasattr(BACKENDS[0], "fp32_precision")


def precision() -> tuple[str, ...]:
    """All that says how float32 is multiplied."""
    try:
        whole = torch.get_float32_matmul_precision()
    except RuntimeError:  # where it was set by backend alone
        whole = ""
    return whole, *(one.fp32_precision for one in BACKENDS if NEW)  # type: ignore[union-attr]


def lowered() -> bool:
    return BACKENDS[0].fp32_precision == "tf32" if NEW else precision()[0] != "highest"  # type: ignore[union-attr]


def lower(how: str) -> None:
    if how != "backend":
        torch.set_float32_matmul_precision(how)
    elif NEW:
        BACKENDS[0].fp32_precision = "tf32"  # type: ignore[union-attr]
        BACKENDS[1].fp32_precision = "bf16"  # type: ignore[union-attr]
    else:
        BACKENDS[0].allow_tf32 = True  # type: ignore[union-attr]


@pytest.fixture(params=["high", "medium", "backend"])
def allowed(request: pytest.FixtureRequest) -> Iterator[None]:
    before = precision()
    lower(request.param)
    yield
    torch.set_float32_matmul_precision("highest")
    for one, value in zip(BACKENDS, before[1:], strict=False):
        one.fp32_precision = value  # type: ignore[union-attr]
    assert precision() == before


@pytest.mark.usefixtures("allowed")
def test_full_precision_is_set_and_what_was_set_comes_back() -> None:
    before = precision()
    assert lowered()
    with full_precision():
        assert not lowered()
        assert "bf16" not in precision()
        with full_precision():
            assert not lowered()
        assert not lowered()
    assert precision() == before
    with pytest.raises(KeyboardInterrupt), full_precision():
        raise KeyboardInterrupt
    assert precision() == before


def test_where_nothing_is_lowered_nothing_is_set() -> None:
    before = precision()
    with full_precision():
        assert precision() == before
    assert precision() == before


@pytest.mark.usefixtures("allowed")
def test_the_last_thread_to_leave_puts_back_what_was_set() -> None:
    before, seen = precision(), []
    entered, left = Barrier(2), Barrier(2)

    def first() -> None:
        with full_precision():
            entered.wait()
        left.wait()

    other = Thread(target=first)
    other.start()
    with full_precision():
        entered.wait()
        left.wait()
        seen.append(lowered())
    other.join()
    assert seen == [False]
    assert precision() == before


def weighted() -> None:
    sums = Sums.zeros(shapes(["input_moment", "weighted_moment"], 6, 4))
    x, g = torch.randn(5, 6), torch.randn(5, 4)
    sums.add_inputs_(x)
    sums.add_gradients_(g, 1)
    sums.add_weighted_(x, g)


def fisher() -> None:
    for length in (2, 50):
        sums = Sums.zeros(shapes(["input_fisher", "output_fisher"], 6, 4))
        sums.add_fisher_(torch.randn(3, length, 6), torch.randn(3, length, 4))


def carried() -> None:
    for kronecker in (False, True):
        weight = nn.Parameter(torch.randn(4, 6))
        optimizer = torch.optim.Adam([weight])
        weight.square().sum().backward()
        optimizer.step()
        new = (
            [torch.randn(2, 2, 3), torch.randn(2, 2, 2)]
            if kronecker
            else [torch.randn(2, 6), torch.randn(4, 2)]
        )
        carry = carry_kronecker(*new, False) if kronecker else carry_dense(new[1], new[0], False)
        swap_parameters_([optimizer], [weight], list(map(nn.Parameter, new)), carry)


def kronecker() -> None:
    x = torch.randn(50, 12)
    metric = x.mT.double() @ x.double()
    kronecker_sums(torch.randn(8, 12), (2, 3), None, metric.float()).factors(2)
    nearest_shape(torch.randn(8, 12), 40, None, metric.float())


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("work", [weighted, fisher, carried, kronecker])
def test_statistics_and_carried_state_are_multiplied_in_full(work: Callable[[], None]) -> None:
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm", "addmm_", "bmm") and args[0].dtype == torch.float32:
                products.append((func, lowered()))
            return func(*args, **kwargs or {})

    with Products():
        work()
    assert products
    assert not [func for func, low in products if low]


@pytest.mark.parametrize("features", [1, 2, 128, 200, 800, 3200])
def test_of_a_symmetric_matrix_the_upper_triangle_is_packed_and_comes_back(features: int) -> None:
    whole = torch.randn(features, features)
    whole = whole + whole.mT
    kept = packed(whole.triu() + torch.full_like(whole, 7.0).tril(-1))
    assert symmetric(kept).equal(whole)
    assert symmetric(kept, torch.float64).equal(whole.double())


def test_packed_sums_of_other_features_have_other_lengths() -> None:
    sizes = [packed_shape(features)[1] for features in range(1, 4000)]
    assert all(less < more for less, more in pairwise(sizes))
    assert packed_shape(8192)[1] <= 0.54 * 8192**2
    assert packed_shape(768)[1] <= 0.59 * 768**2


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


@pytest.mark.parametrize("tokens", [3, 50], ids=["singular", "definite"])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_root_with_a_floor_does_not_depend_on_units(tokens: int, scale: float) -> None:
    x = torch.randn(tokens, 6, dtype=torch.float64)
    plain, scaled = (root(c * (x.mT @ x), floor=1e-4) for c in (1.0, scale))
    assert plain[1] == scaled[1] == (tokens == 50)
    torch.testing.assert_close(scaled[0] @ scaled[0].mT / scale, plain[0] @ plain[0].mT)


@pytest.mark.parametrize("tokens", [1, 4, 50], ids=["rank one", "singular", "definite"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("diagonal", [False, True])
def test_whitening_applies_a_root_of_the_metric_and_its_inverse(
    tokens: int, scale: float, diagonal: bool
) -> None:
    x, floor = torch.randn(tokens, 5, dtype=torch.float64) * scale**0.5, 1e-6
    moment = x.mT @ x
    metric = moment.diagonal() * (torch.arange(5) > 0) if diagonal else moment
    energies, basis = torch.linalg.eigh(metric.diag() if diagonal else metric)
    raised = basis @ energies.clamp(min=floor * float(energies[-1])).diag() @ basis.mT
    there, back = whitening(metric, floor)
    columns = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(back(there(columns)), columns)
    p = there(torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(p.mT @ p / scale, raised / scale)


def test_whitening_by_the_identity_changes_nothing() -> None:
    there, back = whitening(None, 1e-6)
    x = torch.randn(4, 2)
    assert there(x) is x
    assert back(x) is x


@pytest.mark.parametrize("sizes", [(3, 2, 9, 8), (3, 7, 4, 3), (1, 1, 1, 1), (2, 12, 4, 6)])
def test_squares_are_those_of_each_examples_gradient(sizes: tuple[int, int, int, int]) -> None:
    examples, length, fan_in, fan_out = sizes
    x, g = torch.randn(examples, length, fan_in), torch.randn(examples, length, fan_out)
    expected = sum((g[b].mT @ x[b]).square().sum(0) for b in range(examples))
    torch.testing.assert_close(per_example_squares(x, g), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_not_finite_becomes_zero_as_a_whole(dtype: torch.dtype) -> None:
    large = torch.full((2, 9), 6e4, dtype=dtype)  # in half precision their sum is infinite
    finite, found = finite_or_zero(large)
    assert finite
    assert found is large, "no copy"
    for odd in (torch.nan, torch.inf, -torch.inf):
        large[1, 3] = odd
        finite, found = finite_or_zero(large)
        assert not finite
        assert found.equal(torch.zeros_like(large))


def test_a_scale_counts_twice_in_a_gram_matrix() -> None:
    x = torch.randn(7, 5)
    sums = torch.zeros(packed_shape(5))
    assert sums.shape == (1, packed_shape(5)[1])
    add_gram_(sums, x, 3.0)
    torch.testing.assert_close(symmetric(sums), 9 * x.mT @ x)
    assert symmetric(sums, torch.float64).dtype == torch.float64


def test_a_pseudo_inverse_that_a_device_gives_up_on_is_had_from_the_host(
    fails_at_first: Callable[[str], list[Any]],
) -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 2)
    expected = torch.linalg.pinv(a) @ b
    calls = fails_at_first("pinv")
    torch.testing.assert_close(least_squares(a, b), expected)
    assert len(calls) == 2


def test_singular_values_that_a_device_gives_up_on_are_had_from_the_host(
    fails_at_first: Callable[[str], list[Any]],
) -> None:
    """Of a layer with more outputs than the metric sees."""
    weight, x = torch.randn(9, 6), torch.randn(3, 6)
    wanted = truncate(weight, None, x.mT @ x).factors(5)
    calls = fails_at_first("svd")
    with linalg.noted_retries() as told:
        found = truncate(weight, None, x.mT @ x).factors(5)
    assert len(calls) == 2
    assert told == ["solved on the CPU, for the solver of its device failed"]
    torch.testing.assert_close(found.product(), wanted.product())


def test_no_solver_that_may_fail_is_called_past_this_module() -> None:
    may_fail = re.compile(r"torch\.(linalg\.(eigh|eigvalsh|svd|svdvals|pinv|lstsq)|svd)\b")
    root = Path(linalg.__file__).parent
    found = {path.name for path in root.rglob("*.py") if may_fail.search(path.read_text())}
    assert found == {"linalg.py", "footprint.py"}  # which times one of a matrix it knows


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


class Calls(TorchDispatchMode):
    """Notes which operators run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))

    @property
    def inverts(self) -> bool:
        """Whether a pseudo-inverse was taken, by singular values."""
        return any("pinv" in name or "svd" in name for name in self.names)


@pytest.mark.parametrize("shape", [(9, 4), (4, 4), (3, 5)])
@pytest.mark.parametrize("rank", [5, 2, 0])
def test_least_squares_are_those_of_the_pseudo_inverse(shape: tuple[int, int], rank: int) -> None:
    torch.manual_seed(rank)
    left, right = torch.randn(shape[0], rank).double(), torch.randn(rank, shape[1]).double()
    a, b = left @ right, torch.randn(shape[0], 3, dtype=torch.float64)
    with Calls() as calls:
        found = least_squares(a, b)
    torch.testing.assert_close(found, torch.linalg.pinv(a) @ b, rtol=1e-10, atol=1e-10)
    regular = rank == 5 and shape[0] >= shape[1]
    assert calls.inverts == (not regular)


def test_factors_of_full_rank_are_carried_without_singular_values() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(12, 5), torch.randn(5, 9)
    turn, less = torch.randn(5, 2), torch.randn(2, 5)
    with Calls() as calls:
        carry = carry_factors((left, right), (left @ turn, less @ right))
    assert not calls.inverts
    of_right, of_left = carry([torch.eye(5), torch.eye(5)], False)
    torch.testing.assert_close(of_right, turn.mT)
    torch.testing.assert_close(of_left, less.mT)


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
    with linalg.noted_retries() as told:
        found = getattr(linalg, name)(matrix)
    values = (expected, found) if name == "eigvalsh" else (expected[0], found[0])
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)
    if name == "eigh":
        torch.testing.assert_close(found[1] * found[0] @ found[1].mT, matrix)
    assert len(calls) == failures + 1
    on_host = "solved on the CPU, for the solver of its device failed"
    shifted = "solved with 1e-12 of its mean diagonal added, for solvers failed without"
    assert told == [shifted if failures == 2 else on_host]
    with linalg.noted_retries() as told:
        getattr(linalg, name)(matrix)
    assert told == []


def test_what_no_solver_can_do_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(matrix: Tensor) -> object:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):
        linalg.eigh(torch.eye(2))
