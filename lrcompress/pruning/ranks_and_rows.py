"""Rank allocation of LoSparse where ranks and rows share one budget, by predicted losses."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.errors import SettingError

_STEPS = 48  # of the bisection, over 18 decades
_CHUNK = 1 << 18  # losses looked at together: few enough for a cache
_ROUNDING = 1e-5  # more than that of a sum in float32


def allocate_ranks_and_rows(
    row_losses: Mapping[str, Tensor],
    units: Mapping[str, int],
    budget: int,
    processes: Processes = ONE_PROCESS,
) -> dict[str, int]:
    """Return the rank of every layer when ranks and sparse rows share one budget.

    A layer of rank ``r`` that keeps rows ``K`` of the remainder is predicted to lose
    ``Σ_{i∉K} e_l[r, i]`` and takes ``r·unit_l + |K|·in_l`` parameters. Minimises the sum of the
    losses under the budget, by its Lagrangian: at a price ``λ`` of a parameter, the best rank
    minimises ``λ·r·unit_l + Σ_i min(e_l[r, i], λ·in_l)``, and the least ``λ`` that fits is found
    by bisection. Losses stay where they are: all that a process tells the others is what its own
    layers spend at a price, and their ranks.

    Args:
        row_losses: ``(most + 1, out)`` of every layer of this process, from
            :func:`~lrcompress.solvers.row_errors.row_energies`, as predicted losses.
        units: ``out + in`` of every layer of all processes.
        budget: parameters for ranks and rows together.
        processes: those that have the other layers.

    Raises:
        SettingError: if not even one rank a layer fits.

    Cost:
        ``O(Σ_l most_l · out_l)``, some 10 times: ranks that cannot be the best any more are left
        out. No copies of losses in float32.
    """
    least = sum(units.values())
    if budget < least:
        raise SettingError(
            f"the budget of {budget:,} parameters is below one rank a layer, {least:,}"
        )
    layers = {name: _Layer(loss[1:].float(), units[name]) for name, loss in row_losses.items()}

    def dearest() -> float:
        return max((float(layer.losses.sum()) for layer in layers.values()), default=0.0)

    def spent(price: float) -> int:
        return sum(layer.best(price)[1] for layer in layers.values())

    high = max(processes.run_on_all(dearest)) + torch.finfo(torch.float32).tiny
    low = high * 1e-18
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        fits = sum(processes.run_on_all(partial(spent, middle))) <= budget
        low, high = (low, middle) if fits else (middle, high)
        for layer in layers.values():
            layer.narrow_(fits)
    found = processes.run_on_all(lambda: {n: layer.best(high)[0] for n, layer in layers.items()})
    ranks = {name: rank for part in found for name, rank in part.items()}
    return {name: ranks[name] for name in units}


class _Layer:
    """The ranks of a layer that can still be the best while the price is bisected.

    Args:
        losses: ``(most, out)`` float32, of ranks from 1.
        unit: parameters of a rank.
    """

    def __init__(self, losses: Tensor, unit: int) -> None:
        self.losses, self.unit, self.width = losses, unit, unit - losses.shape[1]
        self.ranks = torch.arange(1, len(losses) + 1, device=losses.device)
        self.totals = self.least = torch.zeros(len(losses), device=losses.device)
        self.most = math.inf

    def best(self, price: float) -> tuple[int, int]:
        """Return the best rank at a price, and the parameters of it and the rows worth theirs."""
        worth = price * self.width
        parts = torch.split(self.ranks, max(1, _CHUNK // self.losses.shape[1]))
        lost = torch.cat([self.losses[ranks - 1].clamp_(max=worth).sum(1) for ranks in parts])
        self.totals = price * self.unit * self.ranks + lost
        rank = int(self.ranks[self.totals.argmin()])
        rows = int((self.losses[rank - 1] > worth).sum())
        return rank, rank * self.unit + rows * self.width

    def narrow_(self, fits: bool) -> None:
        """Leave out ranks that are never the best between the prices that are left.

        The total of a rank grows with the price: one whose total at the lowest price is above
        the best one at the highest is not the best at any between.

        Args:
            fits: whether the last price is the highest from now on, else it is the lowest.
        """
        if fits:
            self.most = float(self.totals.min())
        else:
            self.least = self.totals
        may = self.least <= self.most * (1 + _ROUNDING)
        self.ranks, self.least = self.ranks[may], self.least[may]
