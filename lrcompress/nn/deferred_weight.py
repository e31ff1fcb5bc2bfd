"""Weights of factored layers, multiplied out only when their values are used.

Code around a layer asks its ``weight`` for more than values. T5 compares ``wo.weight.dtype`` in
every forward pass, ``generate`` asks for devices, and torch's fused transformer layers multiply by
``linear1.weight`` themselves and never call the layer. A product for each of these would make a
factored layer slower than the dense one it replaced.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_PROPERTIES = (
    *("dtype", "device", "shape", "layout", "ndim", "requires_grad"),
    *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_sparse", "is_quantized", "is_nested"),
)
# What gives an address: the values have to live as long as the weight that was asked.
_ADDRESSES = frozenset({Tensor.data_ptr, Tensor.untyped_storage})
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
    included; each does so anew. Where torch takes it past its Python functions, as
    ``torch.autograd.Function.apply`` does, a gradient that ``backward`` brings is handed on to the
    factors. Having a ``__torch_function__`` of its own also keeps torch's fused transformer layers
    from reading it: they then call the layer. To make a parameter of it, take
    ``weight.detach()`` or a copy.

    Args:
        shape: ``(out, in)``.
        like: a factor, of the same dtype and device.
        compute: gives the weight.
        trained: whether gradients are to reach the factors.

    Example:
        >>> left, right = torch.ones(3, 1), torch.ones(1, 2)
        >>> weight = DeferredWeight((3, 2), left, lambda: left @ right)
        >>> weight.shape, weight.dtype, weight.sum()
        (torch.Size([3, 2]), torch.float32, tensor(6.))
    """

    _compute: Callable[[], Tensor]
    _made: Tensor | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int],
        like: Tensor,
        compute: Callable[[], Tensor],
        trained: bool = False,
    ) -> "DeferredWeight":
        made: DeferredWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=trained
        )
        made._compute, made._made = compute, None
        if trained:
            with torch._C.DisableTorchFunctionSubclass():
                made.register_post_accumulate_grad_hook(_hand_on)  # type: ignore[no-untyped-call]
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _DESCRIBED:
                return func(*args, **(kwargs or {}))
            if func in _ADDRESSES:
                return func(args[0]._kept())
            made = tree_map_only(cls, lambda weight: weight._compute(), (args, kwargs or {}))
            return func(*made[0], **made[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = tree_map_only(cls, lambda weight: weight._compute(), (args, kwargs or {}))
        return func(*made[0], **made[1])

    def _kept(self) -> Tensor:
        with torch.no_grad():
            self._made = self._compute() if self._made is None else self._made
        return self._made


def _hand_on(weight: Tensor) -> None:
    """Hand the gradient that has arrived at a weight on to its factors."""
    assert isinstance(weight, DeferredWeight)
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
        gradient, weight.grad = weight.grad, None
        torch.autograd.backward(weight._compute(), gradient)


def deferred_weight(
    shape: tuple[int, int],
    like: Tensor,
    compute: Callable[[], Tensor],
    factors: Iterable[Tensor],
) -> Tensor:
    """Return a weight whose values are computed when they are used, or now within a trace.

    A compiler takes out a product that nobody uses by itself, and knows no tensors of our own.

    Args:
        shape: ``(out, in)``.
        like: a factor, of the same dtype and device.
        compute: gives the weight.
        factors: the parameters it is made of.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return compute()
    trained = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
    return DeferredWeight(shape, like, compute, trained)
