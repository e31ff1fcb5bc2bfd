"""A folder is checked as files; whatever was done to it ends in our error or the same model."""

import json
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lrcompress.errors import CheckpointError
from lrcompress.export import load_pretrained, save_pretrained
from lrcompress.export.folder import check_model, read_folder, read_json, sha256
from lrcompress.structure.plan import Plan

from .conftest import made

FILES = ("config.json", "model.safetensors", "lrcompress.json")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    save_pretrained(made("bert", "low_rank_sparse"), folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def test_the_contents_of_a_folder_are_read_without_loading_a_tensor(folder: Path) -> None:
    contents = read_folder(str(folder))
    assert contents.plan == Plan.of(made("bert", "low_rank_sparse"))
    assert contents.nbytes == (folder / "model.safetensors").stat().st_size
    assert contents.tensors["classifier.weight"].shape == (3, 16)
    (folder / "lrcompress.json").unlink()
    assert read_folder(folder) == contents, "transformers saves no record"


def test_a_folder_that_is_none_of_ours_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no folder .*: import lrcompress\.export"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON: FileNotFound"):
        read_folder(tmp_path)
    change(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(
        CheckpointError, match="no quantization_config of quant_method 'lrcompress'"
    ):
        read_folder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a mapping, got list"):
        read_folder(folder)


def test_a_file_in_place_of_a_folder_is_told_from_one_that_is_missing(
    folder: Path, tmp_path: Path
) -> None:
    checkpoint, other = tmp_path / "last.ckpt", tmp_path / "notes.txt"
    for path in (checkpoint, other):
        path.touch()
    told = rf"{checkpoint} is a checkpoint, .*: lrcompress export {checkpoint} FOLDER --config"
    with pytest.raises(CheckpointError, match=told):
        read_folder(checkpoint)
    with pytest.raises(CheckpointError, match=rf"nearest: the folder {folder}$"):
        read_folder(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{other} is a file, .*\.save_pretrained$"):
        read_folder(other)
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_folder(tmp_path / "none.ckpt")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safe"):
        read_folder(folder)


@pytest.mark.parametrize(
    "shards",
    [
        None,
        {},
        [],
        {"a": 3},
        {"a": {}},
        {"a": "b.bin"},
        {"a": "/etc/passwd"},
        {"a": "..safetensors"},
        {"a": "../model.safetensors"},
        {"a": "missing.safetensors"},
    ],
)
def test_an_index_stays_in_the_folder(folder: Path, shards: Any) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match="weight_map must name files of this folder, got"):
        read_folder(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"_attn_implementation_internal": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": {"text_config": "someone/kernel"}},
        {"_of_a_later_transformers": "someone/code"},
        {"_of_a_later_transformers": [0, {"x": "someone/code"}]},
        {"attn_implementation": "someone/kernel"},
        {"transformers_weights": "../other.safetensors"},
        {"custom_pipelines": {"x": 1}},
        {"text_config": {"auto_map": {"x": "y"}}},
    ],
)
def test_a_config_that_makes_transformers_run_or_read_others_is_refused(
    folder: Path, entry: dict[str, Any]
) -> None:
    change(folder / "config.json", **entry)
    key = next(iter(entry)) if "text_config" not in entry else "auto_map"
    with pytest.raises(CheckpointError, match=f"'{key}' is refused, it can make transformers"):
        read_folder(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"_remove_final_layer_norm": True},  # as OPT has it
        {"_sliding_window_pattern": 6},  # Gemma 3
        {"_windows": [6, 1.5, None, ""]},
        {"attn_config": {"_name_or_path": ""}},  # MPT
        {"_name_or_path": "someone/model", "_model_name_or_path": "Smollm2 135M"},  # GGUF
        {"time_step_limit": [0.0, {"__float__": "Infinity"}]},  # Falcon-H1
        {"attn_implementation": "eager"},  # LightGlue
        {"attention_invalid_logits_value": -1e9},  # Gemma 4
        {"max_window_layers": 100},
    ],
)
def test_what_can_name_no_code_and_no_file_is_read(folder: Path, entry: dict[str, Any]) -> None:
    (folder / "lrcompress.json").unlink()
    before = load_pretrained(folder).state_dict()
    change(folder / "config.json", **entry)
    after = load_pretrained(folder).state_dict()
    assert all(after[key].equal(before[key]) for key in before)


