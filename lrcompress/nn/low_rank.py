"""Low-rank linear layer: two factors in place of one weight."""

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from lrcompress.nn.deferred_weight import deferred_weight
from lrcompress.nn.replacement import Replacement, Sizes, plain_linear
from lrcompress.statistics import views


class FactoredLinear(Replacement):
    """Base class of factored linear layers: they take over a layer's bias, and can become dense.

    Attributes:
        in_features: width of the input.
        out_features: width of the output.
        rank: terms in the sum of products: the rank, or the number of Kronecker products.
        bias: ``(out,)`` or None.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.plain: type[nn.Module] = nn.Linear

    @property
    def weight(self) -> Tensor:
        """The product ``(out, in)``, for code that reads a linear layer's weight.

        It is multiplied out when its values are used; its dtype, device and shape cost nothing.
        """
        shape = (self.out_features, self.in_features)
        return deferred_weight(shape, self.factors[-1], self._product, self.factors)

    @abstractmethod
    def _product(self) -> Tensor:
        """Return the weight, multiplied out."""

    @abstractmethod
    def _set_bias(self, bias: nn.Parameter | None) -> None:
        """Make ``bias`` the layer's own, the same parameter."""

    def to_dense(self) -> nn.Module:
        """Return a dense layer with the same product, dtype, device and bias parameter.

        It is a ``Conv1D`` where this layer replaced one, so that dense checkpoints fit, else an
        ``nn.Linear``.
        """
        trained, bias = self.factors[-1].requires_grad, self.bias
        dense = plain_linear(self.plain, self.weight, bias, trained=trained)  # type: ignore[arg-type]
        return dense.train(self.training)

    def _take_over(self, layer: nn.Module, old: views.LinearView) -> Self:
        self._set_bias(old.bias)
        if isinstance(layer, FactoredLinear):
            self.plain = layer.plain
        elif old.transposed:
            self.plain = type(layer)
        for factor in self.factors:
            factor.requires_grad_(old.parameters[-1].requires_grad)
        return self.train(layer.training)


class LeftFactoredLinear(FactoredLinear):
    """Base class of linear layers whose last factor is ``left``, which holds their bias.

    Attributes:
        left: the left factor, ``rank`` wide.
    """

    left: nn.Linear

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias ``(out,)``, kept on the left factor."""
        return self.left.bias

    def _set_bias(self, bias: nn.Parameter | None) -> None:
        self.left.bias = bias  # type: ignore[assignment]


class LowRankLinear(LeftFactoredLinear):
    """Low-rank linear layer: ``y = left (right x) + bias``, of rank at most ``rank``.

    It has the input and output of the layer it replaces, and ``rank·(in + out)`` parameters
    besides the bias. A new one starts as two random ``nn.Linear``.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: columns of ``left``, from 1 to ``min(out, in)``; this is not checked here.
        bias: whether it has one.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        input ``(..., in)``, output ``(..., out)``; ``right.weight`` ``(rank, in)``,
        ``left.weight`` ``(out, rank)``, ``left.bias`` ``(out,)`` or None.

    Cost:
        ``rank·(in + out)`` multiply-adds a token against ``in·out`` of a dense layer, so it pays
        below ``rank = in·out / (in + out)``.

    Example:
        >>> LowRankLinear(6, 4, rank=2)(torch.zeros(3, 5, 6)).shape
        torch.Size([3, 5, 4])
    """

    kind = "low_rank"
    sizing_tensors = MappingProxyType({"left.weight": 2, "right.weight": 2})

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
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def in_place_of(cls, layer: nn.Module, rank: int) -> Self:  # type: ignore[override]
        """Return a layer of that rank to replace ``layer``; its factors are not yet set.

        It takes over ``layer``'s bias, the same parameter, and its dtype, device and training
        flags.

        Raises:
            LayerError: if ``layer`` is of a type that is not known.
        """
        old = views.view(layer)
        out_features, in_features = old.shape
        weight = old.parameters[-1]
        new = cls(
            in_features,
            out_features,
            rank,
            bias=False,
            device=weight.device,
            dtype=weight.dtype,
        )
        return new._take_over(layer, old)

    @property
    def sizes(self) -> dict[str, int]:
        return {"in": self.in_features, "out": self.out_features, "rank": self.rank}

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.right.weight, self.left.weight

    @staticmethod
    def size_limits(sizes: Sizes) -> dict[str, tuple[int, int]]:
        return {"rank": (1, min(sizes["in"], sizes["out"]))}

    @staticmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        (out_features, rank), (_, in_features) = shapes["left.weight"], shapes["right.weight"]
        return {"in": in_features, "out": out_features, "rank": rank}

    @staticmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        rank = sizes["rank"]
        return {"left.weight": (sizes["out"], rank), "right.weight": (rank, sizes["in"])}

    def _product(self) -> Tensor:
        return self.left.weight @ self.right.weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply ``right``, then ``left`` and the bias."""
        return self.left(self.right(x))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _view(layer: nn.Module) -> views.LinearView:
    assert isinstance(layer, LowRankLinear)
    shape = (layer.out_features, layer.in_features)
    return views.LinearView(shape, layer.bias, layer.factors, lambda: layer.weight)


views.register(LowRankLinear, _view)
