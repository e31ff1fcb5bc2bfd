"""Group layers by kind, the same path in every block, and by depth, the block's number."""

import itertools
import re
from collections.abc import Iterable, Sequence

from lrcompress.report.record import LayerRecord

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def by_layer_type(layers: Iterable[LayerRecord]) -> tuple[str, dict[str, list[LayerRecord]]]:
    """Return the modules that all paths begin with, and the layers by the rest of their path.

    Example:
        >>> layers = [LayerRecord(f"m.{i}.up", 4, 4, 1, None, None) for i in range(2)]
        >>> shared, kinds = by_layer_type(layers)
        >>> shared, {kind: len(members) for kind, members in kinds.items()}
        ('m.*', {'up': 2})
    """
    kinds: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        kinds.setdefault(_NUMBER.sub("*", layer.name), []).append(layer)
    paths = [kind.split(".")[:-1] for kind in kinds]
    parts = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    shared = ".".join(level[0] for level in parts)
    return shared, {kind[len(shared) :].removeprefix("."): kinds[kind] for kind in kinds}


def is_in_block(layer: LayerRecord) -> bool:
    """Return whether a layer is in a numbered block.

    Example:
        >>> is_in_block(LayerRecord("embeddings.word", 4, 4, 1, None, None))
        False
    """
    return _NUMBER.search(layer.name) is not None


def common_path(names: Sequence[str]) -> str:
    """Return the modules that all names begin with, with the dot that follows, or "".

    Example:
        >>> common_path(["m.layer.0.up", "m.layer.1.up"]), common_path(["m.layer.0.up"])
        ('m.layer.', '')
    """
    if len(names) < 2:
        return ""
    paths = [name.split(".")[:-1] for name in names]
    parts = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return "".join(f"{level[0]}." for level in parts)


def block_number(layer: LayerRecord) -> int:
    """Return the number of the block that a layer is in; 0 where there is none.

    Example:
        >>> block_number(LayerRecord("encoder.layer.11.up", 4, 4, 1, None, None))
        11
    """
    found = _NUMBER.search(layer.name)
    return int(found.group()) if found else 0
