"""Say before the first step what a fit will take, and refuse what the device cannot hold."""

import os
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lrcompress.callbacks.observation import Observation
from lrcompress.callbacks.turns import Turns
from lrcompress.engine.footprint import GIB, Footprint, footprint
from lrcompress.engine.settings import Settings, check_present
from lrcompress.errors import PlatformError
from lrcompress.statistics.capture import Recorder


def footprint_of(
    module: nn.Module,
    settings: Settings,
    observation: Observation,
    optimizers: Sequence[Optimizer],
    growth: int = 0,
) -> Footprint:
    """Return what a fit will take of this process.

    Args:
        module: the model.
        settings: which layers are factored, and how.
        observation: which layers are observed here, of how many processes; before it watches any,
            as one process alone would.
        optimizers: of the fit.
        growth: parameters that the next point adds at first.
    """
    names = settings.select(module).names
    here, on_host = observation.nbytes, observation.nbytes_on_host
    if not observation.watching and observation.sampling.kinds:
        every = Recorder(module, names, observation.sampling.kinds)
        turns = Turns(every, observation.sampling.turns)
        here = max(sum(map(every.bytes_of, group)) for group in turns.groups)
        on_host = every.nbytes if len(turns) > 1 else 0
    dealt, processes = observation.owner is not None, observation.processes
    return footprint(
        module,
        names,
        settings.method,
        here,
        optimizers=optimizers,
        processes=processes.size,
        sharded=processes.sharded,
        of_all=(on_host or here) * (processes.size if dealt else 1),
        on_host=on_host,
        growth=growth,
        solve_device=settings.solve_device,
    )


def check_memory(
    live: tuple[nn.Module, Sequence[Optimizer]] | None,
    settings: object,
    observation: Observation,
    growth: int = 0,
    *,
    verbose: bool,
) -> Footprint | None:
    """Say what a fit will take, check that the device has it, and return it.

    Args:
        live: the model of the fit, and its optimizers.
        settings: which layers are factored, and how; of tables nothing but the bytes is said.
        observation: which layers are observed here, of how many processes.
        growth: parameters that the next point adds at first.
        verbose: whether to say it.

    Raises:
        PlatformError: if the device has less than statistics, solving and the optimizer's state
            will take beside what is there; on the CPU, if the machine has.
    """
    check_present("offload", observation.sampling.offload)
    if live is None:
        return None
    module, optimizers = live
    told = [f"statistics take at most {observation.nbytes / 2**20:.0f} MiB of memory"]
    needed = None
    if isinstance(settings, Settings):
        needed = footprint_of(module, settings, observation, optimizers, growth)
        told = needed.lines
    if verbose:
        rank_zero_info("lrcompress: " + "\n".join(told))
    if needed is not None:
        _check_fits(needed, next(module.parameters()).device, observation, optimizers)
    return needed


def _check_fits(
    needed: Footprint,
    device: torch.device,
    observation: Observation,
    optimizers: Sequence[Optimizer],
) -> None:
    stepped = any(optimizer.state for optimizer in optimizers)
    offload = observation.sampling.offload
    beside = offload is not None and torch.device(offload).type != device.type
    statistics = 0 if beside else needed.statistics
    solve = 0 if needed.solved_on else needed.solve
    more = statistics + (0 if stepped else needed.optimizer)
    more += max(solve, 0 if stepped else needed.gradients) + needed.grown
    has = _free_bytes(device)
    if device.type == "cpu":  # where others' use changes, what the whole machine has
        more += max(0, needed.on_host - statistics) + needed.weights + needed.solutions
        more += needed.optimizer if stepped else 0
    if has is None or more <= has:
        return
    owner = observation.sampling.owner
    grown = f", what is split {needed.grown / GIB:.1f}" if needed.grown else ""
    fewer = "" if device.type == "cpu" else _fewer_at_once(needed, has - (more - statistics))
    raise PlatformError(
        f"{owner} would take about {more / GIB:.1f} GiB on {device}, which has {has / GIB:.1f}: "
        f"statistics {statistics / GIB:.1f}, solving {solve / GIB:.1f}, state of the "
        f"optimizer {needed.optimizer / GIB:.1f}{grown}; name fewer layers with targets= or "
        "exclude=, take a method that needs less, such as fwsvd, several processes with deal=True, "
        f"solve_device='cpu', or offload='cpu'{fewer} for the statistics"
    )


def _fewer_at_once(needed: Footprint, room: int) -> str:
    """Return how many groups of layers could take turns in a room for statistics, if any could."""
    whole = needed.on_host or needed.statistics
    return f" or turns={-(-whole // room)}" if 0 < room < needed.statistics else ""


def _free_bytes(device: torch.device) -> int | None:
    """Return the bytes a device has to give, None where it does not say; the CPU has all."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    backend = torch.get_device_module(device)
    if not hasattr(backend, "mem_get_info"):
        return None
    free, _ = backend.mem_get_info(device)
    cached = backend.memory_reserved(device) - backend.memory_allocated(device)
    return int(free + cached)
