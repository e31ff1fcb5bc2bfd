"""Factorized embedding (ALBERT): a table of low width, and a matrix to the full width."""

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from lrcompress.errors import LayerError
from lrcompress.nn.deferred_weight import deferred_weight
from lrcompress.nn.replacement import Replacement, Sizes
from lrcompress.statistics import views


class FactoredEmbedding(Replacement):
    """Base class of layers that replace an embedding by a narrow table and what widens its rows.

    The values of a new table are not set: they are uninitialised memory. The first five arguments
    are attributes too.

    Args:
        num_embeddings: rows, one a token.
        embedding_dim: width of the output.
        rank: width of the narrow table.
        padding_idx: the row that gets no gradient, or None.
        scale: what output rows are multiplied by, as some embeddings of ``transformers`` do.
        sparse: whether the gradient of the table is a sparse tensor.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        left: the narrow table, an ``nn.Embedding``; its weight is ``(vocabulary, rank)``.
    """

    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        padding_idx: int | None = None,
        scale: float = 1.0,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx, self.scale = padding_idx, scale
        self.plain: type[nn.Module] = nn.Embedding
        empty = torch.empty(num_embeddings, rank, device=device, dtype=dtype)
        self.left = nn.Embedding(
            num_embeddings, rank, padding_idx=padding_idx, sparse=sparse, _weight=empty
        )

    @classmethod
    def in_place_of(cls, layer: nn.Module, rank: int) -> Self:  # type: ignore[override]
        """Return a layer of that rank to replace an embedding; its values are not yet set.

        Args:
            layer: an ``nn.Embedding``, a scaled one of ``transformers``, or a factored one. Its
                options, dtype, device and training flags are taken over.
            rank: width of the narrow table.

        Raises:
            LayerError: if ``layer`` is no embedding, or does more than look up rows.
            ShapeError: if ``rank`` does not divide the width of Kronecker rows.
        """
        reason = obstacle(layer)
        if reason is not None:
            raise LayerError(f"{type(layer).__name__} cannot be factored: {reason}")
        weight = views.view(layer, table=True).parameters[-1]
        factored = isinstance(layer, FactoredEmbedding)
        new = cls(
            layer.num_embeddings,  # type: ignore[arg-type]
            layer.embedding_dim,  # type: ignore[arg-type]
            rank,
            padding_idx=layer.padding_idx,  # type: ignore[arg-type]
            scale=layer.scale if factored else getattr(layer, "embed_scale", 1.0),  # type: ignore[arg-type]
            sparse=(layer.left if factored else layer).sparse,  # type: ignore[arg-type, union-attr]
            device=weight.device,
            dtype=weight.dtype,
        )
        new.plain = layer.plain if factored else type(layer)  # type: ignore[assignment]
        return new.requires_grad_(weight.requires_grad).train(layer.training)

    @classmethod
    def can_replace(cls, layer: nn.Module) -> bool:
        return views.is_embedding(layer)

    @property
    def weight(self) -> Tensor:
        """The full table ``(vocabulary, width)``, before ``scale``.

        It is multiplied out when its values are used; its dtype, device and shape cost nothing.
        """
        shape = (self.num_embeddings, self.embedding_dim)
        return deferred_weight(shape, self.left.weight, self._product, self.factors)

    @abstractmethod
    def _product(self) -> Tensor:
        """Return the table, multiplied out."""

    @property
    def sizes(self) -> dict[str, int]:
        return {"in": self.embedding_dim, "out": self.num_embeddings, "rank": self.rank}

    @staticmethod
    def size_limits(sizes: Sizes) -> dict[str, tuple[int, int]]:
        return {"rank": (1, min(sizes["in"], sizes["out"]))}

    def to_dense(self) -> nn.Module:
        """Return an embedding of the class that was replaced, with the same rows."""
        weight = self.weight.detach().contiguous()
        more = {} if self.plain is nn.Embedding else {"embed_scale": self.scale}
        with torch.device("meta"):
            dense = self.plain(self.num_embeddings, self.embedding_dim, self.padding_idx, **more)
        dense.sparse = self.left.sparse  # type: ignore[assignment]
        dense.weight = nn.Parameter(weight, requires_grad=self.left.weight.requires_grad)
        return dense.train(self.training)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.scale == 1 else rows * self.scale

    def extra_repr(self) -> str:
        scale = "" if self.scale == 1 else f", scale={self.scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}{scale}"


