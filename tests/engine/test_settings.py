"""Settings that are checked when they are made; most are in test_compress.py, where they act."""

import pytest
import torch
from rich.console import Console
from torch import nn

from lrcompress.engine.compress import compress
from lrcompress.engine.settings import Settings
from lrcompress.errors import PlatformError, SettingError
from lrcompress.report.tables import point_table


def test_tokens_to_measure_at_are_known_or_given() -> None:
    assert Settings(method="svd", keep_measured=True, measured_tokens=5).measured_tokens == 5
    assert Settings(method="drone", keep_measured=True).measured_tokens is None
    for given in (0, 2.5, True):
        with pytest.raises(SettingError, match="measured_tokens must be a whole number from 1"):
            Settings(measured_tokens=given)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"'svd' observes no steps .* give measured_tokens="):
        Settings(method="svd", keep_measured=True)


def test_a_storage_is_known_and_fits_the_method() -> None:
    assert Settings(storage="pivoted").storage == "pivoted"
    with pytest.raises(SettingError, match="storage must be one of balanced, pivoted, got 'rows'"):
        Settings(storage="rows")
    with pytest.raises(SettingError, match="got 'pivot'; nearest: 'pivoted'"):
        Settings(storage="pivot")
    with pytest.raises(SettingError, match="got 'Global'; nearest: 'global'"):
        Settings(allocation="Global")
    with pytest.raises(SettingError, match="got 'lowrank'; nearest: 'low_rank'"):
        Settings(narrow_blocks="lowrank")
    with pytest.raises(SettingError, match=r"storage='pivoted' .* which method 'kronecker' does"):
        Settings(method="kronecker", storage="pivoted")


def test_layers_are_measured_at_the_tokens_of_a_step() -> None:
    tiny = [nn.Linear(8, 8) for _ in range(100)]
    model = nn.Sequential(nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 8), *tiny)
    batches = [torch.randn(count, 1024) for count in (60, 68)]
    record = compress(
        model,
        batches,
        lambda model, batch: model(batch).square().mean(),
        method="drone",
        targets=["*"],
        align=1,
        keep=0.3,
        keep_measured=True,
    )
    wide, *others = record.layers
    staying = [layer for layer in others if "stays as it is" in layer.note]
    assert staying
    assert all(layer.rank is None for layer in staying)
    assert all(layer.note.endswith("× its time at 64 tokens") for layer in staying)
    assert wide.rank is not None
    assert "stays" not in wide.note
    assert record.note.startswith("128 tokens were observed of layers with up to 1,024 inputs")
    assert record.keep <= 0.3


def test_a_keep_that_is_missed_is_in_the_report() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    settings = {"method": "svd", "keep": 0.5, "keep_measured": True, "measured_tokens": 4}
    record = compress(model, [], lambda model, batch: model(batch).mean(), **settings)
    assert [layer.rank for layer in record.layers] == [None, None]
    console = Console(width=150, color_system=None)
    with console.capture() as capture:
        console.print(point_table(record))
    assert "keep=0.5 is missed, 1.000 remains: 2 of 2 layers" in capture.get()
    assert "2: stays as it is: a rank of 4 takes" in capture.get()


@pytest.mark.parametrize("given", ["gpu", 1.5])
def test_a_device_is_one_of_torch(given: object) -> None:
    with pytest.raises(SettingError, match=f"solve_device must be a device .* got {given!r}"):
        Settings(solve_device=given)  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_refused_before_anything_is_observed() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    settings = {"targets": ["*"], "keep": 0.5, "solve_device": "xpu:7"}
    with pytest.raises(PlatformError, match=r"solve_device='xpu:7': torch finds no such device"):
        compress(model, [], lambda *_: torch.zeros(()), **settings)


def test_another_method_shares_ranks_out_as_it_does_by_default() -> None:
    narrowed = Settings(allocation="global", narrow_blocks=True, keep=0.5)
    assert narrowed.of_method("kfac") is narrowed
    other = narrowed.of_method("row_fisher")
    assert (other.method, other.spread, other.narrow_blocks) == ("row_fisher", "global", True)
    plain = narrowed.of_method("drone")  # which knows no predicted loss
    assert (plain.method, plain.spread, plain.narrow_blocks) == ("drone", "uniform", False)
    with pytest.raises(SettingError, match="drone"):
        narrowed.of_method("dron")
