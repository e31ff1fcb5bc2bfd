"""Weights of factored layers, multiplied out only when their values are used.

Code around a layer asks its ``weight`` for more than values. T5 compares ``wo.weight.dtype`` in
every forward pass, ``generate`` asks for devices, and torch's fused transformer layers multiply by
``linear1.weight`` themselves and never call the layer. A product for each of these would make a
factored layer slower than the dense one it replaced.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_PROPERTIES = (
    *("dtype", "device", "shape", "layout", "ndim", "requires_grad"),
    *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_sparse", "is_quantized", "is_nested"),
)
# What is known of a product without making it.
_DESCRIBED = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__),
    }
)


class DeferredWeight(Tensor):
    """A weight with shape, dtype and device, whose values are computed when they are used.

    Any other operation computes the weight and goes on with it as a plain tensor, gradients
    included; each does so anew. Having a ``__torch_function__`` of its own also keeps torch's
    fused transformer layers from reading it: they then call the layer.

    Args:
        shape: ``(out, in)``.
        like: a factor, of the same dtype and device.
        compute: gives the weight.

    Example:
        >>> left, right = torch.ones(3, 1), torch.ones(1, 2)
        >>> weight = DeferredWeight((3, 2), left, lambda: left @ right)
        >>> weight.shape, weight.dtype, weight.sum()
        (torch.Size([3, 2]), torch.float32, tensor(6.))
    """

    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, int], like: Tensor, compute: Callable[[], Tensor]
    ) -> "DeferredWeight":
        made: DeferredWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        made._compute = compute
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _DESCRIBED:
                return func(*args, **(kwargs or {}))
            return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda weight: weight._compute(), (args, kwargs or {}))
        return func(*args, **kwargs)


def deferred_weight(shape: tuple[int, int], like: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Return a weight whose values are computed when they are used, or now within a trace.

    A compiler takes out a product that nobody uses by itself, and knows no tensors of our own.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return compute()
    return DeferredWeight(shape, like, compute)
