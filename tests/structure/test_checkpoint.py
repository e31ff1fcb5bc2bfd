"""A checkpoint loads as it was written or not at all, and nothing in it runs or takes memory."""

import io
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lrcompress.callbacks import Factorize
from lrcompress.errors import CheckpointError, LRCompressError
from lrcompress.structure.checkpoint import read_checkpoint, read_lightning_checkpoint
from lrcompress.structure.plan import LayerPlan, Plan, restore_structure

Editor = Callable[[dict[str, bytes]], object]


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        sparse = {"in": 8, "out": 8, "rank": 2, "rows": 3}
        Plan((LayerPlan("layers.2", "low_rank_sparse", sparse),)).apply_(self)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for layer in self.layers:
            batch = layer(batch).relu()
        return batch.square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a Trainer wrote: weights, plan, report, optimizer, loops."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Factorize(0.5, "step:2", "svd", ["layers.[01]"], report_path=None)],
    )
    trainer.fit(Small(), torch.utils.data.DataLoader(torch.randn(16, 5, 8), batch_size=4))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def loaded(path: Path) -> dict[str, Tensor] | str:
    """The weights in a new module, or what the error says."""
    module = Small()
    try:
        restore_structure(module, path)
        module.load_state_dict(read_lightning_checkpoint(path)["state_dict"])
    except LRCompressError as error:
        return str(error)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):  # of other names and sizes
            raise
        return str(error)
    return module.state_dict()


def rewrite(source: Path, target: Path, edit: Editor, compress: int = zipfile.ZIP_STORED) -> None:
    """Write an archive with other parts, whose checksums are right again."""
    with zipfile.ZipFile(source) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    edit(parts)
    with zipfile.ZipFile(target, "w", compress) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def pickle_in(parts: dict[str, bytes]) -> str:
    return next(name for name in parts if name.endswith("/data.pkl"))


def same(outcome: Any, expected: dict[str, Tensor]) -> bool:
    return outcome.keys() == expected.keys() and all(
        outcome[key].equal(expected[key]) for key in expected
    )


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path, call: Callable[..., Any] = os.mkdir) -> None:
        self.path, self.call = str(path), call

    def __reduce__(self) -> Any:
        return self.call, (self.path,)


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.found = function, args

    def __reduce__(self) -> Any:
        return self.found


def test_a_checkpoint_is_what_torch_reads_in_it(original: Path) -> None:
    checkpoint = read_checkpoint(str(original))
    expected = torch.load(original, weights_only=True)
    assert checkpoint.keys() == expected.keys()
    assert same(checkpoint["state_dict"], expected["state_dict"])
    assert repr(checkpoint["callbacks"]) == repr(expected["callbacks"])
    assert "layers.0.left.weight" in checkpoint["state_dict"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.complex64])
def test_tensors_of_any_form_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    held = {"view": whole[1:, ::2], "turned": whole.T, "none": whole[:0], "one": whole[2, 3]}
    held |= {"wide": whole[:, :1].expand(4, 9), "size": whole.shape, "dtype": dtype}  # type: ignore[dict-item]
    torch.save(held | {"parameter": nn.Parameter(torch.ones(2))}, tmp_path / "file")
    found = read_checkpoint(tmp_path / "file")
    assert all(torch.equal(found[k], x) for k, x in held.items() if isinstance(x, Tensor))
    assert (found["size"], found["dtype"]) == (whole.shape, dtype)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, original: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match=r"file cannot be read as a checkpoint: there is no"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"sharded .* can run code .*dcp_to_torch"):
        read_checkpoint(tmp_path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="BadZipFile: File is not a zip file"):
        read_checkpoint(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match="must hold a mapping, got list"):
        read_checkpoint(path)
    rewrite(original, path, lambda parts: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="parts that are packed or twice there"):
        read_checkpoint(path)
    torch.save({"state_dict": 3}, path)
    with pytest.raises(CheckpointError, match="state_dict must be a mapping, got int"):
        restore_structure(Small(), path)
    state = {"layers.0.left.weight": torch.ones(3), "layers.0.right.weight": torch.ones(3)}
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.left\.weight must be a tensor with 2 axes"
    ):
        restore_structure(Small(), state)


