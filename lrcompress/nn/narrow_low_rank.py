"""Low-rank linear layers without the outputs or inputs that narrowing a block removed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lrcompress.errors import ShapeError
from lrcompress.nn.low_rank import FactoredLinear, LowRankLinear
from lrcompress.nn.pivoted_linear import PivotedLinear
from lrcompress.nn.pruned_linear import PrunedLinear
from lrcompress.nn.replacement import Sizes
from lrcompress.statistics import views

_MASKS = MappingProxyType({"rows": 1, "columns": 1})


class NarrowLowRank(FactoredLinear):
    """Base class of low-rank layers with fewer inputs or outputs than in the architecture.

    What a :class:`~lrcompress.nn.PrunedLinear` is to a dense layer, it is to a low-rank one: the
    layers before and after it have as few features, and its dense form has zeros for what is gone.

    Args:
        in_features: inputs in the architecture.
        out_features: outputs in the architecture.
        rows: outputs that are left.
        columns: inputs that are left.
        rank: of the factors, from 1 to the smaller of the two; this is not checked here.
        **made: as of the low-rank kind.

    Attributes:
        in_features: inputs that are left.
        out_features: outputs that are left.

    Shapes:
        those of the low-rank kind for a weight ``(rows left, columns left)``; ``rows`` ``(out,)``
        and ``columns`` ``(in,)`` bool: which of the architecture's features are left.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self, in_features: int, out_features: int, rows: int, columns: int, rank: int, **made: Any
    ) -> None:
        super().__init__(columns, rows, rank, **made)
        device = made.get("device")
        self.register_buffer("rows", torch.arange(out_features, device=device) < rows)
        self.register_buffer("columns", torch.arange(in_features, device=device) < columns)

    @classmethod
    def in_place_of(cls, layer: nn.Module, rows: int, columns: int, rank: int) -> Self:  # type: ignore[override]
        """Return a layer of these sizes to replace ``layer``; its values are not yet set.

        Args:
            layer: a linear layer, which is made dense first if it is factored; it is not changed.
            rows: outputs that are left.
            columns: inputs that are left.
            rank: of the factors.

        Raises:
            LayerError: if ``layer`` is of a type that is not known.
            ShapeError: if the rank is above the smaller of the two.
        """
        if rank > min(rows, columns):
            raise ShapeError(
                f"with {rows} outputs and {columns} inputs left the rank is at most "
                f"{min(rows, columns)}, got {rank}"
            )
        return cls.narrow_as(PrunedLinear.in_place_of(layer, rows, columns), rank)

    @classmethod
    def narrow_as(cls, layer: "PrunedLinear | NarrowLowRank", rank: int) -> Self:
        """Return a layer with the same features left as ``layer``; its factors are not yet set.

        It takes over ``layer``'s bias, the same parameter, and its dtype, device and training
        flags.
        """
        old = views.view(layer)
        weight = old.parameters[-1]
        made: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        new = cls(len(layer.columns), len(layer.rows), *old.shape, rank, **made)
        new.rows.copy_(layer.rows)
        new.columns.copy_(layer.columns)
        new.plain = layer.plain
        return new._take_over(layer, old)

    @property
    def sizes(self) -> dict[str, int]:
        own = {"rows": self.out_features, "columns": self.in_features, "rank": self.rank}
        return {"in": len(self.columns), "out": len(self.rows), **own}

    @staticmethod
    def size_limits(sizes: Sizes) -> dict[str, tuple[int, int]]:
        limits = PrunedLinear.size_limits(sizes)
        return {**limits, "rank": (1, min(sizes["in"], sizes["out"]))}

    def inconsistency(self) -> str | None:
        if self.rows.is_meta:
            return None
        return self._narrow().inconsistency() or super().inconsistency()

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return a dense layer of the architecture's size, with zeros for what was removed."""
        narrow = self._narrow()
        narrow.weight = nn.Parameter(self._product(), self.factors[-1].requires_grad)
        return narrow.to_dense()

    def _narrow(self) -> PrunedLinear:
        """Return a layer with the same features left, the same bias and no values."""
        with torch.device("meta"):
            sizes = len(self.columns), len(self.rows), self.out_features, self.in_features
            narrow = PrunedLinear(*sizes, bias=False)
        narrow.rows, narrow.columns = self.rows, self.columns
        narrow.bias, narrow.plain = self.bias, self.plain  # type: ignore[assignment]
        return narrow.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features} of {len(self.columns)}, "
            f"out_features={self.out_features} of {len(self.rows)}, rank={self.rank}"
        )


