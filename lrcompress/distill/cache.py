"""Disk cache of the teacher's features per example, so that later epochs need not run it."""

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lrcompress.distill.capture import Call
from lrcompress.errors import CheckpointError

FILE = "teacher_features.sqlite"
LABELS = frozenset({"labels", "label", "label_ids"})  # the teacher's features do not depend on them


class Cache:
    """Disk cache from the hash of an example to the teacher's features for it, without padding.

    Args:
        folder: folder of the cache's file, made when it is first used.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE

    def read(
        self, keys: list[bytes], like: Mapping[str, Tensor], mask: Tensor | None
    ) -> dict[str, Tensor] | None:
        """Return the features of a batch, or None unless all its examples are there.

        Args:
            keys: of the examples, from :func:`example_keys`.
            like: the student's features; cached ones of another shape or dtype are not used.
            mask: ``(batch, tokens)``, nonzero at real tokens.

        Raises:
            CheckpointError: if the file is damaged.
        """
        rows = self._fetch(keys)
        if rows is None:
            return None
        features = {name: torch.zeros_like(feature) for name, feature in like.items()}
        for index, row in enumerate(rows):
            if row.keys() != features.keys():
                return None
            for name, feature in features.items():
                place = _place(feature, mask, index)
                value = row[name].to(feature.device)
                if value.shape != feature[place].shape or value.dtype != feature.dtype:
                    return None
                feature[place] = value
        return features

    def write(self, keys: list[bytes], features: Mapping[str, Tensor], mask: Tensor | None) -> None:
        """Store the features of a batch.

        Raises:
            CheckpointError: if the file is damaged, or the disk is full.
        """
        rows = []
        for index, key in enumerate(keys):
            row = {n: f[_place(f, mask, index)].cpu().contiguous() for n, f in features.items()}
            value = save(row)
            rows.append((key, value, _digest(value)))
        with _guard(self.path), closing(self._open()) as database, database:
            database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", rows)

    def _fetch(self, keys: list[bytes]) -> list[dict[str, Tensor]] | None:
        found: list[dict[str, Tensor]] = []
        with _guard(self.path), closing(self._open()) as database:
            for key in keys:
                query = "SELECT value, digest FROM features WHERE key = ?"
                row = database.execute(query, (key,)).fetchone()
                if row is None:
                    return None
                if _digest(row[0]) != row[1]:
                    raise sqlite3.DatabaseError("a value is not what was written")
                found.append(load(row[0]))
        return found

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=120)
        with ExitStack() as failed:
            failed.callback(database.close)
            database.execute("PRAGMA synchronous = OFF")  # what a crash loses is computed anew
            database.execute(
                "CREATE TABLE IF NOT EXISTS features "
                "(key BLOB PRIMARY KEY, value BLOB, digest BLOB) WITHOUT ROWID"
            )
            failed.pop_all()
        return database


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Replace an error of sqlite by one that says what to do about the file.

    Raises:
        CheckpointError: in place of any error of sqlite.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", None) in (
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_IOERR_WRITE,
        ):
            raise CheckpointError(
                f"the teacher's features cannot be written to {path}: {error}; make room, or leave "
                "cache= out; what is in it is whole"
            ) from error
        raise CheckpointError(
            f"the cache of the teacher's features at {path} cannot be used: {error}; "
            "delete it, it will be made anew"
        ) from error


def example_keys(call: Call, size: int, mask: Tensor | None, context: str) -> list[bytes]:
    """Return a hash of each example of a call: of its inputs without padding and labels.

    Args:
        call: its tensors with a leading size of ``size`` are inputs.
        size: how many examples there are.
        mask: ``(batch, tokens)``; the positions of the real tokens count.
        context: what else the features depend on: the teacher, and which features.
    """
    inputs = sorted(_leaves("", [list(call.args), dict(call.kwargs)]), key=lambda leaf: leaf[0])
    common = hashlib.blake2b(context.encode(), digest_size=20)
    batched = {}
    for path, value in inputs:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == size:
            batched[path] = value.detach().cpu()
        else:
            common.update(f"{path} ".encode())
            common.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    mask = None if mask is None else mask.cpu()
    keys = []
    for index in range(size):
        digest = common.copy()
        if mask is not None:
            digest.update(_bytes(mask[index].nonzero()))
        for path, value in batched.items():
            part = value[_place(value, mask, index)]
            digest.update(f"{path} {part.dtype} {tuple(part.shape)} ".encode())
            digest.update(_bytes(part))
        keys.append(digest.digest())
    return keys


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in LABELS:
                yield from _leaves(f"{path}.{key}", part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _leaves(f"{path}[{index}]", part)
    else:
        yield path, value


def _place(tensor: Tensor, mask: Tensor | None, index: int) -> Any:
    """Return the index of an example's own positions in a tensor."""
    if mask is not None and tensor.shape[:2] == mask.shape:
        return index, mask[index].bool()
    return index


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=16).digest()
