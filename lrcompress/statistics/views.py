"""Linear layers of any type in one normal form: a weight ``(out, in)`` on ``(tokens, in)``.

Every other module uses this form only. A new layer type is registered here, as
:mod:`lrcompress.nn` does for the layers this package puts in.

An embedding is a table here: ``weight`` is ``(vocabulary, width)``, as a tied output head sees it,
and what is read are one-hot rows of it, given by their numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lrcompress.errors import LayerError


@dataclass(frozen=True)
class LinearView:
    """One layer in normal form: ``y = weight x + bias``.

    Attributes:
        shape: ``(out, in)``.
        bias: ``(out,)`` the layer's parameter, or None.
        parameters: the parameters a factored layer would take the place of.
        read: gives the weight ``(out, in)``, a view of the layer's storage where it can be.
        transposed: whether the layer stores its weight as ``(in, out)``.
    """

    shape: tuple[int, int]
    bias: nn.Parameter | None
    parameters: tuple[Tensor, ...]
    read: Callable[[], Tensor]
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """``(out, in)``, detached."""
        return self.read().detach()


def _linear(layer: nn.Module) -> LinearView:
    assert isinstance(layer, nn.Linear)
    shape = (layer.out_features, layer.in_features)
    return LinearView(shape, layer.bias, (layer.weight,), lambda: layer.weight)


def _conv1d(layer: nn.Module) -> LinearView:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    fan_in, fan_out = weight.shape  # GPT-2 stores (in, out)
    return LinearView((fan_out, fan_in), bias, (weight,), lambda: weight.mT, transposed=True)


def _embedding(layer: nn.Module) -> LinearView:
    assert isinstance(layer, nn.Embedding)
    shape = (layer.num_embeddings, layer.embedding_dim)
    return LinearView(shape, None, (layer.weight,), lambda: layer.weight)


# By qualified name, so that transformers need not be imported to know its Conv1D.
_VIEWS: dict[str, Callable[[nn.Module], LinearView]] = {
    "torch.nn.modules.linear.Linear": _linear,
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": _linear,
    "transformers.pytorch_utils.Conv1D": _conv1d,
}


def _qualified(kind: type) -> str:
    if kind.__bases__[0].__name__ == "FSDPModule":  # a unit of FSDP2 answers as what it was
        kind = kind.__bases__[1]
    return f"{kind.__module__}.{kind.__qualname__}"


_TABLES: dict[str, Callable[[nn.Module], LinearView]] = {}


def register(
    kind: type[nn.Module], view: Callable[[nn.Module], LinearView], *, table: bool = False
) -> None:
    """Register a layer type, with a function that returns the normal form of such a layer."""
    (_TABLES if table else _VIEWS)[_qualified(kind)] = view


def is_embedding(layer: nn.Module) -> bool:
    """Return whether the layer gives rows of a table by number, as an embedding does."""
    return isinstance(layer, nn.Embedding) or _qualified(type(layer)) in _TABLES


def is_linear(layer: nn.Module) -> bool:
    """Return whether the layer has a normal form here; subclasses do not inherit theirs."""
    return _qualified(type(layer)) in _VIEWS


def stacked_matrices(model: nn.Module) -> dict[str, str]:
    """Return 3-D parameters that hold experts' matrices, with the reason why they stay.

    The experts of a mixture may be one parameter, a matrix each. Its name and its module's are
    keys.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):  # convolutions
            continue
        stacks = [key for key, p in module.named_parameters(recurse=False) if p.ndim == 3]
        why = f"it holds experts' matrices in 3-D parameters ({', '.join(stacks)}), not in layers"
        found |= {path: why for path in (name, *(f"{name}.{key}" for key in stacks)) if stacks}
    return found


def view(layer: nn.Module, name: str = "layer", *, table: bool = False) -> LinearView:
    """Return the normal form of ``layer``; with ``table=True`` of an embedding too.

    Raises:
        LayerError: if its type has none; the message lists those that do.
    """
    if table and is_embedding(layer):
        return _TABLES.get(_qualified(type(layer)), _embedding)(layer)
    if not is_linear(layer):
        known = ", ".join(sorted(known.rpartition(".")[2] for known in _VIEWS))
        raise LayerError(f"{name} is a {type(layer).__name__}; known layer types are {known}")
    return _VIEWS[_qualified(type(layer))](layer)