class NarrowLowRankLinear(NarrowLowRank, LowRankLinear):  # type: ignore[misc]
    """Balanced low-rank factors with fewer inputs or outputs than in the architecture.

    Example:
        >>> narrow = PrunedLinear.of(nn.Linear(6, 4), rows=torch.tensor([True, False, True, True]))
        >>> layer = NarrowLowRankLinear.narrow_as(narrow, rank=2)
        >>> layer(torch.zeros(1, 6)).shape, layer.to_dense()
        (torch.Size([1, 3]), Linear(in_features=6, out_features=4, bias=True))
    """

    kind = "narrow_low_rank"
    sizing_tensors = MappingProxyType({**LowRankLinear.sizing_tensors, **_MASKS})

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        return _sizes(LowRankLinear.sizes_from_shapes(shapes), shapes)

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {**LowRankLinear.tensors(_left(sizes)), **_masks(sizes)}


class NarrowPivotedLinear(NarrowLowRank, PivotedLinear):  # type: ignore[misc]
    """Pivoted rows with fewer inputs or outputs than in the architecture.

    Example:
        >>> narrow = PrunedLinear.of(nn.Linear(6, 4), rows=torch.tensor([True, False, True, True]))
        >>> layer = NarrowPivotedLinear.narrow_as(narrow, rank=2)
        >>> sum(p.numel() for p in layer.factors), layer.to_low_rank().kind
        (14, 'narrow_low_rank')
    """

    kind = "narrow_pivoted"
    sizing_tensors = MappingProxyType({**PivotedLinear.sizing_tensors, **_MASKS})

    @classmethod
    def of(cls, layer: LowRankLinear) -> Self:
        assert isinstance(layer, NarrowLowRankLinear)
        new = cls.narrow_as(layer, layer.rank)
        new.set_(layer.left.weight, layer.right.weight)
        return new

    @torch.no_grad()
    def to_low_rank(self) -> LowRankLinear:
        return self._balanced_in(NarrowLowRankLinear.narrow_as(self, self.rank))

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        return _sizes(PivotedLinear.sizes_from_shapes(shapes), shapes)

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {**PivotedLinear.tensors(_left(sizes)), **_masks(sizes)}


def low_rank_in_place_of(
    layer: nn.Module, rank: int, *, pivoted: bool = False
) -> LowRankLinear | PivotedLinear:
    """Return a low-rank layer to replace ``layer``, narrow if that is; its values are not yet set.

    Args:
        layer: a linear layer; it is not changed.
        rank: of the factors.
        pivoted: whether they are pivoted rows.

    Raises:
        LayerError: if ``layer`` is of a type that is not known.
    """
    if isinstance(layer, PrunedLinear | NarrowLowRank):
        kind = NarrowPivotedLinear if pivoted else NarrowLowRankLinear
        return kind.narrow_as(layer, rank)
    return (PivotedLinear if pivoted else LowRankLinear).in_place_of(layer, rank)


def _sizes(left: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    (out_features,), (in_features,) = shapes["rows"], shapes["columns"]
    own = {"rows": left["out"], "columns": left["in"], "rank": left["rank"]}
    return {"in": in_features, "out": out_features, **own}


def _left(sizes: Sizes) -> dict[str, int]:
    return {"in": sizes["columns"], "out": sizes["rows"], "rank": sizes["rank"]}


def _masks(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return {"rows": (sizes["out"],), "columns": (sizes["in"],)}


def _view(layer: nn.Module) -> views.LinearView:
    assert isinstance(layer, NarrowLowRankLinear | NarrowPivotedLinear)
    shape = (layer.out_features, layer.in_features)
    return views.LinearView(shape, layer.bias, layer.factors, lambda: layer.weight)


for _kind in (NarrowLowRankLinear, NarrowPivotedLinear):
    views.register(_kind, _view)
