"""Read checkpoint files safely: checked before they are loaded, with no code of theirs run."""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrcompress.errors import CheckpointError

_PROTOCOL = 2  # of the pickles that torch writes
_MOST_AXES = 64
_BYTES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "ComplexFloat": 8, "ComplexDouble": 16}
_BYTES |= {"Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1}


def read_checkpoint(path: str | PathLike[str], *, mapped: bool = False) -> dict[str, Any]:
    """Return the mapping in a ``torch.save`` file, on the CPU, after checks.

    The file is checked before any of it is loaded: the checksum of every part, that no part takes
    more than it has in the file, that every tensor lies within its part, and that there are
    tensors and plain values and nothing else.

    Args:
        path: of the file, a checkpoint of Lightning or a state dict.
        mapped: leave tensors on disk until they are read; the file must stay as it is.

    Raises:
        CheckpointError: if it is no such file, is damaged, or holds anything else.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is the folder of a model, as `lrcompress export` writes it, "
            "and no checkpoint; expected a file that a fit has saved, such as last.ckpt"
        )
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a sharded checkpoint, whose .metadata can run code when it is read. If you "
            f"trust it, make one file of it first: {consolidate_command(path)}"
        )
    if not path.exists():
        raise CheckpointError(f"{path} cannot be read as a checkpoint: there is no such file")
    try:
        _check(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # whatever zipfile, pickle and torch make of a strange file
        reason = str(error).partition(". ")[0]  # torch goes on to advise weights_only=False
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint, it may be cut short: "
            f"{type(error).__name__}: {reason}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(checkpoint).__name__}")
    return checkpoint


def read_lightning_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Return a Lightning checkpoint; of a bare state dict, ``{"state_dict": …}``.

    Raises:
        CheckpointError: as :func:`read_checkpoint`, or if there are no weights in it.
    """
    checkpoint = read_checkpoint(path)
    # a sharded one that was made one file may have its weights under "model"
    state = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if not isinstance(state, Mapping) or not any(map(torch.is_tensor, state.values())):
        raise CheckpointError(f"{path} is no checkpoint of Lightning: it has no state_dict")
    return {**({} if state is checkpoint else checkpoint), "state_dict": state}


def consolidate_command(folder: Path) -> str:
    """Return the shell command that makes one file of a sharded checkpoint."""
    if (folder / "zero_to_fp32.py").exists() or (folder / "checkpoint").is_dir():
        name = "convert_zero_checkpoint_to_fp32_state_dict"
        return (
            f'python -c "from lightning.pytorch.utilities.deepspeed import {name} as convert; '
            f"convert('{folder}', '{folder}.consolidated')\""
        )
    # torch's own, since Lightning's consolidate_checkpoint reads those of FSDP1 alone
    tool = "torch.distributed.checkpoint.format_utils dcp_to_torch"
    return f"python -m {tool} {folder} {folder}.consolidated"


def _check(path: Path) -> None:
    """Check a file without loading it.

    Raises:
        CheckpointError: if anything is wrong with it, named without the path.
    """
    with zipfile.ZipFile(path) as archive:
        sizes = {part.filename: part.file_size for part in archive.infolist()}
        packed = [x for x in archive.infolist() if x.compress_size != x.file_size]
        if packed or len(sizes) < len(archive.infolist()):
            raise CheckpointError("has parts that are packed or twice there, as torch writes none")
        if sum(sizes.values()) > path.stat().st_size:
            raise CheckpointError(
                f"claims parts of {sum(sizes.values())} bytes, it has {path.stat().st_size}"
            )
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"is damaged: {damaged} has another checksum; copy it again")
        name = next((name for name in sizes if name.endswith("/data.pkl")), "data.pkl")
        structure = archive.read(name)
    if any(opcode.proto > _PROTOCOL for opcode, _, _ in pickletools.genops(structure)):
        raise CheckpointError(f"is pickled by a protocol above {_PROTOCOL}, as torch does not")
    _CheckingUnpickler(structure, name.removesuffix("data.pkl"), sizes).load()


class _Storage(NamedTuple):
    elements: int


class _CheckingUnpickler(pickle._Unpickler):
    """Unpickler that checks a checkpoint and builds nothing of it but plain values.

    What may be called are the methods below: each checks its arguments and gives nothing back.
    """

    def __init__(self, structure: bytes, root: str, sizes: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(structure))
        self._root, self._sizes = root, sizes

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name that the pickle imports.

        Raises:
            CheckpointError: if checkpoints do not need that name.
        """
        known = {
            "collections.OrderedDict": self._mapping,
            "torch.Size": self._shape,
            "torch.device": self._plain,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._plain,
        }
        found = known.get(f"{module}.{name}")
        if found is not None:
            return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return None
        if module == "torch" and name.removesuffix("Storage") in _BYTES:
            return _BYTES[name.removesuffix("Storage")]
        raise CheckpointError(
            f"asks for {module}.{name}; only tensors and plain values are read. Take it out of the "
            "hyperparameters or the callback's state, or save with save_weights_only=True"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage of a tensor.

        Raises:
            CheckpointError: if it has not the size of its part of the file.
        """
        _, itemsize, key, _, count = pid
        part = f"{self._root}data/{key}"
        if type(count) is not int or self._sizes.get(part) != count * itemsize:
            raise CheckpointError(
                f"claims {count} elements of {itemsize} bytes for {part}, which has "
                f"{self._sizes.get(part, 'no')} bytes"
            )
        return _Storage(count)

    def _mapping(self) -> "OrderedDict[Any, Any]":
        return OrderedDict()

    def _shape(self, sizes: tuple[int, ...]) -> None:
        if len(sizes) > _MOST_AXES:
            raise CheckpointError(f"has a torch.Size of {len(sizes)} axes")

    def _plain(self, *_: Any) -> None:
        pass

    def _tensor(self, storage: Any, offset: Any, sizes: Any, strides: Any, *_: Any) -> None:
        """Check that a tensor lies within its storage; torch would enlarge it.

        Raises:
            CheckpointError: if it does not.
        """
        whole = all(type(x) is int and x >= 0 for x in (offset, *sizes, *strides))
        if not whole or not isinstance(storage, _Storage) or len(sizes) != len(strides):
            raise CheckpointError(f"has a tensor of sizes {sizes}, strides {strides}, at {offset}")
        last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if 0 not in sizes and last >= storage.elements:
            raise CheckpointError(
                f"has a tensor of sizes {list(sizes)}, more than the {storage.elements} elements "
                "stored for it"
            )
