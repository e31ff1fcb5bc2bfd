"""Importance scores for pruning: of rows, entries and rank components, from gradients.

The loss changes by about ``−p·∂L/∂p`` when a parameter ``p`` is set to zero. What is pruned
together is scored together: a *unit* is a row of the sparse part, an entry of it, or a rank
component, which is the same as its singular value.

Sources: Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019); Zhang et
al., "PLATON" (ICML 2022, arXiv 2206.12562); Li et al., "LoSparse" (ICML 2023, arXiv 2306.11222);
Zhang et al., "AdaLoRA" (2023).
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lrcompress.errors import SettingError


def row_mean(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ``mean_j |w_ij ∂L/∂w_ij|`` of every row: LoSparse's score of an output neuron.

    Args:
        weight: ``(rows, in)``.
        gradient: of the loss, ``(rows, in)``.

    Returns:
        ``(rows,)``, in units of the loss.

    Example:
        >>> row_mean(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]]))
        tensor([2.5000])
    """
    return (weight * gradient).abs_().mean(1)


def row_group(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ``|Σ_j w_ij ∂L/∂w_ij| / in`` of every row: the predicted loss change per parameter.

    Args:
        weight: ``(rows, in)``.
        gradient: of the loss, ``(rows, in)``.

    Returns:
        ``(rows,)``, in units of the loss.

    Example:
        >>> row_group(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]]))
        tensor([0.5000])
    """
    score: Tensor = torch.linalg.vecdot(weight, gradient)
    return score.abs_() / weight.shape[1]


def entries(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ``|w_ij ∂L/∂w_ij|`` of every entry, ``(rows · in,)``, row after row.

    Args:
        weight: ``(rows, in)``.
        gradient: of the loss, ``(rows, in)``.
    """
    return (weight * gradient).abs_().flatten()


ROW_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": row_mean, "group": row_group}


def component(left: Tensor, gradient: Tensor) -> Tensor:
    """Return ``σ_k ∂L/∂σ_k`` of every rank component of ``left right``; the score is its magnitude.

    With ``left[:, k] right[k, :]`` scaled by ``σ_k``, ``σ_k ∂L/∂σ_k = Σ_i left_ik ∂L/∂left_ik``,
    and the same sum over ``right``: no separate singular values are needed. Given some of the
    rows, it returns their share of the sum.

    Args:
        left: ``(out, rank)``.
        gradient: of the loss, ``(out, rank)``.

    Returns:
        ``(rank,)``, in units of the loss, with sign.
    """
    return (left * gradient).sum(0)


class Importance:
    """Scores of the units of every layer, averaged over training steps.

    Over each window of ``every_n_steps`` steps the scores are averaged to ``I``; then
    ``Ī ← β₁ Ī + (1 − β₁) I`` and, for PLATON, ``Ū ← β₂ Ū + (1 − β₂) |I − Ī|``, both from zero.
    The score is ``Ī``, or ``Ī·Ū`` where ``β₂ < 1``. A step in which a layer has a score that is not
    finite, as where half-precision gradients overflow, is left out for all units of that layer.

    Args:
        beta1: of the average, from 0 to below 1.
        beta2: of the uncertainty, from 0 to 1; 1 leaves uncertainty out.
        every_n_steps: steps of a window.

    Raises:
        SettingError: if an argument is not what it may be.
    """

    def __init__(self, beta1: float = 0.85, beta2: float = 1.0, every_n_steps: int = 10) -> None:
        if not 0 <= beta1 < 1:
            raise SettingError(f"beta1 must be from 0 to below 1, got {beta1!r}")
        if not 0 <= beta2 <= 1:
            raise SettingError(f"beta2 must be from 0 to 1 (no uncertainty), got {beta2!r}")
        self.beta1, self.beta2, self.every_n_steps = beta1, beta2, every_n_steps
        self.steps = 0  # in the window that is open
        self._open: dict[str, Tensor] = {}
        self._skipped: dict[str, Tensor] = {}  # steps of the window that were left out, ()
        self._mean: dict[str, Tensor] = {}
        self._spread: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, scores: Mapping[str, Tensor]) -> None:
        """Add one step's scores, ``(units,)`` of each layer, and close the window if it is full."""
        largest = torch._foreach_norm(list(scores.values()), math.inf) if scores else ()
        for (name, score), most in zip(scores.items(), largest, strict=True):
            lost = (most < math.inf).logical_not()  # on the device, so that nothing waits for it
            score = score.float().masked_fill(lost, 0.0)
            if name in self._open:
                self._open[name] += score
                self._skipped[name] += lost
            else:
                self._open[name], self._skipped[name] = score, lost.float()
        self.steps += 1
        if self.steps >= self.every_n_steps:
            self.close()

    def close(self) -> None:
        """Close the window that is open, full or not."""
        for name, total in self._open.items():
            added = self.steps - self._skipped[name]
            score = total / added.clamp(min=1)
            mean = self._mean.setdefault(name, torch.zeros_like(score))
            score = torch.where(added > 0, score, mean)
            mean.lerp_(score, 1 - self.beta1)
            if self.beta2 < 1:
                spread = self._spread.setdefault(name, torch.zeros_like(score))
                spread.lerp_((score - mean).abs_(), 1 - self.beta2)
        self._open, self._skipped, self.steps = {}, {}, 0

    @property
    def known(self) -> bool:
        """Whether a window has been closed."""
        return bool(self._mean)

    def score(self, name: str) -> Tensor | None:
        """Return the score ``(units,)`` of a layer; None if it never had one."""
        mean = self._mean.get(name)
        return mean if mean is None or self.beta2 == 1 else mean * self._spread[name]

    def scores(self) -> dict[str, Tensor]:
        """Return the scores of all layers that have one."""
        found = {name: self.score(name) for name in self._mean}
        return {name: score for name, score in found.items() if score is not None}

    def state_dict(self) -> dict[str, object]:
        """Return everything in plain types and tensors."""
        parts = {"open": self._open, "mean": self._mean, "spread": self._spread}
        parts["skipped"] = self._skipped
        copied = {key: {n: t.clone() for n, t in part.items()} for key, part in parts.items()}
        return {"steps": self.steps, **copied}

    def load_state_dict(self, state: Mapping[str, object], device: torch.device | str) -> None:
        """Load what :meth:`state_dict` returned, on ``device``."""
        self._open, self._mean, self._spread, skipped = (
            {name: value.to(device, copy=True) for name, value in state.get(key, {}).items()}  # type: ignore[attr-defined]
            for key in ("open", "mean", "spread", "skipped")
        )
        none = torch.zeros((), device=device)  # what earlier versions wrote has no such steps
        self._skipped = {name: skipped.get(name, none.clone()) for name in self._open}
        self.steps = int(state["steps"])  # type: ignore[call-overload]
