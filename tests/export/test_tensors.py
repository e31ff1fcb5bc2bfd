"""The header of a safetensors file is checked before a tensor of it is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lrcompress.errors import CheckpointError
from lrcompress.export.tensors import Entry, check_plan, read_header, read_headers
from lrcompress.structure.plan import LayerPlan, Plan

SIZES = {"in": 3, "out": 4, "rank": 2}
SPARSE = SIZES | {"rows": 1}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """Write a file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_the_tensors_of_a_file_are_read_from_its_header(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bool), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: (x.dtype, x.shape) for name, x in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BOOL", (4,)),
        "c": ("F32", (0,)),
    }
    save_file({"d": torch.zeros(1)}, tmp_path / "y.safetensors")
    both = read_headers([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])
    assert set(both) == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({}, b"", 2**60, "its header would take 1152921504606846976 bytes, the file has 10"),
        (b"{", b"", None, "is no safetensors file: JSONDecodeError"),
        (b"[" * 100_000, b"", None, "is no safetensors file: RecursionError"),
        (b"\xff", b"", None, "is no safetensors file: UnicodeDecodeError"),
        ([], b"", None, "is no safetensors file: AttributeError"),
        ({"a": 3}, b"", None, "is no safetensors file: TypeError"),
        ({"a": {}}, b"", None, "is no safetensors file: KeyError"),
        ({"a": entry([1.5], 0, 4)}, b"1234", None, "sizes must be whole numbers from 0"),
        ({"a": entry([-1], 0, 4)}, b"1234", None, "sizes must be whole numbers from 0"),
        ({"a": entry([1], 0, 4, "X")}, b"1234", None, "'a' is of dtype 'X'; known: F64"),
        ({"a": entry([2**40], 0, 4)}, b"1234", None, r"\[1099511627776\] should take the 4398"),
        ({"a": entry([1], 4, 8)}, b"12345678", None, "the file gives it 4 to 8"),
        (
            {"a": entry([1], 0, 4), "b": entry([1], 0, 4)},
            b"1234",
            None,
            "the 4 bytes from 4, the file gives it 0 to 4",
        ),
        ({"a": entry([1], 0, 4)}, b"123", None, "its tensors take 4 bytes, 3 are there"),
        ({"a": entry([1], 0, 4)}, b"12345", None, "its tensors take 4 bytes, 5 are there"),
    ],
)
def test_what_is_no_sound_file_is_refused(
    header: Any, data: bytes, length: int | None, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(CheckpointError, match="the file has 0"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        read_header(tmp_path / "y.safetensors")


def test_other_formats_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.bin is not a \.safetensors file"):
        read_headers([tmp_path / "model.bin"])


def listed(shapes: dict[str, tuple[int, ...]]) -> dict[str, Entry]:
    return {name: Entry("F32", shape, 0, 0) for name, shape in shapes.items()}


LOW_RANK = {"a.left.weight": (4, 2), "a.right.weight": (2, 3)}
ROWS = {"a.left.weight": (4, 2), "a.inner.weight": (3, 3), "a.kept": (3,), "a.index": (1,)}


def test_a_plan_that_the_tensors_bear_out_passes() -> None:
    check_plan(Plan((LayerPlan("a", "low_rank", SIZES),)), listed(LOW_RANK), "folder")
    check_plan(Plan((LayerPlan("a", "low_rank_sparse", SPARSE),)), listed(ROWS), "folder")
    check_plan(Plan((LayerPlan("a", "dense", SIZES),)), {}, "folder")
    check_plan(Plan(), listed(ROWS), "folder")


def test_tensors_saved_under_other_names_are_told_apart_by_their_sizes() -> None:
    renamed = {name.replace("a.", "old."): shape for name, shape in ROWS.items()}
    plan = Plan((LayerPlan("a", "low_rank_sparse", SPARSE),))
    check_plan(plan, listed(renamed), "folder")
    twice = Plan((*plan.layers, LayerPlan("b", "low_rank_sparse", SPARSE)))
    with pytest.raises(CheckpointError, match=r"'b\..*\.weight' .* none of that name"):
        check_plan(twice, listed(renamed), "folder")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            LayerPlan("a", "low_rank", SIZES | {"rank": 9}),
            r"'a\.left\.weight' of sizes \[4, 9\], the file has sizes \[4, 2\]",
        ),
        (
            LayerPlan("a", "low_rank", SIZES | {"in": 10**12}),
            r"'a\.right\.weight' of sizes \[2, 1000000000000\]",
        ),
        (
            LayerPlan("b", "low_rank", SIZES | {"rank": 1}),
            r"'b\.left\.weight' .* none of that name",
        ),
        (LayerPlan("a", "low_rank_sparse", SPARSE), r"'a\.inner\.weight' .* none of that name"),
        (LayerPlan("a", "low_rank_sparse", SIZES), "gives layer 'a' no size 'rows'"),
        (LayerPlan("a", "low_rank", {}), "gives layer 'a' no size 'rank'"),
        (LayerPlan("a", "magic", SIZES), "gives layer 'a' kind 'magic'"),
    ],
)
def test_a_plan_that_the_tensors_do_not_bear_out_is_refused(layer: LayerPlan, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"folder: .*{message}"):
        check_plan(Plan((layer,)), listed(LOW_RANK), "folder")


def test_a_layer_named_twice_is_refused() -> None:
    layer = LayerPlan("a", "low_rank", SIZES)
    with pytest.raises(CheckpointError, match="names layer 'a' more than once"):
        check_plan(Plan((layer, layer)), listed(LOW_RANK), "folder")
