"""Linear layer without the outputs or inputs that structured pruning removed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.nn.replacement import Replacement, Sizes, plain_linear
from lrcompress.statistics import views


class PrunedLinear(Replacement):
    """Linear layer with fewer inputs or outputs than in the architecture: ``y = weight x + bias``.

    The layers before and after it must have as few: in an attention whose heads were removed,
    query, key and value have fewer outputs and the output projection has fewer inputs; in a
    narrowed feed-forward block likewise. Its dense form has zeros for what is gone, with which the
    attention, or the block, computes the same.

    Args:
        in_features: inputs in the architecture.
        out_features: outputs in the architecture.
        rows: outputs that are left.
        columns: inputs that are left.
        bias: whether it has one.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        in_features: inputs that are left.
        out_features: outputs that are left.

    Shapes:
        input ``(..., columns left)``, output ``(..., rows left)``; ``weight``
        ``(rows left, columns left)``; ``bias`` ``(rows left,)`` or None; ``rows`` ``(out,)`` and
        ``columns`` ``(in,)`` bool: which of the architecture's features are left.

    Example:
        >>> rows = torch.tensor([True, False, True, False])
        >>> PrunedLinear.of(nn.Linear(6, 4), rows=rows)
        PrunedLinear(in_features=6 of 6, out_features=2 of 4)
    """

    kind = "narrow"
    sizing_tensors = MappingProxyType({"weight": 2, "rows": 1, "columns": 1})

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rows: int,
        columns: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of zeros in which the first rows and columns are left."""
        super().__init__()
        self.plain: type[nn.Module] = nn.Linear
        self.in_features, self.out_features = columns, rows
        weight = torch.zeros(rows, columns, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(weight.new_zeros(rows)) if bias else None
        self.register_buffer("rows", torch.arange(out_features, device=device) < rows)
        self.register_buffer("columns", torch.arange(in_features, device=device) < columns)

    @classmethod
    def in_place_of(cls, layer: nn.Module, rows: int, columns: int) -> Self:  # type: ignore[override]
        """Return a layer of these sizes to replace ``layer``; its values are not yet set.

        It takes over ``layer``'s dtype, device, training flags and whether it has a bias.

        Args:
            layer: a linear layer, which is made dense first if it is factored; it is not changed.
            rows: outputs that are left.
            columns: inputs that are left.

        Raises:
            LayerError: if ``layer`` is of a type that is not known.
        """
        layer = layer.to_dense() if isinstance(layer, Replacement) else layer
        old = views.view(layer)
        out_features, in_features = old.shape
        new = cls(
            in_features,
            out_features,
            rows,
            columns,
            bias=old.bias is not None,
            device=old.parameters[-1].device,
            dtype=old.parameters[-1].dtype,
        )
        new.plain = type(layer) if old.transposed else nn.Linear
        for parameter in new.parameters():
            parameter.requires_grad_(old.parameters[-1].requires_grad)
        return new.train(layer.training)

    @classmethod
    @torch.no_grad()
    def of(
        cls, layer: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> Self:
        """Return a pruned copy of ``layer``, with some of its outputs and inputs.

        Where all outputs are left, its bias is the same parameter.

        Args:
            layer: a dense linear layer, or a pruned one, which then loses more.
            rows: ``(out,)`` bool, which of its outputs are left; None is all.
            columns: ``(in,)`` bool, which of its inputs are left; None is all.

        Raises:
            LayerError: if ``layer`` is of a type that is not known.
        """
        old = views.view(layer)
        out_features, in_features = old.shape
        device = old.parameters[-1].device
        left = [
            torch.ones(size, dtype=torch.bool, device=device) if given is None else given.to(device)
            for given, size in ((rows, out_features), (columns, in_features))
        ]
        new = cls.in_place_of(layer, int(left[0].sum()), int(left[1].sum()))
        if isinstance(layer, PrunedLinear):
            new.plain = layer.plain
            new.rows.copy_(layer.rows.masked_scatter(layer.rows, left[0]))
            new.columns.copy_(layer.columns.masked_scatter(layer.columns, left[1]))
        else:
            new.rows.copy_(left[0])
            new.columns.copy_(left[1])
        new.weight.copy_(old.weight[left[0]][:, left[1]])
        if old.bias is not None and new.out_features == out_features:
            new.bias = old.bias
        elif old.bias is not None:
            assert new.bias is not None
            new.bias.copy_(old.bias[left[0]])
        return new

    @property
    def sizes(self) -> dict[str, int]:
        own = {"rows": self.out_features, "columns": self.in_features}
        return {"in": len(self.columns), "out": len(self.rows), **own}

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    @staticmethod
    def size_limits(sizes: Sizes) -> dict[str, tuple[int, int]]:
        return {"rows": (1, sizes["out"]), "columns": (1, sizes["in"])}

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        (out_features,), (in_features,) = shapes["rows"], shapes["columns"]
        rows, columns = shapes["weight"]
        return {"in": in_features, "out": out_features, "rows": rows, "columns": columns}

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        own = {"rows": (sizes["out"],), "columns": (sizes["in"],)}
        return {"weight": (sizes["rows"], sizes["columns"]), **own}

    def inconsistency(self) -> str | None:
        if self.rows.is_meta:
            return None
        kinds = [self.rows.dtype, self.columns.dtype]
        if kinds != [torch.bool] * 2:
            return f"rows and columns must be bool, got {kinds}"
        found = (int(self.rows.sum()), int(self.columns.sum()))
        if found == tuple(self.weight.shape):
            return None
        return f"rows and columns must name {tuple(self.weight.shape)} features, got {found}"

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return a dense layer of the architecture's size, with zeros for what was removed.

        It is a ``Conv1D`` where this layer replaced one, else an ``nn.Linear``. Its bias is the
        same parameter if all outputs are left.
        """
        weight = self.weight.new_zeros(len(self.rows), len(self.columns))
        if not weight.is_meta:
            weight[self.rows.nonzero(), self.columns.nonzero().mT] = self.weight
        trained, bias = self.weight.requires_grad, self.bias
        if bias is not None and len(bias) < len(self.rows):
            whole = bias.new_zeros(len(self.rows))
            if not whole.is_meta:
                whole[self.rows] = bias
            bias = nn.Parameter(whole, trained)
        return plain_linear(self.plain, weight, bias, trained=trained).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the weight that is left, and the bias."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features} of {len(self.columns)}, "
            f"out_features={self.out_features} of {len(self.rows)}"
        )


def _view(layer: nn.Module) -> views.LinearView:
    assert isinstance(layer, PrunedLinear)
    shape = (layer.out_features, layer.in_features)
    return views.LinearView(shape, layer.bias, layer.factors, lambda: layer.weight)


views.register(PrunedLinear, _view)
