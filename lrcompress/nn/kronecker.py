"""Linear layer whose weight is a sum of Kronecker products."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.errors import ShapeError
from lrcompress.nn.low_rank import FactoredLinear
from lrcompress.nn.replacement import Sizes
from lrcompress.solvers.kronecker import check_divides, multiply_adds, rearranged
from lrcompress.statistics import views


class KroneckerLinear(FactoredLinear):
    """Linear layer whose weight is a sum of Kronecker products, which is never built.

    ``y = (Σ_s first[s] ⊗ second[s]) x + bias``. With ``x`` as a matrix ``X`` of ``n1`` rows,
    ``(A ⊗ B) x`` is ``A X Bᵀ``. All terms are applied as one product on either side, the one first
    that leaves fewer multiply-adds. One term has ``m1·n1 + m2·n2`` parameters where
    ``out = m1·m2`` and ``in = n1·n2``. A new layer's bias is zero, its factors are random.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        terms: Kronecker products in the sum, at least 1.
        first: ``(m1, n1)``, the sizes of the first factors; ``m1`` divides ``out``, ``n1`` divides
            ``in``.
        bias: whether it has one.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        input ``(..., in)``, output ``(..., out)``; ``first`` ``(terms, m1, n1)``, ``second``
        ``(terms, m2, n2)``, ``bias`` ``(out,)`` or None. ``rank`` is the number of terms.

    Cost:
        ``terms·min(m1·n2·(n1 + m2), n1·m2·(n2 + m1))`` multiply-adds a token.

    Source:
        C. Van Loan, N. Pitsianis, "Approximation with Kronecker products" (1993).

    Example:
        >>> layer = KroneckerLinear(6, 4, terms=1, first=(2, 3))
        >>> layer(torch.zeros(3, 5, 6)).shape, tuple(layer.second.shape)
        (torch.Size([3, 5, 4]), (1, 2, 2))
    """

    kind = "kronecker"
    sizing_tensors = MappingProxyType({"first": 3, "second": 3})

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        terms: int,
        first: tuple[int, int],
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of random factors; its weight has the variance of an ``nn.Linear``'s.

        Raises:
            ShapeError: if there is no term, or ``first`` does not divide ``(out, in)``.
        """
        if terms < 1:
            raise ShapeError(f"terms must be at least 1, got {terms}")
        check_divides(first, (out_features, in_features))
        super().__init__(in_features, out_features, terms)
        (m1, n1), second = first, (out_features // first[0], in_features // first[1])
        self.first = nn.Parameter(torch.empty(terms, m1, n1, device=device, dtype=dtype))
        self.second = nn.Parameter(torch.empty(terms, *second, device=device, dtype=dtype))
        size = (3 * in_features * terms) ** -0.25
        nn.init.normal_(self.first, std=size)
        nn.init.normal_(self.second, std=size)
        offset = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if offset is None else nn.Parameter(offset)
        one, two = multiply_adds((m1, n1), second)
        self._first_first = one < two

    @classmethod
    def in_place_of(  # type: ignore[override]
        cls, layer: nn.Module, terms: int, first_out: int, first_in: int
    ) -> Self:
        """Return a layer with first factors of these sizes to replace ``layer``.

        Its factors are not yet set. It takes over ``layer``'s bias, the same parameter, and its
        dtype, device and training flags.

        Args:
            layer: a linear layer; it is not changed.
            terms: Kronecker products in the sum.
            first_out: rows of the first factors, a divisor of ``out``.
            first_in: columns of the first factors, a divisor of ``in``.

        Raises:
            LayerError: if ``layer`` is of a type that is not known.
            ShapeError: if there is no term, or the sizes do not divide the layer's.
        """
        old = views.view(layer)
        out_features, in_features = old.shape
        weight = old.parameters[-1]
        sizes = in_features, out_features, terms, (first_out, first_in)
        new = cls(*sizes, bias=False, device=weight.device, dtype=weight.dtype)
        return new._take_over(layer, old)

    def _set_bias(self, bias: nn.Parameter | None) -> None:
        self.bias = bias

    @property
    def sizes(self) -> dict[str, int]:
        _, first_out, first_in = self.first.shape
        own = {"terms": self.rank, "first_out": first_out, "first_in": first_in}
        return {"in": self.in_features, "out": self.out_features, **own}

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.first, self.second

    @staticmethod
    def size_limits(sizes: Sizes) -> dict[str, tuple[int, int]]:
        most = math.isqrt(sizes["in"] * sizes["out"])
        return {
            "terms": (1, most),
            "first_out": (1, sizes["out"]),
            "first_in": (1, sizes["in"]),
        }

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        (terms, m1, n1), (_, m2, n2) = shapes["first"], shapes["second"]
        own = {"terms": terms, "first_out": m1, "first_in": n1}
        return {"in": n1 * n2, "out": m1 * m2, **own}

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        terms, m1, n1 = (sizes[key] for key in ("terms", "first_out", "first_in"))
        second = sizes["out"] // max(1, m1), sizes["in"] // max(1, n1)
        return {"first": (terms, m1, n1), "second": (terms, *second)}

    def _product(self) -> Tensor:
        blocks = torch.einsum("tij,tkl->ikjl", self.first, self.second)
        return blocks.reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the factors on the side first that leaves fewer multiply-adds.

        Raises:
            RuntimeError: if the input has another number of features, as ``nn.Linear`` raises.
        """
        (terms, m1, n1), (_, m2, n2) = self.first.shape, self.second.shape
        if x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"shapes cannot be multiplied: the input has {x.shape[-1]} features, the layer "
                f"takes {self.in_features}"
            )
        if self._first_first:
            first = self.first.transpose(0, 1).reshape(m1 * terms, n1)
            second = self.second.permute(1, 0, 2).reshape(m2, terms * n2)
            y = F.linear(x, first) if n2 == 1 else first @ x.reshape(-1, n1, n2)
            y = F.linear(y.reshape(-1, m1, terms * n2), second)
        else:
            first = self.first.permute(1, 2, 0).reshape(m1, n1 * terms)
            y = F.linear(x.reshape(-1, n1, n2), self.second.reshape(terms * m2, n2))
            y = y.reshape(-1, n1 * terms, m2)
            y = F.linear(y.squeeze(-1), first) if m2 == 1 else first @ y
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, terms={self.rank}, first={tuple(self.first.shape[1:])}"


def carry_kronecker(
    first: Tensor, second: Tensor, transposed: bool
) -> Callable[[Sequence[Tensor], bool], list[Tensor]]:
    """Return a function that turns optimizer state of a dense weight into that of its factors.

    Gradients of the factors are ``∂L/∂A_s = R(∂L/∂W) vec(B_s)`` and ``∂L/∂B_s = R(∂L/∂W)ᵀ
    vec(A_s)``, with a row of ``R`` for every block, so first moments carry over exactly; second
    ones as in :func:`lrcompress.structure.surgery.carry_dense`, with the squares of the factors.

    Args:
        first: ``A``, ``(terms, m1, n1)``.
        second: ``B``, ``(terms, m2, n2)``.
        transposed: whether the state is stored ``(in, out)``, as the weight was.

    Returns:
        ``carry([state of the weight], squared) -> [state of first, state of second]``.
    """
    sizes = first.shape[1], first.shape[2]

    def carry(state: Sequence[Tensor], squared: bool) -> list[Tensor]:
        whole = rearranged(state[0].mT if transposed else state[0], sizes)
        a, b = (factor.flatten(1).to(whole) for factor in (first, second))
        if squared:
            a, b = a.square(), b.square()
        return [(b @ whole.mT).view(first.shape), (a @ whole).view(second.shape)]

    return carry


def _view(layer: nn.Module) -> views.LinearView:
    assert isinstance(layer, KroneckerLinear)
    shape = (layer.out_features, layer.in_features)
    return views.LinearView(shape, layer.bias, layer.factors, lambda: layer.weight)


views.register(KroneckerLinear, _view)
