"""Magnitude pruning: choose the largest entries, of each layer or of all together."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrcompress.errors import SettingError

SCOPES = ("global", "layer")


def check_scope(scope: str) -> None:
    """Check the scope over which magnitudes are compared.

    Raises:
        SettingError: if it is neither ``global`` nor ``layer``.
    """
    if scope not in SCOPES:
        raise SettingError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")


def largest(scores: Mapping[str, Tensor], keep: float, scope: str) -> dict[str, Tensor]:
    """Return which entries are the largest, exactly ``round(keep · entries)`` of them.

    Of equal ones the first stay.

    Args:
        scores: name to a tensor of any shape; finite, or infinite for what stays in any case.
        keep: share of the entries that stay, from 0 to 1.
        scope: ``global``: of all tensors together; ``layer``: of each.

    Returns:
        Name to bool, of the shapes of ``scores``.

    Example:
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([4.0, 2.0])}
        >>> {name: stays.tolist() for name, stays in largest(scores, 0.5, "global").items()}
        {'a': [True, False], 'b': [True, False]}
    """
    if scope == "layer":
        return {name: _largest(one.flatten(), keep).view_as(one) for name, one in scores.items()}
    device = next(iter(scores.values())).device  # of several, the first
    stays = _largest(torch.cat([one.flatten().to(device) for one in scores.values()]), keep)
    parts = torch.split(stays, [one.numel() for one in scores.values()])
    pairs = zip(scores.items(), parts, strict=True)
    return {name: part.view_as(one).to(one.device) for (name, one), part in pairs}


def _largest(flat: Tensor, keep: float) -> Tensor:
    count = round(keep * len(flat))
    if count == 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    least = flat.kthvalue(len(flat) - count + 1).values
    stays = flat > least
    ties = (flat == least).nonzero().squeeze(1)
    stays[ties[: count - int(stays.sum())]] = True
    return stays
