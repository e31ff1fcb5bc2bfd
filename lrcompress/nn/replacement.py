"""Replacement: the base class of layers that replace a dense layer in a compressed model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lrcompress.statistics import views

Sizes = Mapping[str, int]


class Replacement(nn.Module, ABC):
    """Base class of layers that replace a dense linear layer or embedding.

    Its sizes are ``in`` and ``out``, those of the dense weight ``(out, in)``, and the kind's own,
    such as ``rank``. A new kind is a subclass that is listed in ``lrcompress.nn.KINDS``; plans,
    checkpoints, exported folders and reports use the methods of this class for the rest. An
    embedding counts as a weight ``(vocabulary, width)``.

    Attributes:
        kind: its name in plans.
        sizing_tensors: name to number of axes, of the stored tensors by which a state dict shows
            that a layer is of this kind, and from whose shapes its sizes are read.
        plain: the dense layer type that :meth:`to_dense` returns.
    """

    kind: ClassVar[str]
    sizing_tensors: ClassVar[Mapping[str, int]]
    plain: type[nn.Module]

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The sizes of the layer: ``in``, ``out`` and those of its kind."""

    @property
    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """The parameters that replace the dense weight, in a fixed order.

        The last one gives the dtype and the device of a layer that replaces this one in turn.
        """

    @classmethod
    @abstractmethod
    def in_place_of(cls, layer: nn.Module, *args: Any, **sizes: int) -> Self:
        """Return a layer of these sizes to replace ``layer``; its values are not yet set.

        Args:
            layer: whose dtype, device and training flags it takes over; it is not changed.
            *args: the kind's own sizes, in the order of :meth:`size_limits`.
            **sizes: or by name.

        Raises:
            LayerError: if the kind cannot replace a layer of that type.
            ShapeError: if the sizes do not fit the layer.
        """

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """Return a dense layer that computes the same.

        Raises:
            LayerError: if no dense layer does.
        """

    def inconsistency(self) -> str | None:
        """Return what is wrong with the values of the buffers that were loaded, or None.

        Shapes are checked before; these are values that no layer of its kind could have.
        """
        return None

    @classmethod
    def can_replace(cls, layer: nn.Module) -> bool:
        """Return whether this kind can replace a layer of the type of ``layer``."""
        return views.is_linear(layer)

    @staticmethod
    @abstractmethod
    def size_limits(sizes: Sizes) -> dict[str, tuple[int, int]]:
        """Return the least and the greatest value of each of the kind's own sizes.

        Args:
            sizes: ``in`` and ``out``; others are not read.

        Returns:
            Name of a size to ``(least, greatest)``.
        """

    @staticmethod
    @abstractmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Return the sizes of a stored layer, from the shapes of its tensors.

        Args:
            shapes: name to shape, of the tensors in ``sizing_tensors``.
        """

    @staticmethod
    @abstractmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor in the layer's state dict, except its bias.

        Args:
            sizes: ``in``, ``out`` and the kind's own.

        Raises:
            KeyError: if a size is missing.
        """


def plain_linear(
    kind: type[nn.Module], weight: Tensor, bias: nn.Parameter | None, *, trained: bool
) -> nn.Module:
    """Return a dense ``nn.Linear``, or a ``Conv1D``, which stores its weight as ``(in, out)``.

    Args:
        kind: which of the two.
        weight: ``(out, in)``.
        bias: ``(out,)`` the layer's own, the same parameter, or None.
        trained: whether the weight is.
    """
    out_features, in_features = weight.shape
    with torch.device("meta"):  # no memory is filled, and no random number drawn
        if kind is nn.Linear:
            plain: nn.Module = nn.Linear(in_features, out_features, bias=False)
        else:
            plain, weight = kind(out_features, in_features), weight.mT.contiguous()
    plain.weight = nn.Parameter(weight.detach(), requires_grad=trained)
    plain.bias = bias  # type: ignore[assignment]
    return plain
