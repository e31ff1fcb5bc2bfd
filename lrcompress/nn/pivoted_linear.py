"""Low-rank linear layer that stores some rows of its weight, and the others as sums of them."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.linalg import balanced, double
from lrcompress.nn.low_rank import FactoredLinear, LowRankLinear
from lrcompress.nn.replacement import Sizes
from lrcompress.statistics import views


class PivotedLinear(FactoredLinear):
    """Low-rank linear layer in pivoted rows: ``rank`` rows of its weight, and how others follow.

    ``weight[pivots] = right`` and ``weight[others] = rest right``: the same matrix as that of
    :class:`~lrcompress.LowRankLinear` in ``rank·(in + out − rank)`` parameters, besides the
    bias and a whole number an output. At full rank that is as many as the dense layer has. A new
    one starts random, with the first rows as pivots.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: rows that are kept, from 1 to ``min(out, in)``; this is not checked here.
        bias: whether it has one.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        input ``(..., in)``, output ``(..., out)``; ``right`` ``(rank, in)``, ``rest``
        ``(out − rank, rank)``, ``bias`` ``(out,)`` or None; ``order`` ``(out,)`` int64: the row of
        ``[right; rest right]`` that each output is.

    Cost:
        ``rank·(in + out − rank)`` multiply-adds a token; from ``rank`` tokens on
        ``rank·(in + out)``, and ``out·rank`` values put in order.

    Source:
        Zhao et al., "Pivoting Factorization", ICML 2025, arXiv 2501.19090; an interpolative
        decomposition of rows.

    Example:
        >>> layer = PivotedLinear(6, 4, rank=2)
        >>> layer(torch.zeros(3, 5, 6)).shape, sum(p.numel() for p in layer.factors)
        (torch.Size([3, 5, 4]), 16)
    """

    kind = "pivoted"
    sizing_tensors = MappingProxyType({"right": 2, "rest": 2, "order": 1})

    bias: nn.Parameter | None
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank)
        made = {"device": device, "dtype": dtype}
        size = (3 * in_features) ** -0.5  # that of the entries of an nn.Linear
        self.right = nn.Parameter(size * torch.randn(rank, in_features, **made))  # type: ignore[arg-type]
        self.rest = nn.Parameter(rank**-0.5 * torch.randn(out_features - rank, rank, **made))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(out_features, **made)) if bias else None  # type: ignore[arg-type]
        self.register_buffer("order", torch.arange(out_features, device=device))

    @classmethod
    def in_place_of(cls, layer: nn.Module, rank: int) -> Self:  # type: ignore[override]
        """Return a layer of that rank to replace ``layer``; its values are not yet set.

        It takes over ``layer``'s bias, the same parameter, and its dtype, device and training
        flags.

        Raises:
            LayerError: if ``layer`` is of a type that is not known.
        """
        old = views.view(layer)
        out_features, in_features = old.shape
        weight = old.parameters[-1]
        sizes = in_features, out_features, rank
        new = cls(*sizes, bias=False, device=weight.device, dtype=weight.dtype)
        return new._take_over(layer, old)

    def _set_bias(self, bias: nn.Parameter | None) -> None:
        self.bias = bias

    @property
    def sizes(self) -> dict[str, int]:
        return {"in": self.in_features, "out": self.out_features, "rank": self.rank}

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.right, self.rest

    @staticmethod
    def size_limits(sizes: Sizes) -> dict[str, tuple[int, int]]:
        return {"rank": (1, min(sizes["in"], sizes["out"]))}

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        (rank, in_features), (out_features,) = shapes["right"], shapes["order"]
        return {"in": in_features, "out": out_features, "rank": rank}

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        rank, out_features = sizes["rank"], sizes["out"]
        right, rest = (rank, sizes["in"]), (max(0, out_features - rank), rank)
        return {"right": right, "rest": rest, "order": (out_features,)}

    def inconsistency(self) -> str | None:
        every = torch.arange(self.out_features, device=self.order.device)
        if torch.equal(self.order.sort().values, every):
            return None
        return f"its order is no permutation of 0 to {self.out_features - 1}"

    @torch.no_grad()
    def set_(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Make the weight ``left right``, exactly but for rounding, whatever their condition.

        Pivots are those of an LU decomposition of ``left`` with partial pivoting, by which the
        entries of ``rest`` stay about 1 or below.

        Args:
            left: ``(out, rank)``.
            right: ``(rank, in)``.

        Returns:
            The same weight's ``left`` with the unit matrix at the pivots, and ``right``; float64.

        Cost:
            ``O(out·rank²)``.
        """
        left, right = double(left), double(right)
        rows, rest = _pivots(left)
        right = left[rows[: self.rank]] @ right
        stored = torch.cat([torch.eye(self.rank, dtype=rest.dtype, device=rest.device), rest])
        order = rows.argsort()
        for tensor, value in ((self.right, right), (self.rest, rest), (self.order, order)):
            tensor.copy_(value)
        return stored[order], right

    @property
    def left(self) -> Tensor:
        """The left factor ``(out, rank)`` of ``right``: the unit matrix at the pivots, and rest."""
        unit = torch.eye(self.rank, dtype=self.rest.dtype, device=self.rest.device)
        return torch.cat([unit, self.rest])[self.order]

    @classmethod
    def of(cls, layer: LowRankLinear) -> Self:
        """Return a layer with the weight of ``layer``, to rounding, and its bias parameter."""
        new = cls.in_place_of(layer, layer.rank)
        new.set_(layer.left.weight, layer.right.weight)
        return new

    @torch.no_grad()
    def to_low_rank(self) -> LowRankLinear:
        """Return balanced factors of the same weight, to rounding, with the same bias parameter."""
        return self._balanced_in(LowRankLinear.in_place_of(self, self.rank))

    def _balanced_in(self, new: LowRankLinear) -> LowRankLinear:
        pairs = balanced(double(self.left), double(self.right))
        for parameter, value in zip((new.left.weight, new.right.weight), pairs, strict=True):
            parameter.copy_(value)
        return new

    def rows_of(self, of_factors: Sequence[Tensor]) -> list[Tensor]:
        """Return optimizer state of ``right`` and ``rest`` from that of ``right`` and ``left``.

        ``left`` has the unit matrix at the pivots, as :meth:`set_` returns it. With the gradient
        ``G`` of the weight, that of ``right`` is ``leftᵀ G`` and that of ``rest`` the others' rows
        of ``G rightᵀ``, the gradient of ``left``.
        """
        of_right, of_left = of_factors
        return [of_right, of_left[self.order.argsort()[self.rank :]]]

    def state_of_factors(self, of_rows: Sequence[Tensor], squared: bool) -> list[Tensor]:
        """Return optimizer state of ``right`` and :attr:`left` from that of ``right`` and ``rest``.

        What ``G rightᵀ`` is at the pivots follows from ``leftᵀ (G rightᵀ) = (leftᵀ G) rightᵀ``:
        exactly for first moments. With the squares of the factors it holds as far as entries of
        ``G`` are independent; what comes out below zero is zero.
        """
        of_right, of_rest = (double(x) for x in of_rows)
        right, rest = double(self.right.detach()), double(self.rest.detach())
        if squared:
            right, rest = right.square(), rest.square()
        at_pivots = of_right @ right.mT - rest.mT @ of_rest
        stored = torch.cat([at_pivots.clamp(min=0) if squared else at_pivots, of_rest])
        return [of_rows[0], stored[self.order].to(of_rows[1])]

    def _product(self) -> Tensor:
        return torch.cat([self.right, self.rest @ self.right])[self.order]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the kept rows, then the others to what these give, all in the order of outputs.

        Of few tokens the outputs are put in order, of many the rows of :attr:`left`, which then
        takes less time. A compiler makes one kernel of the former.
        """
        pivots = F.linear(x, self.right)
        if not torch.compiler.is_compiling() and pivots.numel() >= self.rank**2:
            return F.linear(pivots, self.left, self.bias)
        y = torch.cat([pivots, F.linear(pivots, self.rest)], -1)
        y = y.gather(-1, self.order.expand(y.shape))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _pivots(left: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of ``left (out, rank)``, pivots first, and ``rest (out − rank, rank)``.

    ``left[rows][rank:] = rest left[rows][:rank]``. With ``left[rows] = [L₁; L₂] U`` it is
    ``L₂ L₁⁻¹``, where ``L₁`` has a diagonal of ones, so that a singular ``left`` is no exception.
    """
    rank = left.shape[1]
    factored, swaps, _ = torch.linalg.lu_factor_ex(left)
    rows = list(range(len(left)))
    for here, there in enumerate(swaps.tolist()):
        rows[here], rows[there - 1] = rows[there - 1], rows[here]
    upper = factored[:rank].mT
    rest = torch.linalg.solve_triangular(
        upper, factored[rank:].mT, upper=True, unitriangular=True
    ).mT
    return torch.tensor(rows, device=left.device), rest


def _view(layer: nn.Module) -> views.LinearView:
    assert isinstance(layer, PivotedLinear)
    shape = (layer.out_features, layer.in_features)
    return views.LinearView(shape, layer.bias, layer.factors, lambda: layer.weight)


views.register(PivotedLinear, _view)
