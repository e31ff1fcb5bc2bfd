"""Files that appear whole, and what is said of those that are not."""

from pathlib import Path

import pytest
import torch

from lrcompress.errors import CheckpointError
from lrcompress.files import atomic_write
from lrcompress.structure.checkpoint import read_lightning_checkpoint


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with atomic_write(path) as passing:
        passing.write_text("first")
        assert not path.exists()
    with pytest.raises(TypeError), atomic_write(path) as passing:
        passing.write_bytes(b"half of the sec") / "x"
    with pytest.raises(OSError, match=r"^\[Errno 28\] full: '.*new/file'$"), atomic_write(path):
        raise OSError(28, "full")
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("file", "first")]


@pytest.mark.parametrize(
    "held", [{"state_dict": {"a": torch.ones(1)}, "epoch": 2}, {"a": torch.ones(1)}]
)
def test_a_checkpoint_or_a_state_dict_is_read(held: dict[str, object], tmp_path: Path) -> None:
    torch.save(held, tmp_path / "a.ckpt")
    read = read_lightning_checkpoint(tmp_path / "a.ckpt")
    assert read["state_dict"]["a"] == 1
    assert read.get("epoch") == held.get("epoch")
    torch.save({"model": {"a": torch.ones(1)}, "optimizer_0": {}}, tmp_path / "b.ckpt")
    assert read_lightning_checkpoint(tmp_path / "b.ckpt")["state_dict"]["a"] == 1


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(CheckpointError, match=r"a\.ckpt cannot be read .*: there is no such file"):
        read_lightning_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match=r"a\.ckpt must hold a mapping, got list"):
        read_lightning_checkpoint(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of Lightning: it has no state_dict"):
        read_lightning_checkpoint(path)
    torch.save({"state_dict": {"a": torch.ones(1000)}}, path)
    data = path.read_bytes()
    for length in (0, 1, 10, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cannot be read .*, it may be cut short: .+"):
            read_lightning_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"first: python -m torch\.\S+ dcp_to_torch \S+ \S+$"):
        read_lightning_checkpoint(tmp_path)
    (tmp_path / "zero_to_fp32.py").touch()
    command = r"first: python -c .*convert_zero_checkpoint_to_fp32_state_dict as convert; convert\("
    with pytest.raises(CheckpointError, match=command):
        read_lightning_checkpoint(tmp_path)