def test_what_a_part_claims_beyond_the_file_is_refused(tmp_path: Path, original: Path) -> None:
    path = tmp_path / "file"
    data = bytearray(original.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"claims parts of 2147\d+ bytes, it has \d+"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Runs(Path("x")), "asks for posix.mkdir; only tensors and plain values are read"),
        (Calls(bytearray, 2**40), r"asks for __builtin__\.bytearray"),
        (Calls(torch.Tensor, 2**40), r"asks for torch\.Tensor"),
        (Calls(torch.Size, [1] * 65), "has a torch.Size of 65 axes"),
        (Calls(torch.Size, 3), "TypeError"),
        ({1, 2}, r"asks for __builtin__\.set"),
        (Path("x"), r"asks for pathlib\S*\.PosixPath; .* Take it out of the hyperparameters"),
    ],
    ids=["mkdir", "bytearray", "tensor", "size of 65 axes", "size of 3", "set", "path"],
)
def test_what_would_run_or_take_memory_is_refused(
    value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "value": value}, "file")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint("file")
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def tensor(sizes: Any, strides: Any, offset: Any = 0, count: Any = 4, kind: str = "Float") -> bytes:
    """A pickle of one tensor, whose storage would have the key 0."""

    class Writer(pickle._Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.pid if isinstance(value, Stored) else None

    class Stored:
        pid = ("storage", getattr(torch, f"{kind}Storage"), "0", "cpu", count)

    made = Calls(torch._utils._rebuild_tensor_v2, Stored(), offset, sizes, strides, False, {})
    file = io.BytesIO()
    Writer(file, 2).dump({"state_dict": {"x": made}})
    return file.getvalue()


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (tensor((2**50,), (1,)), r"sizes \[1125899906842624\], more than the 4 elements stored"),
        (tensor((2, 3), (2, 1)), r"sizes \[2, 3\], more than the 4 elements"),
        (tensor((2, 2), (2, 1), 1), r"sizes \[2, 2\], more than the 4"),
        (tensor((2, 2), (2,)), r"tensor of sizes \(2, 2\), strides \(2,\), at 0"),
        (tensor((-2, -2), (2, 1)), r"tensor of sizes \(-2, -2\)"),
        (tensor((2.0,), (1,)), r"tensor of sizes \(2.0,\)"),
        (tensor((4,), (1,), count=2**50), "claims 1125899906842624 elements of 4 bytes for"),
        (tensor((4,), (1,), kind="Double"), "claims 4 elements of 8 bytes for .* has 16 bytes"),
        (pickle.dumps({"a": 1}, 4), "is pickled by a protocol above 2"),
        (b"\x80\x02]K\x01}b.", "it may be cut short: UnpicklingError: Weights only load failed$"),
    ],
)
def test_a_tensor_lies_within_its_storage(structure: bytes, message: str, tmp_path: Path) -> None:
    def edit(parts: dict[str, bytes]) -> None:
        parts[pickle_in(parts)] = structure

    torch.save({"x": torch.arange(4.0)}, tmp_path / "good")
    rewrite(tmp_path / "good", tmp_path / "file", edit)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "file")


def test_a_sound_tensor_written_by_hand_is_read(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(4.0)}, tmp_path / "good")
    sound = tensor((2, 2), (2, 1))
    rewrite(tmp_path / "good", tmp_path / "file", lambda p: p.update({pickle_in(p): sound}))
    found = read_checkpoint(tmp_path / "file")["state_dict"]["x"]
    assert found.tolist() == [[0.0, 1.0], [2.0, 3.0]]


STRANGE: list[Any] = [None, True, -1, 2**31, 10**30, 0.5, float("nan"), "", "x", [], [1], {"a": 1}]
STRANGE += [torch.zeros(()), torch.zeros(1).expand(2**40, 8), torch.zeros(8, 0), torch.ones(9, 2)]


