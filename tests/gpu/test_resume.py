"""Runs on the card that are interrupted end as those that are not, dropout and all."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lrcompress.callbacks.trainer_state import rng_state, set_rng_state

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))
from short_runs import RUNS

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_resumed_bit_for_bit_in_deterministic_mode(
    card: Any, tmp_path: Path, name: str
) -> None:
    """Also that nothing of the package is refused by ``Trainer(deterministic=True)``."""
    given = {"enable_checkpointing": True, "precision": "bf16-mixed", "deterministic": True}
    whole, run = card.fit(name, tmp_path, saving(tmp_path / "one"), **given)
    for step in (2, 6):  # within the window, and after the point
        path = tmp_path / "one" / f"step={step}.ckpt"
        again, other = card.fit(
            name, tmp_path, saving(tmp_path / str(step)), ckpt_path=path, **given
        )
        torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
        for one, two in zip(
            run.optimizers[0].state.values(), other.optimizers[0].state.values(), strict=True
        ):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_dropout_is_drawn_on_the_card(card: Any, tmp_path: Path) -> None:
    """Else the test above would show nothing of the card's random numbers."""
    ends = []
    for number in (0, 0, 1):
        model, _ = card.fit("svd", tmp_path, number=number, deterministic=True)
        ends.append(model.state_dict()["head.weight"].cpu())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_the_random_state_is_that_of_the_process_and_its_own_device(card: Any) -> None:
    def drawn(*places: object) -> list[list[float]]:
        return [torch.rand(3, device=place).tolist() for place in places]

    own, others = ("cpu", card.device), card.others()
    torch.manual_seed(1)
    saved, first = rng_state(), drawn(*own)
    assert all(state.device.type == "cpu" for state in saved.values())
    torch.manual_seed(2)
    untouched = drawn(*others)
    torch.manual_seed(2)
    set_rng_state(saved)
    assert drawn(*own) == first
    assert drawn(*others) == untouched


@pytest.mark.parametrize("name", ["kfac", "losparse", "dsee", "embedding low_rank"])
def test_a_checkpoint_of_the_card_is_resumed_on_a_cpu(card: Any, tmp_path: Path, name: str) -> None:
    folder = saving(tmp_path / "card")
    card.fit(name, tmp_path, folder, enable_checkpointing=True, dropout=0.0)
    for step in (2, 6):
        path = tmp_path / "card" / f"step={step}.ckpt"
        here = {"accelerator": "cpu", "strategy": "auto"}
        model, run = card.fit(name, tmp_path, ckpt_path=path, dropout=0.0, **here)
        assert run.global_step == 8
        wanted = torch.load(
            tmp_path / "card" / "step=8.ckpt", map_location="cpu", weights_only=False
        )["state_dict"]
        torch.testing.assert_close(dict(model.state_dict()), dict(wanted), rtol=1e-3, atol=1e-4)
