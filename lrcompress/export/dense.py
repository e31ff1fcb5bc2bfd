"""Merge factors back into dense layers, for tools that know nothing of factors."""

import copy
from typing import Any, TypeVar

from torch import nn

from lrcompress.nn import Replacement
from lrcompress.structure.tied_weights import plain_layers, update_tied_weights_keys_
from lrcompress.structure.wrapped import check_unwrapped

Model = TypeVar("Model", bound=nn.Module)


def merge_dense(model: Model) -> Model:
    """Return a copy of ``model`` in which every factored or pruned layer is dense again.

    It computes the same to rounding. Layers and parameters that are shared stay shared, each
    layer is of the type that it had before factoring, and ``save_pretrained`` of
    ``transformers`` writes it as an ordinary model. ``model`` itself is not changed.

    Args:
        model: any module; what is not factored is copied as it is.

    Returns:
        The dense copy, on the devices and in the dtypes of ``model``.

    Raises:
        LayerError: if a layer has no dense form, as :class:`~lrcompress.nn.SafeEmbedding`, has
            adapters, or quantised factors.

    Cost:
        The memory of the dense model beside that of ``model``, and one matrix product a layer.

    Example:
        >>> from lrcompress.nn import LowRankLinear
        >>> merge_dense(nn.Sequential(LowRankLinear(6, 4, rank=2)))
        Sequential(
          (0): Linear(in_features=6, out_features=4, bias=True)
        )
    """
    check_unwrapped(model)
    memo: dict[int, Any] = {}
    replaced = [module for module in model.modules() if isinstance(module, Replacement)]
    for layer, plain in plain_layers(replaced).items():
        if layer.bias is not None and plain.bias is layer.bias:
            plain.bias = copy.deepcopy(layer.bias, memo)
        memo[id(layer)] = plain  # deepcopy takes it for the copy it has already made
    merged = copy.deepcopy(model, memo)
    forget_structure_(merged)
    update_tied_weights_keys_(merged)
    return merged


def forget_structure_(model: nn.Module) -> None:
    """Remove the attributes that mark a ``transformers`` model as compressed."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for holder, name in ((module, "hf_quantizer"), (config, "quantization_config")):
            if name in getattr(holder, "__dict__", {}):
                delattr(holder, name)