def test_the_way_out_that_a_refusal_tells_works(folder: Path) -> None:
    change(folder / "config.json", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(CheckpointError, match=r"or take the entry out and delete lrcompress\.json"):
        load_pretrained(folder)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(
        json.dumps({k: config[k] for k in config if k != "auto_map"})
    )
    (folder / "lrcompress.json").unlink()
    load_pretrained(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json would make transformers load"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**6),
        ("num_labels", 10**9),
        ("hidden_size", -(10**9)),
        ("vocab_size", 1e300),
        ("inner", {"num_layers": 10**6}),
        ("depths", [1, 10**9]),
    ],
)
def test_sizes_that_the_weights_cannot_be_about_are_refused(
    folder: Path, key: str, value: Any
) -> None:
    change(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=r"more than weights of .* bytes can be about"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"lrcompress\.json is of version 2, this lrcompress reads 1; update it"),
        ({"plan": Plan().to_dict()}, "hold different plans: one was edited. If config.json"),
        ({"plan": 3}, "expected a plan, got int"),
        ({"sha256": None}, "expected sha256 of the files, got None"),
        ({"sha256": {"config.json": "0"}}, r"config\.json is not as it was exported"),
        ({"sha256": {"config.json": None, "../x": ""}}, "is not as it was exported"),
    ],
)
def test_a_record_that_differs_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    change(folder / "lrcompress.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_folder(folder)


@pytest.mark.parametrize("name", ["../config.json", "gone.json", "/etc/passwd"])
def test_a_record_names_files_of_the_folder_only(folder: Path, name: str) -> None:
    noted = {"config.json": sha256(folder / "config.json"), name: "0"}
    change(folder / "lrcompress.json", sha256=noted)
    with pytest.raises(CheckpointError, match="notes a file that is not there"):
        read_folder(folder)


def test_files_changed_after_the_export_are_told_with_the_way_out(folder: Path) -> None:
    change(folder / "config.json", hidden_act="relu")
    with pytest.raises(
        CheckpointError, match=r"edited, or saved over\. .*, delete lrcompress\.json"
    ):
        load_pretrained(folder)
    (folder / "lrcompress.json").unlink()
    assert load_pretrained(folder).config.hidden_act == "relu"


def test_a_model_that_would_take_more_than_the_files_hold_is_refused(folder: Path) -> None:
    contents = read_folder(folder)
    with pytest.raises(CheckpointError, match=r"would take 1000000000 bytes beside its weights"):
        check_model(contents, {}, 10**9, whole=True)
    huge = {"head": torch.empty(10**8, 10, device="meta")}
    with pytest.raises(CheckpointError, match=r"would take 4000000000 bytes beside"):
        check_model(contents, huge, 0, whole=False)
    with pytest.raises(CheckpointError, match="not in the weights, such as 'head'"):
        check_model(contents, huge, 0, whole=True)


STRANGE: list[Any] = [None, True, -1, 0, 1, 7, 2**31, 10**18, 10**400, 0.5, float("nan"), "", "x"]
STRANGE += ["../../etc/passwd", "/dev/zero", [], [1], {}, {"a": 1}, "os.system", "\x00"]


def mutate(folder: Path, chance: random.Random) -> str:
    """Do one thing to one file of the folder, and say what."""
    name = chance.choice(FILES)
    path = folder / name
    data = path.read_bytes()
    kinds: dict[str, Callable[[], object]] = {
        "truncated": lambda: path.write_bytes(data[: chance.randrange(len(data))]),
        "flipped": lambda: path.write_bytes(flipped(data, chance.randrange(len(data)), chance)),
        "flipped early": lambda: path.write_bytes(flipped(data, chance.randrange(64), chance)),
        "appended": lambda: path.write_bytes(data + chance.randbytes(chance.randrange(1, 99))),
        "random": lambda: path.write_bytes(chance.randbytes(200)),
        "gone": path.unlink,
        "replaced": lambda: path.write_bytes((folder / chance.choice(FILES)).read_bytes()),
        "value": lambda: change_value(path, data, chance),
        "value too": lambda: change_value(path, data, chance),
        "value three": lambda: change_value(path, data, chance),
    }
    kind = chance.choice(list(kinds))
    kinds[kind]()
    return f"{name} {kind}"


def flipped(data: bytes, at: int, chance: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


def change_value(path: Path, data: bytes, chance: random.Random) -> None:
    """Put something strange in the place of any value of the JSON that the file is or has."""
    is_json = path.suffix == ".json"
    size = 0 if is_json else struct.unpack("<Q", data[:8])[0]
    tree = json.loads(data if is_json else data[8 : 8 + size])
    place, key = tree, chance.choice(list(tree))
    while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.9:
        place = place[key]
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[key] = chance.choice(STRANGE)
    text = json.dumps(tree).encode()
    rest = b"" if is_json else data[8 + size :]
    path.write_bytes(text if is_json else struct.pack("<Q", len(text)) + text + rest)


def loaded(folder: Path) -> dict[str, torch.Tensor] | str:
    """The tensors of the model that loads, or what the error says."""
    try:
        return load_pretrained(folder).state_dict()
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("noted", [True, False], ids=["with checksums", "without"])
def test_two_hundred_mutations_load_identically_or_end_in_our_error(
    exported: Path, tmp_path: Path, noted: bool
) -> None:
    expected = load_pretrained(exported).state_dict()
    before, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for seed in range(200):
        folder = Path(shutil.copytree(exported, tmp_path / str(seed)))
        what = mutate(folder, random.Random(seed))
        if not noted:
            (folder / "lrcompress.json").unlink(missing_ok=True)
        started = time.monotonic()
        outcome = loaded(folder)
        if isinstance(outcome, str):
            place = (str(folder), "weights", "config.json", "plan")
            assert any(name in outcome for name in place), what
            assert "allocate" not in outcome, what
        else:
            assert outcome.keys() == expected.keys(), what
            assert all(outcome[key].shape == expected[key].shape for key in outcome), what
            if noted:
                assert all(outcome[key].equal(expected[key]) for key in outcome), what
        outcomes.append("error" if isinstance(outcome, str) else "loaded")
        assert time.monotonic() - started < 60, what
        shutil.rmtree(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100 * 2**20, f"{grown} bytes more than before"
    assert outcomes.count("error") >= 80
    assert outcomes.count("loaded") >= 5
