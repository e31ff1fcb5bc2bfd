"""Optimizer state of few bits, as the optimizers of torchao keep it.

Its tensors are of classes of their own, of which little but a copy can be made. They are known by
the module they come from, so that torchao need not be imported.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor


def is_low_bit(value: object) -> bool:
    """Return whether a value is state of few bits of torchao's optimizers."""
    return isinstance(value, Tensor) and type(value).__module__.startswith("torchao.")


def plain(value: Any) -> Any:
    """Return state of few bits as an ordinary tensor, and anything else as it is."""
    return value.dequantize() if is_low_bit(value) else value


def as_before(
    optimizer: Any,
    parameter: Tensor,
    state: Mapping[str, Any],
    before: Mapping[str, Any],
    signed: Collection[str],
) -> dict[str, Any]:
    """Return state that was carried over in as few bits as it had.

    Args:
        optimizer: which decides what is too small for that.
        parameter: of the state.
        state: as ordinary tensors.
        before: of the parameter in whose place it stands.
        signed: the keys of what may be negative.
    """
    held = dict(state)
    for key, value in state.items():
        if is_low_bit(before.get(key)):
            held[key] = optimizer._new_buffer(parameter, key in signed)
            held[key].copy_(value)
    return held