class LowRankEmbedding(FactoredEmbedding):
    """Factorized embedding with rows ``left[i] right``: a table of rank at most ``rank``.

    It has ``rank·(vocabulary + width)`` parameters. An output head that is tied to it is a
    :class:`~lrcompress.LowRankLinear` with the same two parameters. The values of a new table
    are not set: they are uninitialised memory.

    Args:
        num_embeddings: rows.
        embedding_dim: width of the output.
        rank: width of ``left``.
        **options: ``padding_idx``, ``scale``, ``sparse``, ``device`` and ``dtype`` of
            :class:`FactoredEmbedding`.

    Shapes:
        input ``(...)`` of row numbers, output ``(..., width)``; ``left.weight``
        ``(vocabulary, rank)``, ``right.weight`` ``(rank, width)``.

    Source:
        Lan et al., "ALBERT", ICLR 2020.

    Example:
        >>> LowRankEmbedding(50, 6, rank=2)(torch.zeros(3, 5, dtype=torch.int64)).shape
        torch.Size([3, 5, 6])
    """

    kind = "low_rank_embedding"
    sizing_tensors = MappingProxyType({"left.weight": 2, "right.weight": 2})

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rank: int, **options: object
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, rank, **options)  # type: ignore[arg-type]
        weight = self.left.weight
        self.right = nn.Linear(
            embedding_dim, rank, bias=False, device=weight.device, dtype=weight.dtype
        )

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.right.weight, self.left.weight

    def _product(self) -> Tensor:
        return self.left.weight @ self.right.weight

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        (vocabulary, rank), (_, width) = shapes["left.weight"], shapes["right.weight"]
        return {"in": width, "out": vocabulary, "rank": rank}

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        rank = sizes["rank"]
        return {"left.weight": (sizes["out"], rank), "right.weight": (rank, sizes["in"])}

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows of ``left``, and multiply them by ``right``."""
        return self._scaled(self.left(input) @ self.right.weight)


def obstacle(layer: nn.Module) -> str | None:
    """Return why an embedding cannot be factored, or None if it can.

    Example:
        >>> obstacle(nn.Embedding(4, 2)), obstacle(nn.Embedding(4, 2, max_norm=1.0))
        (None, 'max_norm shortens rows as they are read, which factors do not have')
    """
    if isinstance(layer, FactoredEmbedding):
        return None
    if not isinstance(layer, nn.Embedding):
        return "it is no embedding"
    scaled = type(layer).__name__.endswith("ScaledWordEmbedding")
    if scaled and not isinstance(getattr(layer, "embed_scale", None), float | int):
        return "its scale is a tensor, which may change"
    if type(layer).__name__ not in ("Embedding", "FSDPEmbedding") and not scaled:
        return "its class may compute something else than to look up rows"
    if layer.max_norm is not None:
        return "max_norm shortens rows as they are read, which factors do not have"
    if layer.scale_grad_by_freq:
        return "scale_grad_by_freq divides gradients of rows, which factors do not have"
    return None


def _view(layer: nn.Module) -> views.LinearView:
    assert isinstance(layer, FactoredEmbedding)
    shape = (layer.num_embeddings, layer.embedding_dim)
    return views.LinearView(shape, None, layer.factors, lambda: layer.weight)


def register_table(kind: type[FactoredEmbedding]) -> None:
    """Register the normal form of a kind of embedding."""
    views.register(kind, _view, table=True)


register_table(LowRankEmbedding)
