"""A checkpoint plugin for the Trainer that writes files atomically."""

import io
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lrcompress.files import atomic_write


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes atomically: after a failed write the old file is still there.

    Lightning's own plugin writes to the folder for temporary files and moves the file from there.
    Between two disks such a move is a copy onto the old file: if it breaks off, both are lost.
    This plugin writes beside the old file and renames. It keeps the old file when the disk is
    full or the process is killed. Paths with ``://`` and calls with ``storage_options`` are left
    to Lightning's own plugin. The Trainer of ``lrcompress fit`` has this plugin.

    Raises:
        OSError: In ``save_checkpoint``: if the file cannot be written, such as on a full disk.

    Cost:
        The checkpoint is serialised in memory before it is written.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, plugins=[WholeCheckpointIO()])
        >>> type(trainer.strategy.checkpoint_io).__name__
        'WholeCheckpointIO'
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        held = io.BytesIO()  # torch says less of a full disk than the file system does
        torch.save(checkpoint, held)
        with atomic_write(path) as passing:
            passing.write_bytes(held.getbuffer())
