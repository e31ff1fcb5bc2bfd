"""Runs on the stand-in device that are interrupted end as those that are not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lrcompress.callbacks.trainer_state import rng_state, set_rng_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.mark.parametrize("name", ["kfac", "losparse", "dsee", "distilled", "embedding low_rank"])
def test_a_run_is_resumed_bit_for_bit(device: SimpleNamespace, tmp_path: Path, name: str) -> None:
    def saving(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(
            tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1,
            save_on_train_epoch_end=False,
        )  # fmt: skip

    given = {"enable_checkpointing": True, "precision": "bf16-mixed"}
    whole, run = device.fit(name, tmp_path, saving("one"), **given)
    for step in (2, 6):  # within the window, and after the point
        path = tmp_path / "one" / f"step={step}.ckpt"
        again, other = device.fit(name, tmp_path, saving(str(step)), ckpt_path=path, **given)
        for one, two in ((whole, again), (run.optimizers[0], other.optimizers[0])):
            same(one.state_dict(), two.state_dict())


def same(one: Any, other: Any) -> None:
    """Check that two states are equal, whatever they are made of."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            same(*pair)
    else:
        assert one == other


def drawn(*places: object) -> list[list[float]]:
    return [torch.rand(3, device=place).tolist() for place in places]


def test_the_random_state_is_that_of_the_process_and_its_own_device(
    device: SimpleNamespace,
) -> None:
    places = ("cpu", device.DEVICE, device.OTHER)
    torch.manual_seed(1)
    saved, first = rng_state(), drawn(*places)
    torch.manual_seed(2)
    untouched = drawn(device.OTHER)
    torch.manual_seed(2)
    set_rng_state(saved)
    assert drawn(*places) == [*first[:2], *untouched]


@pytest.mark.parametrize("visible", [0, 1, 2])
def test_states_of_all_devices_that_earlier_versions_saved_are_understood(
    device: SimpleNamespace, visible: int
) -> None:
    torch.manual_seed(1)
    states = [torch.vgpu.get_rng_state(place) for place in (device.DEVICE, device.OTHER)]
    saved = {"cpu": torch.get_rng_state(), "vgpu": states[:visible], "cuda": []}
    first = drawn("cpu", device.OTHER)
    torch.manual_seed(2)
    untouched = drawn(device.OTHER)
    torch.manual_seed(2)
    torch.vgpu.set_device(device.OTHER)
    try:
        set_rng_state(saved)
    finally:
        torch.vgpu.set_device(device.DEVICE)
    # of fewer devices than now, this one has no state there and goes on
    assert drawn("cpu", device.OTHER) == (first if visible == 2 else [first[0], *untouched])
