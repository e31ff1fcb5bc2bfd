"""Layers by kind and depth, whatever their names are."""

from lrcompress.report import LayerRecord
from lrcompress.report.layer_groups import block_number, by_layer_type


def layers(*names: str) -> list[LayerRecord]:
    return [LayerRecord(name, 4, 4, 1, None, None) for name in names]


def test_numbers_in_the_path_are_the_depth_and_not_the_kind() -> None:
    shared, kinds = by_layer_type(layers("m.h.0.mlp.fc", "m.h.0.attn", "m.h.10.mlp.fc"))
    assert shared == "m.h.*"
    assert {k: [block_number(x) for x in v] for k, v in kinds.items()} == {
        "mlp.fc": [0, 10],
        "attn": [0],
    }


def test_layers_without_a_path_are_kinds_of_their_own() -> None:
    assert {k: len(v) for k, v in by_layer_type(layers("head", "0"))[1].items()} == {
        "head": 1,
        "0": 1,
    }
    assert by_layer_type([]) == ("", {})
    assert block_number(layers("head")[0]) == 0
