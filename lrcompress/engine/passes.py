"""Further passes over batches that a point makes: to refit layers, and to time the model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import SettingError

# A batch's padding mask, that of a decoder's own input, and why there is none.
Masks = tuple[Tensor | None, Tensor | None, str | None]


@dataclass(frozen=True)
class Passes:
    """Passes of a model over batches, as often as they are needed.

    Attributes:
        batches: that can be gone through several times, the same each time.
        run: runs the model on a batch; it may be ended before it returns.
        masks: padding masks of a batch.
        context: that the model runs in, such as autocast.
    """

    batches: Iterable[Any]
    run: Callable[[nn.Module, Any], object]
    masks: Callable[[Any], Masks]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        if isinstance(self.batches, Iterator):
            raise SettingError(
                "refit and latency make further passes over batches, which are an iterator and can "
                "be gone through once; give a list or a data loader, or leave them out"
            )

    def run_alike(self, model: nn.Module, batch: Any) -> None:
        """Run the model on a batch, with the same random numbers each time."""
        with random_state_kept(model):
            torch.manual_seed(0)
            self.run(model, batch)


def random_state_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Let random numbers go on after the block as if it had drawn none."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng([*devices])
