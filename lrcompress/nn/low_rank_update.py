"""Frozen linear layer with a small trained update: low rank plus a few entries (DSEE)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.errors import ShapeError
from lrcompress.nn.deferred_weight import deferred_weight
from lrcompress.nn.replacement import Replacement, Sizes, plain_linear
from lrcompress.statistics import views


class LowRankUpdateLinear(Replacement):
    """Frozen linear layer with a trained low-rank and sparse update, a mask and head coefficients.

    ``y = (mask ⊙ (W + left right + S)) (c ⊙ x) + bias``. ``S`` has values at fixed places, its
    support. ``left`` and the values start at zero and ``c`` at one, so the layer starts exactly as
    the one it replaces. ``mask`` is there once entries are pruned;
    without it the update is computed beside ``W x``, which saves the gradient of a whole weight.
    ``c`` scales the inputs by groups, the heads of an attention whose output this layer reads.

    Tensors that a layer does not have are stored with no entries.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: of the update; 0 is none.
        entries: of ``S``; 0 is none.
        heads: groups of inputs that ``c`` scales, a divisor of ``in``; 0 is none.
        masked: 1 with a mask, 0 without.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        input ``(..., in)``, output ``(..., out)``; ``frozen`` ``(out, in)``; ``left``
        ``(out, rank)``; ``right`` ``(rank, in)``; ``entries`` ``(entries,)``, its ``support``
        likewise, int64, ``row·in + column``; ``coefficients`` ``(heads,)``; ``mask`` ``(out, in)``
        or ``(0, in)`` bool, true for what stays; ``bias`` ``(out,)`` or None.

    Cost:
        ``in·out + rank·(in + out) + entries`` multiply-adds a token. With a mask the matrix is
        formed at every call, for ``rank·in·out`` more, whatever the number of tokens, and
        ``in·out`` a token.

    Source:
        Chen et al., "DSEE: Dually Sparsity-embedded Efficient Tuning", ACL 2023, arXiv
        2111.00160.

    Example:
        >>> layer = LowRankUpdateLinear.in_place_of(nn.Linear(6, 4), rank=2, entries=3)
        >>> layer(torch.zeros(3, 5, 6)).shape
        torch.Size([3, 5, 4])
    """

    kind = "updated"
    sizing_tensors = MappingProxyType(
        {"frozen": 2, "left": 2, "right": 2, "support": 1, "coefficients": 1, "mask": 2}
    )

    support: Tensor
    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        entries: int = 0,
        heads: int = 0,
        masked: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of zeros, without a bias.

        Raises:
            ShapeError: if the inputs cannot be shared out evenly by so many heads.
        """
        super().__init__()
        if heads and in_features % heads:
            raise ShapeError(f"{heads} heads cannot share {in_features} inputs evenly")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.plain: type[nn.Module] = nn.Linear
        shapes = self.tensors(
            {"in": in_features, "out": out_features, "rank": rank, "entries": entries}
            | {"heads": heads, "masked": masked}
        )
        for name in ("frozen", "left", "right", "entries", "coefficients"):
            value = torch.zeros(shapes[name], device=device, dtype=dtype)
            trained = name != "frozen" and bool(value.numel())
            self.register_parameter(name, nn.Parameter(value, requires_grad=trained))
        self.register_buffer("support", torch.arange(entries, device=device))
        self.register_buffer("mask", torch.ones(shapes["mask"], dtype=torch.bool, device=device))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

    frozen: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter
    entries: nn.Parameter
    coefficients: nn.Parameter

    @classmethod
    def in_place_of(  # type: ignore[override]
        cls, layer: nn.Module, rank: int, entries: int = 0, heads: int = 0, masked: int = 0
    ) -> Self:
        """Return a layer to replace ``layer``, with its weight, bias, dtype and device.

        The bias is the same parameter, the weight a copy. Its coefficients are one; ``right`` and
        ``support`` are not set.

        Args:
            layer: a linear layer, which is made dense first if it is factored; it is not changed.
            rank: of the update.
            entries: of ``S``.
            heads: groups of inputs that get a coefficient.
            masked: 1 with a mask, in which everything stays, 0 without.

        Raises:
            LayerError: if ``layer`` is of a type that is not known.
            ShapeError: if the inputs cannot be shared out evenly by so many heads.
        """
        layer = layer.to_dense() if isinstance(layer, Replacement) else layer
        old = views.view(layer)
        out_features, in_features = old.shape
        weight = old.weight
        new = cls(
            in_features,
            out_features,
            rank,
            entries,
            heads,
            masked,
            device=weight.device,
            dtype=weight.dtype,
        )
        new.frozen.detach().copy_(weight)
        new.coefficients.detach().fill_(1)
        new.bias = old.bias
        new.plain = type(layer) if old.transposed else nn.Linear
        return new.train(layer.training)

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "in": self.in_features,
            "out": self.out_features,
            "rank": self.rank,
            "entries": len(self.entries),
            "heads": len(self.coefficients),
            "masked": int(self.masked),
        }

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.right, self.left, self.entries, self.coefficients, self.frozen

    @staticmethod
    def size_limits(sizes: Sizes) -> dict[str, tuple[int, int]]:
        most = sizes["in"] * sizes["out"]
        own = {"entries": (0, most), "heads": (0, sizes["in"]), "masked": (0, 1)}
        return {"rank": (0, min(sizes["in"], sizes["out"])), **own}

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        out_features, in_features = shapes["frozen"]
        return {
            "in": in_features,
            "out": out_features,
            "rank": shapes["left"][1],
            "entries": shapes["support"][0],
            "heads": shapes["coefficients"][0],
            "masked": int(shapes["mask"][0] > 0),
        }

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        out_features, in_features, rank = (sizes[x] for x in ("out", "in", "rank"))
        return {
            "frozen": (out_features, in_features),
            "left": (out_features, rank),
            "right": (rank, in_features),
            "entries": (sizes["entries"],),
            "support": (sizes["entries"],),
            "coefficients": (sizes["heads"],),
            "mask": (sizes["masked"] * out_features, in_features),
        }

    def inconsistency(self) -> str | None:
        if self.support.is_meta:
            return None
        inside = (self.support >= 0) & (self.support < self.frozen.numel())
        sound = self.support.dtype == torch.int64 and self.mask.dtype == torch.bool
        if sound and bool(inside.all()):
            return None
        return (
            f"support must be int64 from 0, below {self.frozen.numel()}, beside bool mask; got "
            f"{self.support.dtype} {self.support.tolist()[:8]} and {self.mask.dtype}"
        )

    @property
    def masked(self) -> bool:
        """Whether it has a mask, that is, entries are pruned."""
        return bool(len(self.mask))

    @property
    def weight(self) -> Tensor:
        """The merged weight ``(out, in)``: update, mask and coefficients included.

        It is computed when its values are used; its dtype, device and shape cost nothing.
        """
        shape = (self.out_features, self.in_features)
        return deferred_weight(shape, self.frozen, self._product, self.factors)

    def _product(self) -> Tensor:
        matrix = self._matrix()
        return matrix * self._scales if len(self.coefficients) else matrix

    @property
    def _scales(self) -> Tensor:
        """The coefficient of every input, ``(in,)``."""
        return self.coefficients.repeat_interleave(self.in_features // len(self.coefficients))

    def _matrix(self) -> Tensor:
        matrix: Tensor = self.frozen
        if self.rank:
            matrix = matrix + self.left @ self.right
        if len(self.entries):
            added = matrix.flatten().scatter_add(0, self.support, self.entries.to(matrix.dtype))
            matrix = added.view_as(matrix)
        return matrix * self.mask if self.masked else matrix

    def forward(self, x: Tensor) -> Tensor:
        """Add the update to the frozen product, or apply all of it at once if it is masked."""
        if len(self.coefficients):
            x = x * self._scales
        if self.masked:
            return F.linear(x, self._matrix(), self.bias)
        y = F.linear(x, self.frozen, self.bias)
        if self.rank:
            y = y + F.linear(F.linear(x, self.right), self.left)
        if len(self.entries):
            row, column = self.support // self.in_features, self.support % self.in_features
            added = x.index_select(-1, column) * self.entries
            y = y.index_add(-1, row, added.to(y.dtype))
        return y

    @torch.no_grad()
    def prune_(self, kept: Tensor) -> Self:
        """Prune the entries that are not in ``kept``, in place; pruned ones stay pruned.

        Args:
            kept: ``(out, in)`` bool.

        Returns:
            The layer itself.

        Raises:
            ShapeError: if ``kept`` is not of the weight's shape.
        """
        if kept.shape != self.frozen.shape:
            raise ShapeError(
                f"kept must be {tuple(self.frozen.shape)} as the weight, got {tuple(kept.shape)}"
            )
        self.mask = (self.mask & kept if self.masked else kept.clone()).to(self.frozen.device)
        return self

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return a dense layer with the merged weight, with true zeros, and the same bias.

        It is a ``Conv1D`` where this layer replaced one, else an ``nn.Linear``. Its weight is
        trained.
        """
        weight = self.weight.to(self.frozen.dtype, copy=True)  # it may be the frozen one itself
        return plain_linear(self.plain, weight, self.bias, trained=True).train(self.training)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={size}"
            for name, size in zip(
                ("in_features", "out_features", "rank", "entries", "heads", "masked"),
                self.sizes.values(),
                strict=True,
            )
        )


def _view(layer: nn.Module) -> views.LinearView:
    assert isinstance(layer, LowRankUpdateLinear)
    shape = (layer.out_features, layer.in_features)
    return views.LinearView(shape, layer.bias, layer.factors, lambda: layer.weight)


views.register(LowRankUpdateLinear, _view)
