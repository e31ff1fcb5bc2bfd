"""Read and check the headers of safetensors files, before any tensor is loaded."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lrcompress.errors import CheckpointError
from lrcompress.nn import KINDS
from lrcompress.structure.plan import DENSE, LayerPlan, Plan

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Entry:
    """One tensor in the header of a safetensors file.

    Attributes:
        dtype: as safetensors spells it, such as ``F32``.
        shape: its sizes.
        begin: its first byte, counted from the end of the header.
        end: the byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors that the safetensors file at ``path`` holds, by name.

    Reads the header alone, and never more than the file has.

    Raises:
        CheckpointError: if it is no such file, or its tensors do not fill it exactly.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path} is no safetensors file or is truncated: its header would take "
                    f"{length} bytes, the file has {size}; copy it again"
                )
            header = json.loads(file.read(length))
        listed = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error!r}") from error
    _check_filled(path, listed, size - 8 - length)
    return listed


def _entry(data: Mapping[str, list[int]]) -> Entry:
    shape, (begin, end) = data["shape"], data["data_offsets"]
    if not all(type(x) is int and x >= 0 for x in (*shape, begin, end)):
        raise ValueError(f"sizes must be whole numbers from 0, got {data}")
    return Entry(str(data["dtype"]), tuple(shape), begin, end)


def _check_filled(path: Path, listed: Mapping[str, Entry], size: int) -> None:
    """Check that the tensors lie side by side and have the bytes of their sizes.

    Raises:
        CheckpointError: if they do not.
    """
    reached = 0
    for name, entry in sorted(listed.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.dtype not in _BYTES:
            raise CheckpointError(
                f"{path}: tensor {name!r} is of dtype {entry.dtype!r}; known: {', '.join(_BYTES)}"
            )
        nbytes = math.prod(entry.shape) * _BYTES[entry.dtype]
        if entry.begin != reached or entry.end - entry.begin != nbytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} of {entry.dtype} {list(entry.shape)} should take the "
                f"{nbytes} bytes from {reached}, the file gives it {entry.begin} to {entry.end}"
            )
        reached = entry.end
    if reached != size:
        raise CheckpointError(
            f"{path}: its tensors take {reached} bytes, {size} are there; it is truncated or "
            "has something appended: copy it again"
        )


def read_headers(paths: Iterable[Path]) -> dict[str, Entry]:
    """Return the tensors of all these files together, by name.

    Raises:
        CheckpointError: if a file is not a sound safetensors file.
    """
    together: dict[str, Entry] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is not a .safetensors file; other formats can run code when they are "
                "loaded and are not read"
            )
        together |= read_header(path)
    return together


def check_plan(plan: Plan, listed: Mapping[str, Entry], where: str) -> None:
    """Check that every layer of the plan is among the tensors, with the sizes it gives.

    Raises:
        CheckpointError: if one is not.
    """
    names = [layer.name for layer in plan]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CheckpointError(f"{where}: the plan names layer {twice!r} more than once")
    wanted = {
        f"{layer.name}.{part}": (part, shape)
        for layer in plan
        for part, shape in _parts(layer, where).items()
    }
    # Some architectures are saved under other names than the model has: these are matched by
    # their sizes alone.
    others = Counter(
        (end, entry.shape)
        for name, entry in listed.items()
        for end in _ends(name)
        if name not in wanted
    )
    for name, (part, shape) in wanted.items():
        key = (part, shape)
        others[key] -= name not in listed
        if others[key] < 0 or (name in listed and listed[name].shape != shape):
            found = f"sizes {list(listed[name].shape)}" if name in listed else "none of that name"
            raise CheckpointError(
                f"{where}: the plan needs a tensor {name!r} of sizes {list(shape)}, the file has "
                f"{found}"
            )


def _ends(name: str) -> set[str]:
    """Return what a tensor may be called within its layer, such as ``left.weight`` or ``rows``."""
    path = name.split(".")
    return {path[-1], ".".join(path[-2:])}


def _parts(layer: LayerPlan, where: str) -> dict[str, tuple[int, ...]]:
    if layer.kind != DENSE and layer.kind not in KINDS:
        raise CheckpointError(f"{where}: the plan gives layer {layer.name!r} kind {layer.kind!r}")
    try:
        # what is tied is stored once
        return {} if layer.tied or layer.kind == DENSE else KINDS[layer.kind].tensors(layer.sizes)
    except KeyError as error:
        raise CheckpointError(
            f"{where}: the plan gives layer {layer.name!r} no size {error}"
        ) from error
