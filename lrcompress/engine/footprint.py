"""What compressing a model will take of one process: bytes, and time to solve."""

import functools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.engine.distributed_solve import greatest_rank, solving_cost
from lrcompress.objective import METHODS
from lrcompress.statistics.moments import LARGE
from lrcompress.statistics.views import view

GIB = 2**30
_PROBE = 256  # features of the eigendecomposition that is timed


@dataclass(frozen=True)
class Footprint:
    """Bytes that one process will hold, and the time of the solve.

    Attributes:
        weights: of the model.
        gradients: of what is trained.
        optimizer: its state after the first step.
        statistics: at most, while steps are observed.
        solve: at most at one time, while the largest layer is solved.
        solutions: on the host, when all layers are solved.
        checkpoint: of the file, within the window; of one process of a sharded one.
        seconds: of solving all layers, roughly, by one timed decomposition.
        grown: of weights, gradients and optimizer state that a point adds before it prunes.
        on_host: of statistics on the host, where groups of layers take turns to be observed.
        solved_on: type of the device that layers are solved on, if not each on its own.
    """

    weights: int
    gradients: int
    optimizer: int
    statistics: int
    solve: int
    solutions: int
    checkpoint: int
    seconds: float
    grown: int = 0
    on_host: int = 0
    solved_on: str = ""

    @property
    def lines(self) -> list[str]:
        """What people read."""
        where = f" on {self.solved_on}" if self.solved_on else ""
        host = f", {_size(self.on_host)} on the host" if self.on_host else ""
        more = [f"  to prune: {_size(self.grown)} more of all these"] if self.grown else []
        return [
            "memory of a process, about:",
            f"  to train: {_size(self.weights)} weights, {_size(self.gradients)} gradients, "
            f"{_size(self.optimizer)} optimizer state",
            f"  to observe: {_size(self.statistics)} statistics at most{host}; checkpoints are "
            f"{_size(self.checkpoint)} then",
            f"  to compress: {_size(self.solve)} a layer{where}, "
            f"{_size(self.solutions)} on the host for results; takes {_duration(self.seconds)}",
            *more,
        ]


def footprint(
    model: nn.Module,
    names: Sequence[str],
    method: str,
    statistics: int,
    *,
    optimizers: Iterable[Optimizer] = (),
    processes: int = 1,
    sharded: bool = False,
    of_all: int | None = None,
    on_host: int = 0,
    growth: int = 0,
    solve_device: str | None = None,
    rate: float | None = None,
) -> Footprint:
    """Return what compressing a model will take of one process.

    With ``W (out, in)`` of sides ``s ≤ l``, solving a layer holds about ``4·out·in + 4·s²``
    float64 values, of sums of Kronecker products ``4·out·in`` more, and twice as many as each full
    metric has; its solution ``most·(out + in)`` float32 ones. The largest process takes
    ``1 / processes`` of the solutions and of the time.

    Args:
        model: with parameters in full, or sharded ones of this process.
        names: of the layers that will be factored.
        method: a key of :data:`lrcompress.objective.METHODS`.
        statistics: bytes of this process's statistics, at one time.
        optimizers: of the fit, before or after their first step.
        processes: how many share the solve.
        sharded: whether each process holds a part of the parameters.
        of_all: bytes of all statistics, as a checkpoint has them; by default ``statistics``.
        growth: parameters that a point adds before it prunes.
        on_host: bytes of its statistics on the host, where groups of layers take turns.
        solve_device: where layers are solved; by default where each lies.
        rate: operations a second of the solve; by default measured, once a process, for some 10 ms.
    """
    parts = processes if sharded else 1
    weights = sum(p.nbytes for p in model.parameters()) // parts
    trained = [p for p in model.parameters() if p.requires_grad]
    state = sum(_state_bytes(optimizer) for optimizer in optimizers) // parts
    solving = solutions = 0
    operations = 0.0
    for name in names:
        layer = model.get_submodule(name)
        out_features, in_features = view(layer).shape
        values = 4 * out_features * in_features + 4 * min(out_features, in_features) ** 2
        asked = METHODS[method]
        if asked.form == "kronecker":
            values += 4 * out_features * in_features
        if asked.input in ("input_moment", "weighted_moment"):
            values += 2 * in_features**2
        if asked.output == "output_moment" and out_features <= LARGE:
            values += 2 * out_features**2
        solving = max(solving, 8 * values)
        solutions += 4 * greatest_rank(layer) * (out_features + in_features)
        operations += solving_cost(layer)
    own = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = own if solve_device is None else torch.device(solve_device)
    speed = rate or _rate(device)
    gradients = sum(p.nbytes for p in trained) // parts
    each = (2 * gradients + state) / max(1, sum(p.numel() for p in trained))  # of one, and a share
    whole = weights + state + (statistics if of_all is None else of_all)
    return Footprint(
        weights,
        gradients,
        state,
        statistics,
        solving,
        solutions // processes,
        whole,
        operations / processes / speed,
        int(growth * each),
        on_host,
        "" if device.type == own.type else device.type,
    )


def _state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of an optimizer's state: as it is, or as a step of its kind makes it.

    Of a kind that is not torch's, or derived from one, nothing is known before its first step.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if any(p in optimizer.state for p in params):
        held = [value for state in optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in held if isinstance(value, Tensor))
    one = nn.Parameter(torch.zeros(8, 8))
    one.grad = torch.ones(8, 8)
    try:
        with torch.enable_grad():
            kinds = type(optimizer).__mro__  # a subclass's own step may be counted by others
            kind: Any = next(x for x in kinds if x.__module__.startswith("torch.optim"))
            takes = signature(kind).parameters  # torch's AdamW has defaults beside them
            probe = kind([one], **{k: v for k, v in optimizer.defaults.items() if k in takes})
            probe.step()
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # of another kind
        return 0
    state = [value for value in probe.state[one].values() if isinstance(value, Tensor)]
    share = sum(value.nbytes for value in state if value.ndim) / one.nbytes
    return int(share * sum(p.nbytes for p in params))


@functools.cache
def _rate(device: torch.device) -> float:
    """Return operations a second of a float64 eigendecomposition, as ``solving_cost`` counts.

    Measured once in a process: it is as long as all else that is done before a short run.
    """
    where = torch.device("cpu") if device.type in ("meta", "mps") else device
    layer = nn.Linear(_PROBE, _PROBE, device="meta")
    matrix = torch.eye(_PROBE, dtype=torch.float64, device=where)
    matrix += torch.linspace(0, 1, _PROBE, dtype=torch.float64, device=where).outer(matrix[0])
    matrix = matrix @ matrix.mT
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        values = _solved(matrix)
        float(values[0])  # waits for the device
        spent.append(time.perf_counter() - started)
    return solving_cost(layer) / min(spent)


def _solved(matrix: Tensor) -> Tensor:
    energies, basis = torch.linalg.eigh(matrix)
    result: Tensor = energies + (basis @ matrix @ matrix).diagonal()
    return result


def _size(nbytes: int) -> str:
    """Return a number of bytes in the unit that reads best.

    Example:
        >>> _size(5 * 2**20 // 2), _size(86 * 2**20), _size(3 * 2**29)
        ('2.5 MiB', '86 MiB', '1.5 GiB')
    """
    if nbytes >= GIB:
        return f"{nbytes / GIB:.1f} GiB"
    mib = nbytes / 2**20
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
