"""Files: written whole or not at all, and read so that nothing in them can run."""

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lrcompress.errors import CheckpointError

# What torch.load raises for a file that was cut short, by where.
TORN = (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yield a place to write a file to, which becomes ``path`` once it is complete.

    If writing fails, what was at ``path`` before stays there, and nothing else is left. The
    folder is made if need be.

    Raises:
        OSError: what the block raises, such as on a full disk, with the file's name.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    passing = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield passing
        passing.replace(target)
    except OSError as error:  # that of a full disk says nothing of where
        error.filename = error.filename or str(target)
        raise
    finally:
        passing.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint of Lightning, or a state dict under ``state_dict`` as if it were one.

    Raises:
        CheckpointError: if it is cut short, sharded over a folder, or no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a sharded checkpoint; make one file of it first: {_how(path)}"
        )
    if not path.exists():
        raise CheckpointError(f"{path} cannot be read as a checkpoint: there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except TORN as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint, it may be cut short: {first_line(error)}"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}")
    # a sharded one that was made one file may have its weights under "model"
    state = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if not isinstance(state, Mapping) or not any(map(torch.is_tensor, state.values())):
        raise CheckpointError(f"{path} is no checkpoint of Lightning: it has no state_dict")
    return {**({} if state is checkpoint else checkpoint), "state_dict": state}


def first_line(error: BaseException) -> str:
    """Return what an error says, without the advice that torch appends."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _how(folder: Path) -> str:
    """Return the command with which the library that wrote a folder makes one file of it."""
    if (folder / "zero_to_fp32.py").exists() or (folder / "checkpoint").is_dir():
        name = "convert_zero_checkpoint_to_fp32_state_dict"
        return (
            f'python -c "from lightning.pytorch.utilities.deepspeed import {name} as convert; '
            f"convert('{folder}', '{folder}.consolidated')\""
        )
    # torch's own, since Lightning's consolidate_checkpoint reads those of FSDP1 alone
    tool = "torch.distributed.checkpoint.format_utils dcp_to_torch"
    return f"python -m {tool} {folder} {folder}.consolidated"
