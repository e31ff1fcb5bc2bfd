"""Group layers by kind, the same path in every block, and by depth, the block's number."""

import itertools
import re
from collections.abc import Iterable

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


def block_number(layer: LayerRecord) -> int:
    """Return the number of the block that a layer is in; 0 where there is none.

    Example:
        >>> block_number(LayerRecord("encoder.layer.11.up", 4, 4, 1, None, None))
        11
    """
    found = _NUMBER.search(layer.name)
    return int(found.group()) if found else 0
