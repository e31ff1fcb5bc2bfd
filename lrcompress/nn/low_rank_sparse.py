"""Linear layer as low rank plus sparse rows (LoSparse)."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.distributed import local_rows
from lrcompress.errors import SettingError, ShapeError
from lrcompress.nn.low_rank import LeftFactoredLinear, LowRankLinear
from lrcompress.nn.replacement import Sizes
from lrcompress.statistics import views

# Measured on a CPU by tests/benchmarks/sparse_cost.py; they change the speed only.
_MANY = 256  # tokens from which a copy of the weights costs nothing that matters
_COPY = 8  # copying a weight costs about as much as applying it to so many tokens
_ALIGN = 16  # widths of products that are multiples of it are faster


class LowRankSparseLinear(LeftFactoredLinear):
    """Low rank plus sparse rows: ``y = left (right x) + scatter(rows x) + bias``.

    Row ``i`` of the sparse part adds to output ``index[i]``; the others have the low-rank part
    alone. ``right`` and ``rows`` are stacked in ``inner``, so that both are one matrix product.

    Components are the ``rank`` ranks and, after them, the rows. :meth:`prune_` takes some out:
    they add nothing any more and their gradients are exactly zero, but the parameters keep their
    shapes until :meth:`compacted`.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: columns of ``left``, at least 1.
        num_rows: rows of the sparse part, from 0 to ``out``.
        bias: whether it has one.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        input ``(..., in)``, output ``(..., out)``; ``inner.weight`` ``(rank + rows, in)``,
        ``left.weight`` ``(out, rank)``, ``left.bias`` ``(out,)`` or None; ``index`` ``(rows,)``
        int64, ascending; ``kept`` ``(rank + rows,)`` bool, the components that are alive.

    Cost:
        ``rank·(in + out) + rows·in`` multiply-adds a token. Pruned components are left out of the
        products where there are tokens enough to make a copy of the other weights pay.

    Source:
        Li et al., "LoSparse", ICML 2023, arXiv 2306.11222.

    Example:
        >>> layer = LowRankSparseLinear(6, 4, rank=2, num_rows=3)
        >>> layer(torch.zeros(3, 5, 6)).shape
        torch.Size([3, 5, 4])
        >>> layer.prune_(torch.tensor([True, False, True, False, False])).compacted()
        LowRankSparseLinear(
          in_features=6, out_features=4, rank=1, num_rows=1
          (inner): Linear(in_features=6, out_features=2, bias=False)
          (left): Linear(in_features=1, out_features=4, bias=True)
        )
    """

    kind = "low_rank_sparse"
    sizing_tensors = MappingProxyType({"left.weight": 2, "inner.weight": 2})

    index: Tensor
    kept: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        num_rows: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer whose rows add to the first outputs.

        Raises:
            ShapeError: if there is no rank, or there are more rows than outputs.
        """
        if rank < 1:
            raise ShapeError(f"rank must be at least 1, got {rank}")
        if not 0 <= num_rows <= out_features:
            raise ShapeError(f"num_rows must be from 0 to {out_features} outputs, got {num_rows}")
        super().__init__(in_features, out_features, rank)
        components = rank + num_rows
        self.inner = nn.Linear(in_features, components, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("index", torch.arange(num_rows, device=device))
        self.register_buffer("kept", torch.ones(components, dtype=torch.bool, device=device))
        # Which components are alive, known without waiting for the device; None while all are.
        self._alive: _Alive | None = None

    @classmethod
    def in_place_of(  # type: ignore[override]
        cls, layer: nn.Module, rank: int, rows: int | None = None
    ) -> Self:
        """Return a layer of these sizes to replace ``layer``; its values are not yet set.

        It takes over ``layer``'s bias, the same parameter, and its dtype, device and training
        flags.

        Args:
            layer: a linear layer; it is not changed.
            rank: columns of ``left``.
            rows: of the sparse part; None is one for every output.

        Raises:
            LayerError: if ``layer`` is of a type that is not known.
            ShapeError: if there is no rank, or there are more rows than outputs.
        """
        old = views.view(layer)
        out_features, in_features = old.shape
        weight = old.parameters[-1]
        new = cls(
            in_features,
            out_features,
            rank,
            out_features if rows is None else rows,
            bias=False,
            device=weight.device,
            dtype=weight.dtype,
        )
        return new._take_over(layer, old)

    @property
    def sizes(self) -> dict[str, int]:
        own = {"rank": self.rank, "rows": self.num_rows}
        return {"in": self.in_features, "out": self.out_features, **own}

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.inner.weight, self.left.weight

    @staticmethod
    def size_limits(sizes: Sizes) -> dict[str, tuple[int, int]]:
        return {"rank": (1, min(sizes["in"], sizes["out"])), "rows": (0, sizes["out"])}

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        (out_features, rank), (components, width) = shapes["left.weight"], shapes["inner.weight"]
        return {"in": width, "out": out_features, "rank": rank, "rows": components - rank}

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        rank, rows = sizes["rank"], sizes["rows"]
        return {
            "left.weight": (sizes["out"], rank),
            "inner.weight": (rank + rows, sizes["in"]),
            "kept": (rank + rows,),
            "index": (rows,),
        }

    @property
    def num_rows(self) -> int:
        """Rows of the sparse part, pruned ones included."""
        return self.index.shape[0]

    @property
    def right(self) -> Tensor:
        """The right factor ``(rank, in)``, a view of ``inner.weight``."""
        return self.inner.weight[: self.rank]

    @property
    def rows(self) -> Tensor:
        """The sparse part ``(rows, in)``, a view of ``inner.weight``."""
        return self.inner.weight[self.rank :]

    def _product(self) -> Tensor:
        inner = self.inner.weight * self.kept[:, None]
        low_rank = self.left.weight @ inner[: self.rank]
        return low_rank.index_add(0, self.index, inner[self.rank :])

    @torch.no_grad()
    def prune_(self, kept: Tensor) -> Self:
        """Prune the components that are not in ``kept``, in place; pruned ones stay pruned.

        Their weights become zero. Nothing of an optimizer's state is changed.

        Args:
            kept: ``(rank + rows,)`` bool, the ranks first.

        Returns:
            The layer itself.

        Raises:
            ShapeError: if ``kept`` is not bool or has another shape.
            SettingError: if no rank would be left; one has to stay.
        """
        prune_layers_([self], [kept])
        return self

    @torch.no_grad()
    def revive_(self, which: Tensor) -> Self:
        """Bring pruned components back; their weights are zero until they are set or trained.

        A rank has to be set: where both its sides are zero, so are both gradients.

        Args:
            which: ``(rank + rows,)`` bool, the ranks first.

        Returns:
            The layer itself.

        Raises:
            ShapeError: if ``which`` is not bool or has another shape.
        """
        self.kept.logical_or_(self._checked(which))
        self._look()
        return self

    @torch.no_grad()
    def compacted(self) -> "LowRankSparseLinear | LowRankLinear":
        """Return a new, smaller layer that has only the components that are alive.

        It is a :class:`LowRankLinear` if no row is alive. The bias is the same parameter.
        """
        sizes = [self.rank, self.num_rows]
        ranks, rows = (part.nonzero().squeeze(1) for part in torch.split(self.kept, sizes))
        new: LowRankSparseLinear | LowRankLinear
        if len(rows):
            new = LowRankSparseLinear.in_place_of(self, len(ranks), len(rows))
            new.index.copy_(self.index[rows])
            new.inner.weight.copy_(self.inner.weight[self.kept])
        else:
            new = LowRankLinear.in_place_of(self, len(ranks))
            new.right.weight.copy_(self.right[ranks])
        new.left.weight.copy_(self.left.weight[:, ranks])
        return new

    def output_of(self, which: Tensor, x: Tensor) -> Tensor:
        """Return the part of the output that some components give, without the bias.

        Args:
            which: ``(rank + rows,)`` bool, the ranks first.
            x: ``(..., in)``.

        Returns:
            ``(..., out)``.

        Raises:
            ShapeError: if ``which`` is not bool or has another shape.
        """
        inner = self.inner.weight * self._checked(which)[:, None]
        low_rank, rows = torch.split(F.linear(x, inner), [self.rank, self.num_rows], -1)
        return F.linear(low_rank, self.left.weight).index_add(-1, self.index, rows)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the components that are alive, in the form that is fastest for so many tokens."""
        tokens = x.reshape(-1, x.shape[-1])
        inner = self.inner.weight
        if torch.compiler.is_compiling():
            y = self._compiled(tokens)
        elif self._alive is not None:
            y = self._pruned(tokens, self._alive)
        elif len(tokens) < _MANY:
            y = self._stacked(tokens, inner, self.left.weight, self.index)
        elif self.num_rows == self.out_features:
            y = self._accumulated(tokens, inner)
        else:
            inner = F.pad(inner, (0, 0, 0, -len(inner) % _ALIGN))
            y = self._stacked(tokens, inner, self.left.weight, self.index)
        return y.view(*x.shape[:-1], self.out_features)

    def _compiled(self, tokens: Tensor) -> Tensor:
        inner = self.inner.weight
        if self.training or self._alive is not None:
            inner = inner * self.kept[:, None]  # a mask that changes must not recompile
        if self.num_rows == self.out_features:
            return self._accumulated(tokens, inner)
        return self._stacked(tokens, inner, self.left.weight, self.index)

    def _pruned(self, tokens: Tensor, alive: "_Alive") -> Tensor:
        inner, left = self.inner.weight, self.left.weight
        if alive.pays(len(tokens)):
            inner, left = (
                inner.index_select(0, alive.components),
                left.index_select(1, alive.ranks),
            )
            return self._stacked(tokens, inner, left, alive.index)
        return self._stacked(tokens, inner, left, self.index, self.kept)

    def _accumulated(self, tokens: Tensor, inner: Tensor) -> Tensor:
        """Add rows of every output straight to it, without memory between."""
        right, rows = torch.split(inner, [self.rank, self.num_rows])
        y = F.linear(F.linear(tokens, right), self.left.weight, self.left.bias)
        return y.addmm_(tokens.to(y.dtype), rows.mT.to(y.dtype))

    def _stacked(
        self, tokens: Tensor, inner: Tensor, left: Tensor, index: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Apply right and rows as one product; what ``inner`` has beyond them is left out."""
        sizes = [left.shape[1], index.shape[0]]
        parts = F.linear(tokens, inner)
        if mask is not None:
            parts = parts * mask.to(parts.dtype)
        low_rank, rows, _ = torch.split(parts, [*sizes, inner.shape[0] - sum(sizes)], -1)
        y = F.linear(low_rank, left, self.left.bias)
        if index.shape[0] == self.out_features:
            return y.add_(rows)
        return y.scatter_add_(-1, index.expand_as(rows), rows) if index.shape[0] else y

    def extra_repr(self) -> str:
        sizes = f"rank={self.rank}, num_rows={self.num_rows}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {sizes}"

    def inconsistency(self) -> str | None:
        if self.index.is_meta:
            return None
        bounds = torch.tensor([-1, *self.index.tolist(), self.out_features])
        rising = bool((bounds[1:] > bounds[:-1]).all())
        if rising and self.index.dtype == torch.int64 and self.kept.dtype == torch.bool:
            return None
        return (
            f"index must be int64 that rise from 0 to at most {self.out_features - 1}, beside bool "
            f"kept; got {self.index.dtype} {self.index.tolist()[:8]} and {self.kept.dtype}"
        )

    def _checked(self, components: Tensor) -> Tensor:
        if components.dtype != torch.bool or components.shape != self.kept.shape:
            raise ShapeError(
                f"expected a bool tensor of {self.rank} ranks and {self.num_rows} rows, shape "
                f"{tuple(self.kept.shape)}; got {components.dtype}, {tuple(components.shape)}"
            )
        return components.to(self.kept.device)

    def _look(self) -> None:
        """Read from ``kept`` what is alive: the wait for the device is here and not in forward."""
        if not self.kept.is_meta:
            self._set_alive(*_num_alive([self], [self.kept])[0])

    def _set_alive(self, ranks: int, rows: int) -> None:
        self._alive = None if ranks + rows == len(self.kept) else _Alive(self, ranks, rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._look()
        return self

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._look()


@torch.no_grad()
def prune_layers_(
    layers: Sequence[LowRankSparseLinear], kept: Sequence[Tensor], *, revive: bool = False
) -> None:
    """Prune several layers as :meth:`LowRankSparseLinear.prune_`, with one wait for the device.

    Args:
        layers: changed in place; none is if one cannot be.
        kept: ``(rank + rows,)`` bool of each.
        revive: bring components that are in ``kept`` back where they were pruned.

    Raises:
        ShapeError: if a mask is not bool or has another shape.
        SettingError: if no rank of a layer would be left; one has to stay.
    """
    masks = [layer._checked(mask) for layer, mask in zip(layers, kept, strict=True)]
    if not revive:
        masks = [layer.kept & mask for layer, mask in zip(layers, masks, strict=True)]
    counts = _num_alive(layers, masks)
    for layer, (ranks, _) in zip(layers, counts, strict=True):
        if not ranks:
            raise SettingError(f"all {layer.rank} ranks would be pruned; keep at least one")
    for layer, alive, count in zip(layers, masks, counts, strict=True):
        layer.kept.copy_(alive)
        inner, mine = local_rows(layer.inner.weight)
        inner.masked_fill_(~alive[mine, None], 0)
        local_rows(layer.left.weight)[0].masked_fill_(~alive[: layer.rank], 0)
        layer._set_alive(*count)


def _num_alive(
    layers: Sequence[LowRankSparseLinear], masks: Sequence[Tensor]
) -> list[tuple[int, int]]:
    """Return how many ranks and rows of each layer a mask leaves, after one wait."""
    parts = [
        part.count_nonzero().to(masks[0].device)
        for layer, mask in zip(layers, masks, strict=True)
        for part in mask.tensor_split([layer.rank])
    ]
    counts = torch.stack(parts).tolist() if parts else []
    return list(zip(counts[::2], counts[1::2], strict=True))


class _Alive:
    """The components of a pruned layer that are alive, as indices on its device.

    Args:
        layer: that is pruned.
        num_ranks: of its ranks that are alive.
        num_rows: of its rows.

    Attributes:
        components: of all, and then the first one again to a multiple of ``_ALIGN``.
        ranks: of the ranks.
        index: the output of each row that is alive.
    """

    def __init__(self, layer: LowRankSparseLinear, num_ranks: int, num_rows: int) -> None:
        # nonzero would wait to know how many there are
        alive = (~layer.kept).int().argsort(stable=True)[: num_ranks + num_rows]
        self.components = torch.cat([alive, alive[:1].expand(-len(alive) % _ALIGN)])
        self.ranks, rows = alive.tensor_split([num_ranks])
        self.index = layer.index[rows - layer.rank]
        self._least = min(_MANY, _COPY * len(alive) // max(1, len(layer.kept) - len(alive)))

    def pays(self, num_tokens: int) -> bool:
        """Return whether a copy of the weights that are alive pays for so many tokens."""
        return num_tokens >= self._least


def _view(layer: nn.Module) -> views.LinearView:
    assert isinstance(layer, LowRankSparseLinear)
    shape = (layer.out_features, layer.in_features)
    return views.LinearView(shape, layer.bias, layer.factors, lambda: layer.weight)


views.register(LowRankSparseLinear, _view)
