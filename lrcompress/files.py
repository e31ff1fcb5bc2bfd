"""Atomic file writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to ``path`` after the block.

    If the block fails, what was at ``path`` before stays there, and the temporary file is
    removed. The folder is made if it does not exist. There is no ``fsync``: this protects from a
    full disk or a killed process, not from a power failure.

    Args:
        path: the file to write.

    Raises:
        OSError: what the block raises, such as on a full disk, with the file's name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/note.txt") as temporary:
        ...         _ = temporary.write_text("done")
        ...     Path(folder, "note.txt").read_text()
        'done'
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
