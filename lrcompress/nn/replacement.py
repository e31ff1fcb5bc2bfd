"""What every layer that takes another's place can say of itself, so that no one else has to ask."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lrcompress.statistics import views

Sizes = Mapping[str, int]


class Replacement(nn.Module, ABC):
    """A layer that stands where the architecture had put another.

    Its sizes are ``in`` and ``out``, those of the weight it stands for, and the kind's own. A new
    kind is a subclass that is named in ``lrcompress.nn.KINDS``; plans, checkpoints, exported
    folders and reports ask it for the rest.

    Attributes:
        kind: what plans call it.
        sizing_tensors: tensors that only this kind of layer has, of those it may stand for, and
            how many axes each has.
        plain: the layer type it stands for, and can go back to.
    """

    kind: ClassVar[str]
    sizing_tensors: ClassVar[Mapping[str, int]]
    plain: type[nn.Module]

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """``in``, ``out``, and the kind's own sizes."""

    @property
    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """The parameters that are here in place of the weight."""

    @classmethod
    @abstractmethod
    def in_place_of(cls, layer: nn.Module, *args: Any, **sizes: int) -> Self:
        """Return a layer of these own sizes to stand where ``layer`` stood, values not yet set."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """Return a plain layer that computes the same."""

    def inconsistency(self) -> str | None:
        """Return what is wrong with the buffers it was loaded with, or None.

        Shapes are checked before; this is about values that no layer of its kind could have.
        """
        return None

    @classmethod
    def can_replace(cls, layer: nn.Module) -> bool:
        """Return whether it can stand where ``layer`` does."""
        return views.is_linear(layer)

    @staticmethod
    @abstractmethod
    def size_limits(sizes: Sizes) -> dict[str, tuple[int, int]]:
        """Return the least and the greatest of its own sizes, for ``in`` and ``out``."""

    @staticmethod
    @abstractmethod
    def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Return the sizes that the shapes of the tensors ``sizing_tensors`` say."""

    @staticmethod
    @abstractmethod
    def tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor it is stored as, but for its bias.

        Raises:
            KeyError: if a size is missing.
        """


def plain_linear(
    kind: type[nn.Module], weight: Tensor, bias: nn.Parameter | None, *, trained: bool
) -> nn.Module:
    """Return an ``nn.Linear``, or a ``Conv1D``, which stores its weight the other way round.

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
