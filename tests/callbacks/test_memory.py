"""What a fit will take is said before its first step, and refused where it is not there."""

import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lrcompress
from lrcompress.errors import PlatformError

Make = Callable[..., Any]


class Wide(L.LightningModule):
    """A layer whose weight is small and whose input moment no machine has room for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2_000_000, 1)])

    def training_step(self, batch: Tensor) -> Tensor:
        raise AssertionError("trained, though it has to end before")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_no_machine_has_is_refused_before_the_first_step(trainer: Make) -> None:
    callback = lrcompress.Factorize(keep=0.5, at=0.5, verbose=False, mask=None, targets=["*"])
    data = torch.utils.data.DataLoader(torch.zeros(4, 8))  # type: ignore[arg-type]
    with pytest.raises(PlatformError) as raised:
        trainer(callback).fit(Wide(), data)
    said = str(raised.value)
    assert said.startswith("Factorize would take about ")
    assert "GiB on cpu, which has" in said
    assert "statistics 7" in said  # thousand GiB: one triangle of two million squared
    way_out = "several processes with deal=True, solve_device='cpu', or offload='cpu' for the "
    assert said.endswith(way_out + "statistics")


def test_it_is_said_when_training_starts(
    tagger: Make, loader: Make, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    callback = lrcompress.Factorize(keep=0.5, at=0.5, report_path=None)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(callback).fit(tagger(), loader(), loader())
    (said,) = [r.getMessage() for r in caplog.records if "statistics" in r.getMessage()]
    head, train, observe, compress = said.splitlines()
    assert head == "lrcompress: memory of a process, about:"
    assert re.fullmatch(r"  to train: [\d.]+ MiB weights, .* gradients, .* opt.*", train)
    assert re.fullmatch(r"  to observe: .* statistics at most; checkpoints are .* then", observe)
    assert compress.endswith(" on the host for results; takes 1 s")
    assert all(len(line) <= 80 for line in said.splitlines())


def test_of_a_table_the_statistics_alone_are_said(
    tagger: Make, loader: Make, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    callback = lrcompress.FactorizeEmbedding(keep=0.5, at=0.5, report_path=None)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(callback).fit(tagger(), loader(), loader())
    assert "lrcompress: statistics take at most 0 MiB of memory" in caplog.messages


@pytest.mark.parametrize(
    "callback",
    [
        lambda: lrcompress.Factorize(keep=0.5, at=0.5, method="svd", solve_device="xpu:7"),
        lambda: lrcompress.Factorize(keep=0.5, at=0.5, offload="xpu:7"),
        lambda: lrcompress.LoSparse(keep=0.5, solve_device="xpu:7"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_the_first_step(
    tagger: Make, loader: Make, trainer: Make, callback: Make
) -> None:
    run = trainer(callback())
    with pytest.raises(PlatformError, match=r"='xpu:7': torch finds no such device here"):
        run.fit(tagger(), loader(), loader())
    assert run.global_step == 0
