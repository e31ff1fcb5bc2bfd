"""True Fisher: labels as the model predicts them, in place of the empirical Fisher's."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrcompress.errors import NoMatchError, ObservationError, SettingError, nearest
from lrcompress.linalg import double, where_it_is
from lrcompress.statistics.capture import Recorder

# Chances that are computed at once, 32 MiB in float32.
_CHUNK = 2**23
MOST_CLASSES = 8  # of which all labels are gone through; of more, one is drawn


def check_fisher(fisher: str) -> None:
    """Check whose gradients are asked for.

    Raises:
        SettingError: unless it is ``"labels"`` or ``"model"``.
    """
    if fisher not in ("labels", "model"):
        raise SettingError(f"fisher must be 'labels' or 'model', got {fisher!r}")


def fisher_losses(logits: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Return losses whose gradients' second moments, summed, are the Fisher information.

    Of one prediction an example among few classes it is exact: with chances ``p`` the gradients
    of log-likelihoods have the second moment ``Jᵀ (diag(p) − p pᵀ) J``, ``J`` the Jacobian of the
    logits, and ``diag(p) − p pᵀ = L Lᵀ`` with ``L (classes, classes − 1)``, whose columns weight
    the logits of a loss each. Otherwise labels are drawn, see :func:`drawn_loss`: a label for
    every token, as products of gradients of different tokens have to vanish on average.

    Args:
        logits: ``(examples, classes)``, or ``(…, classes)``, with their graph.
        generator: for the draws.

    Returns:
        One loss, or ``classes − 1`` up to :data:`MOST_CLASSES`; each takes a backward pass.

    Raises:
        SettingError: if there are fewer than two classes.

    Example:
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> (loss,) = fisher_losses(logits, torch.Generator())
        >>> torch.autograd.grad(loss, logits)
        (tensor([[ 0.5000, -0.5000]]),)
    """
    if logits.ndim != 2 or not 2 <= logits.shape[1] <= MOST_CLASSES:
        return [drawn_loss(logits, generator)]
    weights = _covariance_factor(logits.detach().float().softmax(-1))
    return [(logits.float() * column).sum(-1).mean() for column in weights.unbind(-1)]


def add_fisher(
    recorder: Recorder,
    logits: Tensor,
    generator: torch.Generator,
    scale: float = 1.0,
    *,
    keep_graph: bool = False,
) -> None:
    """Add the gradients of :func:`fisher_losses` to a step of a recorder; no ``.grad`` is touched.

    Args:
        recorder: within its ``step(keep_outputs=True)``, which is committed.
        logits: of this step.
        generator: for draws.
        scale: multiplies the losses, as that of half precision does.
        keep_graph: for the loss's own backward pass.
    """
    losses = fisher_losses(logits, generator)
    for number, loss in enumerate(losses, start=1):
        if number > 1:
            recorder.again()
        if recorder.outputs:  # none where this process observes no layer
            keep = keep_graph or number < len(losses)
            torch.autograd.grad(
                loss * scale, recorder.outputs, retain_graph=keep, allow_unused=True
            )


def _covariance_factor(chances: Tensor) -> Tensor:
    """Return ``L (rows, classes, classes − 1)`` with ``diag(p) − p pᵀ = L Lᵀ``, lower triangular.

    Its column ``k`` is that of the label ``k`` against all later ones, given that it is none of
    the earlier: ``√(p_k rest_{k+1} / rest_k)``, and below it that times ``−p_j / rest_{k+1}``.
    """
    classes = chances.shape[1]
    rest = chances @ torch.ones(classes, classes).to(chances).tril()  # of the label and all later
    tiny = torch.finfo(chances.dtype).tiny
    later = rest[:, 1:].clamp(min=tiny)
    size = (chances[:, :-1] * later / rest[:, :-1].clamp(min=tiny)).sqrt()
    shares = chances[:, :, None] / later[:, None, :]
    below = torch.ones(classes, classes - 1).to(chances).tril(-1)
    return (
        torch.eye(classes, classes - 1).to(chances) * size[:, None] - below * shares * size[:, None]
    )


def drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean cross entropy of labels sampled from ``softmax(logits)``, with its graph.

    The gradients of the training labels vanish once these are fitted, those of sampled labels
    do not: their second moment is the Fisher information itself.

    Args:
        logits: ``(..., classes)``, at least two classes.
        generator: on the CPU; it gives one number for every row of logits, from which the label is
            found where the logits are: the same on every device, but for rounding, and without
            waiting for it.

    Raises:
        SettingError: if there are fewer than two classes to draw from.

    Cost:
        The draw takes a few passes over the logits and 0.13 GB; the loss is in float32.
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise SettingError(
            f"fisher='model' draws class labels and needs two logits or more, got {classes}; "
            "use fisher='labels' for regression"
        )
    flat = logits.reshape(-1, classes).float()
    return F.cross_entropy(flat, _drawn(flat.detach(), generator))


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a label for each row of ``logits``, ``(rows, classes)`` in float32."""
    numbers = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    device, logits = logits.device, where_it_is(logits, torch.float64)
    numbers = numbers.to(logits.device, non_blocking=True)
    rows = max(1, _CHUNK // logits.shape[1])
    chunks = zip(torch.split(logits, rows), torch.split(numbers, rows), strict=True)
    labels = [_labels(part.softmax(-1), number) for part, number in chunks]
    return torch.cat(labels).to(device)


def _labels(chances: Tensor, numbers: Tensor) -> Tensor:
    """Return the labels at which the cumulated chances first exceed numbers from 0 to 1.

    First the block of classes and then the class in it: two sums over √classes in float64 are
    exact where one in float32 over a whole vocabulary is not, and take no memory.

    Args:
        chances: ``(rows, classes)``, not negative.
        numbers: ``(rows,)`` in float64, below 1.
    """
    width = math.isqrt(chances.shape[1] - 1) + 1
    blocks = F.pad(chances, (0, -chances.shape[1] % width)).reshape(len(chances), -1, width)
    block, numbers = _first_above(blocks.sum(-1, dtype=torch.float64), numbers)
    inside = blocks.take_along_dim(block[:, None, None], 1).squeeze(1)
    return block * width + _first_above(double(inside), numbers)[0]


def _first_above(chances: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first place whose cumulated share exceeds a number, and the number within it.

    Both are ``(rows,)``, the second from 0 to 1. A place without a chance is never the first.
    """
    # a product, for cumsum is not deterministic on a GPU in every version of torch
    sums = chances @ torch.ones_like(chances[0]).expand(chances.shape[1], -1).triu()
    # the last place holds what rounding would put behind it
    target = torch.minimum(numbers * sums[:, -1], sums[:, -1].nextafter(numbers.new_zeros(())))
    place = (sums <= target[:, None]).sum(1)
    chance = chances.take_along_dim(place[:, None], 1).squeeze(1)
    before = sums.take_along_dim(place[:, None], 1).squeeze(1) - chance
    return place, ((target - before) / chance).clamp(0, 1)


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
