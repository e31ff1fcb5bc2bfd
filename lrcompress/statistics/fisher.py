"""True Fisher: labels sampled from the model's prediction, in place of the empirical Fisher's."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrcompress.errors import NoMatchError, ObservationError, SettingError, nearest


def drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean cross entropy of labels sampled from ``softmax(logits)``, with its graph.

    The gradients of the training labels vanish once these are fitted, those of sampled labels
    do not: their second moment is the Fisher information itself.

    Args:
        logits: ``(..., classes)``, at least two classes.
        generator: on the CPU; its draws are the same on every device.

    Raises:
        SettingError: if there are fewer than two classes to draw from.
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise SettingError(
            f"fisher='model' draws class labels and needs two logits or more, got {classes}; "
            "use fisher='labels' for regression"
        )
    flat = logits.reshape(-1, classes).float()
    chances = flat.detach().softmax(-1).cpu()
    labels = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    return F.cross_entropy(flat, labels.to(flat.device))


class LogitsCapture:
    """Captures a model's logits by forward hooks, during chosen steps.

    Args:
        model: the module whose logits are captured.
        name: of the submodule whose output are the logits; None takes the first output that
            has ``.logits``, as those of transformers models do.

    Raises:
        NoMatchError: if there is no such submodule.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        modules = dict(model.named_modules())
        if name is not None and name not in modules:
            raise NoMatchError(
                f"logits={name!r} names no submodule; nearest: {nearest(name, modules)}"
            )
        self.name = name
        self._modules = list(modules.values()) if name is None else [modules[name]]
        self._caught: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Capture the logits of forward passes while the block runs."""
        self._caught = None
        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_hook(self._hear).remove)
            yield

    def _hear(self, _module: nn.Module, _args: object, output: object) -> None:
        logits = output if self.name is not None else getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.requires_grad:
            self._caught = logits

    def take(self) -> Tensor:
        """Return the logits of the last forward pass.

        Raises:
            ObservationError: if none were captured.
        """
        if self._caught is None:
            where = (
                "no module's output has .logits"
                if self.name is None
                else (f"submodule {self.name!r} returned no tensor with a gradient")
            )
            raise ObservationError(
                f"fisher='model' found no logits: {where}; "
                "name the submodule that returns them with logits="
            )
        caught, self._caught = self._caught, None
        return caught
