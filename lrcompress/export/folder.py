"""Read and check the files of an exported folder, before a model is built from it."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from lrcompress.errors import CheckpointError
from lrcompress.export.plugin import METHOD, CompressionConfig, check_read, check_version
from lrcompress.export.tensors import Entry, check_plan, read_headers
from lrcompress.structure.plan import Plan

CONFIG, WEIGHTS, RECORD = "config.json", "model.safetensors", "lrcompress.json"
INDEX = f"{WEIGHTS}.index.json"
# Entries of a config.json that make transformers fetch or run something, or read other files.
_REFUSED = re.compile(r"auto_map|custom_\w+|\w+_implementation(_internal)?|transformers_weights")
_BUILT_IN = ("eager", "sdpa")  # implementations for which nothing is fetched
# Private entries are for transformers itself to read, whatever a later one makes of them; these
# with text in them are known to be read by no loading.
_KNOWN_TEXT = {"_name_or_path", "_model_name_or_path", "__float__"}
_PLAIN = re.compile(r"[\w-][\w.-]*\.safetensors")
_REFUSED_FILES = ("adapter_config.json",)
_SIZE = re.compile(
    r"num_|(^|_)n_|_size|_dim|dim$|length|positions|ratio|factor|size$|depth|layers|channels|hidden"
)
_COUNT = re.compile(r"layers?$|blocks?$|depths?$")
_CHECKPOINTS = (".ckpt", ".pt", ".pth")
_LEAST = 2**20  # sizes up to it are harmless, however small the file
_LEAST_COUNT = 2**7  # and so are counts


@dataclass(frozen=True)
class Contents:
    """What an exported folder holds.

    Attributes:
        path: the folder.
        config: its ``config.json``.
        plan: the structure of the model.
        tensors: what its weight files hold, by name.
        nbytes: bytes of the weight files.
    """

    path: Path
    config: dict[str, Any]
    plan: Plan
    tensors: dict[str, Entry]
    nbytes: int


def _of_a_file(path: Path) -> str:
    """Return what is wrong with a file in place of a folder, and the way out."""
    if path.suffix in _CHECKPOINTS:
        return (
            f"{path} is a checkpoint, and what is read here is a folder of "
            f"lrcompress.save_pretrained; make one of it: lrcompress export {path} FOLDER "
            "--config RECIPE"
        )
    within = (path.parent / CONFIG).is_file()
    return f"{path} is a file, and what is read here is a folder of lrcompress.save_pretrained" + (
        f"; nearest: the folder {path.parent}" if within else ""
    )


def read_folder(folder: str | Path) -> Contents:
    """Return the contents of an exported folder; all is checked, no tensor is loaded.

    Raises:
        CheckpointError: if it is no such folder, or anything in it does not fit together.
    """
    path = Path(folder).expanduser()
    if path.is_file():
        raise CheckpointError(_of_a_file(path))
    if not path.is_dir():
        raise CheckpointError(
            f"there is no folder {path}; for a repository on the hub: import lrcompress.export, "
            "then from_pretrained"
        )
    config = read_json(path / CONFIG)
    entry = config.get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{path / CONFIG} has no quantization_config of quant_method {METHOD!r}: not a folder "
            "of lrcompress.save_pretrained; load it with from_pretrained of transformers"
        )
    plan = Plan.from_dict(CompressionConfig.from_dict(entry).plan)
    for name in _REFUSED_FILES:
        if (path / name).exists():
            raise CheckpointError(f"{path / name} would make transformers load another model")
    files = _weight_files(path)
    tensors = read_headers(files)
    check_plan(plan, tensors, str(path))
    nbytes = sum(file.stat().st_size for file in files)
    check_config(path / CONFIG, config, len(tensors), nbytes)
    _check_record(path, plan)
    return Contents(path, config, plan, tensors, nbytes)


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds.

    Raises:
        CheckpointError: if there is no such file, or it holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error!r}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(data).__name__}")
    return data


def _weight_files(path: Path) -> list[Path]:
    """Return the weight files, which all lie in the folder itself.

    Raises:
        CheckpointError: if there are none, or the index points anywhere else.
    """
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if not (path / INDEX).exists():
        raise CheckpointError(f"{path} has neither {WEIGHTS} nor {INDEX}")
    shards = read_json(path / INDEX).get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    if not names or not all(_PLAIN.fullmatch(x) and (path / x).is_file() for x in names):
        raise CheckpointError(
            f"{path / INDEX}: weight_map must name files of this folder, got {str(shards)[:200]}"
        )
    return [path / name for name in sorted(names)]


def check_config(path: Path, config: Mapping[str, Any], num_tensors: int, nbytes: int) -> None:
    """Check that the config is safe to load, and its sizes are possible for the weight files.

    Raises:
        CheckpointError: if they are not, or a key could make ``transformers`` run code.
    """
    for key, value in _entries(config):
        if _is_refused(key, value):
            raise CheckpointError(
                f"{path}: {key!r} is refused, it can make transformers run code or read other "
                f"files, got {value!r:.80}; if you trust the folder, load it with from_pretrained, "
                f"or take the entry out and delete {RECORD}, whose checksums would no longer agree"
            )
        most = max(num_tensors, _LEAST_COUNT) if _COUNT.search(key) else max(nbytes, _LEAST)
        sized = _COUNT.search(key) or _SIZE.search(key)
        if sized and isinstance(value, int | float) and not -most <= value <= most:
            raise CheckpointError(
                f"{path}: {key} is {value}, more than weights of {num_tensors} tensors and "
                f"{nbytes} bytes can be about"
            )


def _is_refused(key: str, value: Any) -> bool:
    """Return whether an entry of a config could make ``transformers`` run code or read files.

    A private entry without text can name nothing: Gemma 3's ``_sliding_window_pattern`` is a
    number of the model.
    """
    if _REFUSED.fullmatch(key):
        return not (value is None or value in _BUILT_IN)
    return key.startswith("_") and key not in _KNOWN_TEXT and _has_text(value)


def _has_text(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and value != ""


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all keys and values of the config, and of the configs in it."""
    for key, value in config.items():
        if key == "quantization_config":
            continue
        for part in value if isinstance(value, list) else [value]:
            yield key, part
            if isinstance(part, dict):
                yield from _entries(part)


