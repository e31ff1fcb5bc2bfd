"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
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
