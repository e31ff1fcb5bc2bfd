"""Offload: what is added to sums in host memory travels there while a step goes on."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.linalg import add_gram_


@dataclass(frozen=True)
class Arrival:
    """Values on their way from an accelerator to a sum in host memory.

    Attributes:
        total: the sum, on the CPU.
        part: what will be added to it, on the CPU; its values count after :func:`settle_`.
        device: that it comes from.
    """

    total: Tensor
    part: Tensor
    device: torch.device


def send(total: Tensor, part: Tensor) -> Arrival:
    """Begin to copy ``part`` to the host, into pinned memory, without waiting for it.

    Args:
        total: on the CPU.
        part: of its shape, on an accelerator.
    """
    own = torch.accelerator.current_accelerator()
    pinned = own is not None and own.type == part.device.type and own.type != "mps"
    there = torch.empty_like(total, pin_memory=pinned)
    return Arrival(total, there.copy_(part, non_blocking=True), part.device)


def add_offloaded_gram_(total: Tensor, x: Tensor, scale: float, arriving: list[Arrival]) -> None:
    """Add ``scale² xᵀ x`` to a sum, as :func:`~lrcompress.linalg.add_gram_` does, from anywhere.

    Args:
        total: on any device. One on the CPU gets what comes from elsewhere in :func:`settle_`.
        x: ``(tokens, features)``; the product is made where it is, and one triangle sent.
        scale: of ``x``.
        arriving: what is on its way to ``total``, which grows.
    """
    if total.device == x.device:
        add_gram_(total, x, scale)
        return
    part = torch.zeros_like(total, device=x.device)
    add_gram_(part, x, scale)
    if total.device.type == "cpu":
        arriving.append(send(total, part))
    else:
        total += part.to(total.device, non_blocking=True)


def settle_(lists: Iterable[list[Arrival]]) -> None:
    """Wait once for every device, add what has arrived, and empty the lists."""
    held = [one for one in lists if one]
    for device in dict.fromkeys(arrival.device for one in held for arrival in one):
        torch.accelerator.synchronize(device)
    for one in held:
        for arrival in one:
            arrival.total.add_(arrival.part)
        one.clear()