def _check_record(path: Path, plan: Plan) -> None:
    """Check the files against the checksums and the plan in ``lrcompress.json``.

    There is no such file where ``transformers`` saved the folder.

    Raises:
        CheckpointError: if they differ.
    """
    if not (path / RECORD).exists():
        return
    record = read_json(path / RECORD)
    check_version(record.get("version"), str(path / RECORD))
    if check_read(record.get("plan"), str(path / RECORD)) != plan:
        raise CheckpointError(
            f"{path / RECORD} and {path / CONFIG} hold different plans: "
            f"one was edited. If {CONFIG} is right, delete {RECORD}"
        )
    noted = record.get("sha256")
    if not isinstance(noted, dict) or CONFIG not in noted:
        raise CheckpointError(f"{path / RECORD}: expected sha256 of the files, got {noted!r}")
    for name, digest in noted.items():
        if Path(name).name != name or not (path / name).is_file():
            raise CheckpointError(f"{path / RECORD} notes a file that is not there: {name!r}")
        if sha256(path / name) != digest:
            raise CheckpointError(
                f"{path / name} is not as it was exported: damaged on the way, edited, or saved "
                f"over. If that was you, delete {RECORD}, or save with lrcompress.save_pretrained"
            )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_model(contents: Contents, own: Mapping[str, Tensor], beside: int, whole: bool) -> None:
    """Check a model on the ``meta`` device against the tensors of its folder.

    Args:
        contents: of the folder.
        own: the tensors that the model would load, by their names in the folder.
        beside: bytes that it would allocate and not load.
        whole: whether nothing of ``own`` may be missing.

    Raises:
        CheckpointError: if a tensor has other sizes or is missing, or the model would allocate far
            more than the folder holds.
    """
    found = {name: contents.tensors[name] for name in own if name in contents.tensors}
    for name, entry in found.items():
        if entry.shape != tuple(own[name].shape):
            raise CheckpointError(
                f"{contents.path}: by its config.json tensor {name!r} has sizes "
                f"{list(own[name].shape)}, the weights have {list(entry.shape)}"
            )
    # some architectures are saved under other names than the model has, so names may differ
    lacking = {name: tensor for name, tensor in own.items() if name not in found}
    spare = sum(prod(x.shape) for name, x in contents.tensors.items() if name not in found)
    asked = sum(prod(x.shape) for x in lacking.values())
    if whole and asked > spare:
        raise CheckpointError(
            f"{contents.path}: the model of its config.json has tensors that are not in the "
            f"weights, such as {next(iter(lacking))!r}"
        )
    beside += 0 if whole else sum(x.nbytes for x in lacking.values())
    if beside > contents.nbytes + _LEAST:
        raise CheckpointError(
            f"{contents.path}: the model of its config.json would take {beside} bytes beside its "
            f"weights, which have {contents.nbytes}"
        )
