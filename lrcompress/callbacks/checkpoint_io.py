"""Checkpoints that are written whole or not at all, on any disk."""

import io
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lrcompress.files import atomic_write


class WholeCheckpointIO(TorchCheckpointIO):
    """A plugin for the Trainer, with which a full disk or a kill leaves the file before as it was.

    Lightning's own writes to the folder for temporary files first and moves from there, which
    over the border of two disks is a copy onto the old file: when it breaks off, both are lost.
    The Trainer of ``lrcompress fit`` has this plugin.
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
