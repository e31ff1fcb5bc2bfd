"""A state of a run that is kept on disk: model, optimizers and statistics, to go back to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from lrcompress.callbacks import reporting
from lrcompress.callbacks.trainer_state import parameter_names, regroup_parameters_
from lrcompress.distributed import Processes, checksums
from lrcompress.errors import CheckpointError, PlatformError
from lrcompress.files import atomic_write
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.checkpoint import read_checkpoint
from lrcompress.structure.feed_forward import Blocks
from lrcompress.structure.plan import Plan


@dataclass(frozen=True)
class KeptState:
    """A state of a run, and the file that holds it.

    Attributes:
        path: of the file; every process reads it, as it does a checkpoint.
        token: told by what is in the file, so that no other run's is taken for it.
        point: number of the point before which it was kept, from 1.
        step: optimizer steps before it.
        figures: of validation then.
    """

    path: str
    token: str
    point: int
    step: int
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def is_there(self) -> bool:
        """Whether this process finds the file."""
        return Path(self.path).is_file()


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return the folder for kept states, that of the report by default; None in trial runs.

    A collective call.

    Raises:
        PlatformError: if it is no local folder.
    """
    file = reporting.report_file(trainer, reporting.AUTO)
    if file is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise PlatformError(
            "keep='auto' keeps a state on disk that the run may go back to, and the run's folder "
            f"{trainer.log_dir or trainer.default_root_dir} is no local one; give Trainer a local "
            "default_root_dir"
        )
    return None if file is None else file.parent.absolute()


def keep_state(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    statistics: dict[str, Any],
    blocks: Blocks | None,
    processes: Processes,
    *,
    point: int,
    step: int,
    figures: dict[str, float],
) -> KeptState:
    """Write the state of a run to a file, in the first process, and return what tells of it.

    Args:
        path: of the file.
        module: the same in all processes.
        optimizers: the same in all processes.
        statistics: the state of those that the point is to be solved from; of the first process.
        blocks: feed-forward blocks that were found; of the first process.
        processes: of the run.
        point: number of the point, from 1.
        step: optimizer steps before it.
        figures: of validation just before it.
    """

    def write() -> str:
        sums = checksums(dict(module.named_parameters()))
        token = sha256(f"{point} {step} {sums}".encode()).hexdigest()
        state = {
            "token": token,
            "state_dict": module.state_dict(),
            "optimizers": [one.state_dict()["state"] for one in optimizers],
            "param_names": parameter_names(module, optimizers),
            "statistics": statistics,
            "blocks": None if blocks is None else blocks.to_dict(),
        }
        with atomic_write(path) as passing:
            torch.save(state, passing)
        return token

    return KeptState(str(path), processes.run_on_first(write), point, step, dict(figures))


def read_state(kept: KeptState, processes: Processes) -> dict[str, Any]:
    """Return what was kept, in every process.

    Raises:
        CheckpointError: if the file is not there, or is another run's.
    """
    read: list[dict[str, Any]] = []
    processes.run_on_all(lambda: read.append(_read(kept)))
    return read[0]


def restore_state_(
    state: Mapping[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    device: torch.device | str,
) -> tuple[Statistics, Blocks | None]:
    """Give the model and its optimizers a state that was kept.

    Learning rates and other options of the optimizers stay as they are now.

    Args:
        state: from :func:`read_state`.
        module: of any structure; it gets that of the state.
        optimizers: of the run, with as many groups as then.
        device: for the statistics.

    Returns:
        The statistics, of all layers in every process, and the feed-forward blocks.
    """
    Plan.matching(module, state["state_dict"]).apply_(module)
    module.load_state_dict(state["state_dict"])
    regroup_parameters_(module, optimizers, state["param_names"])
    for optimizer, held in zip(optimizers, state["optimizers"], strict=True):
        groups = optimizer.param_groups
        now = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": held, "param_groups": now})
        optimizer.param_groups = groups  # the same objects: others may hold them
    statistics, blocks = Statistics(), state["blocks"]
    statistics.load_state_dict(state["statistics"], device)
    return statistics, None if blocks is None else Blocks.from_dict(blocks)


def _read(kept: KeptState) -> dict[str, Any]:
    state = read_checkpoint(kept.path)
    if state.get("token") != kept.token:
        raise CheckpointError(
            f"{kept.path} is not the state of before point {kept.point} (step {kept.step}) of this "
            "run: another run has written there; give each run a folder of its own"
        )
    return state