def mutate(original: Path, path: Path, chance: random.Random) -> tuple[str, bool]:
    """Write a changed copy; say how it was changed, and whether it is another sound file."""
    data = original.read_bytes()

    def flipped(data: bytes, start: int = 0) -> bytes:
        at = chance.randrange(start, len(data))
        return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]

    def part(parts: dict[str, bytes], name: str) -> None:
        parts[name] = flipped(parts[name])

    def shortened(parts: dict[str, bytes]) -> None:
        name = chance.choice([name for name in parts if "/data/" in name])
        parts[name] = parts[name][: chance.randrange(len(parts[name]))]

    def value() -> None:
        checkpoint = torch.load(original, weights_only=True)
        place, key = checkpoint, chance.choice(["state_dict", "callbacks", "loops", "state_dict"])
        while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.9:
            place = place[key]
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place[key] = chance.choice(STRANGE)
        torch.save(checkpoint, path)

    def swapped() -> None:
        checkpoint = torch.load(original, weights_only=True)
        state = checkpoint["state_dict"]
        one, other = chance.sample(list(state), 2)
        state[one], state[other] = state[other], state[one]
        torch.save(checkpoint, path)

    def code() -> None:
        checkpoint = torch.load(original, weights_only=True)
        where = chance.choice([checkpoint, checkpoint["state_dict"], checkpoint["callbacks"]])
        where["more"] = Runs(path.with_name("ran"), chance.choice([os.mkdir, os.system, eval]))
        torch.save(checkpoint, path)

    raw: dict[str, Callable[[], object]] = {
        "truncated": lambda: path.write_bytes(data[: chance.randrange(len(data))]),
        "flipped": lambda: path.write_bytes(flipped(data)),
        "flipped early": lambda: path.write_bytes(flipped(data[:4000]) + data[4000:]),
        "flipped directory": lambda: path.write_bytes(flipped(data, data.index(b"PK\x01\x02"))),
        "appended": lambda: path.write_bytes(data + chance.randbytes(chance.randrange(1, 99))),
        "random": lambda: path.write_bytes(chance.randbytes(200)),
        "code": code,
        "shortened": lambda: rewrite(original, path, shortened),
    }
    sound: dict[str, Callable[[], object]] = {
        "value": value,
        "value too": value,
        "swapped": swapped,
        "pickle": lambda: rewrite(original, path, lambda p: part(p, pickle_in(p))),
        "pickle too": lambda: rewrite(original, path, lambda p: part(p, pickle_in(p))),
    }
    kind = chance.choice([*raw, *sound])
    (raw | sound)[kind]()
    return kind, kind in sound


def test_two_hundred_mutations_load_identically_or_end_in_an_error(
    original: Path, tmp_path: Path
) -> None:
    expected, outcomes = loaded(original), []
    assert isinstance(expected, dict)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(200):
        what, sound = mutate(original, tmp_path / "file", random.Random(seed))
        started = time.monotonic()
        outcome = loaded(tmp_path / "file")
        if isinstance(outcome, str):
            assert "allocate" not in outcome, what
        elif sound:  # another checkpoint, whose weights are what it says
            assert {k: x.shape for k, x in outcome.items()} == {
                k: x.shape for k, x in expected.items()
            }, what
        else:
            assert same(outcome, expected), what
        outcomes.append("error" if isinstance(outcome, str) else "loaded")
        assert time.monotonic() - started < 60, what
        assert [x.name for x in tmp_path.iterdir()] == ["file"], f"{what} ran"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100 * 2**20, f"{grown} bytes more than before"
    assert outcomes.count("error") >= 100
    assert outcomes.count("loaded") >= 20


def test_the_folder_of_a_model_is_told_from_a_sharded_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is the folder of a model, .* and no checkpoint"):
        read_checkpoint(tmp_path)
