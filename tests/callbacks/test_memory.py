"""What a fit will take is said before its first step, and refused where it is not there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lrcompress
from lrcompress.callbacks.memory import footprint_of
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
    callback = lrcompress.Factorize(keep=1.0, at=0.5, verbose=False, mask=None, targets=["*"])
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


PLANNED = """
import io, sys
sys.path.insert(0, {here!r})
import lightning as L
import lrcompress
import rich
from conftest import Loader, Tagger, sentences
from lrcompress.callbacks.dry_run import dry_run
from lrcompress.engine.footprint import footprint
from lrcompress.statistics.capture import Recorder

given = {{"keep": 0.5, "at": 0.4, "deal": True, "report_path": None}}
for callback in (lrcompress.Factorize(**given), lrcompress.LoSparse(init="kfac", **given)):
    run = L.Trainer(max_epochs=3, accelerator="cpu", devices=2, logger=False, strategy="ddp",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir={root!r}, callbacks=[callback])
    model = Tagger()
    dry_run(run, model, train_dataloaders=Loader(sentences()), val_dataloaders=Loader(sentences()))
    shown = io.StringIO()
    rich.print(callback.preview(model), file=shown)
    needed = callback._needed
    assert needed.lines[-1].strip()[:30] in shown.getvalue(), shown.getvalue()
    names = callback.settings_at(0).select(model).names
    every = Recorder(model, names, callback.sampling.kinds)
    alone = footprint(model, names, "kfac", every.nbytes, rate=1.0)
    assert needed.statistics == every.nbytes // 2, "of two blocks alike each process has one"
    assert needed.solutions == alone.solutions // 2
    assert needed.checkpoint == alone.weights + needed.optimizer + every.nbytes
print("ok")
"""


def test_a_plan_says_what_each_of_several_processes_takes(
    tmp_path: Path, launch: Callable[..., list[str]]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(PLANNED.format(here=str(Path(__file__).parent), root=str(tmp_path)))
    assert [said.splitlines()[-1] for said in launch(script, 2)] == ["ok", "ok"]


def test_layers_that_take_turns_are_said_with_what_the_host_holds(
    tagger: Make, loader: Make, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    callback = lrcompress.Factorize(keep=0.5, at=0.5, report_path=None, turns=2)
    before = footprint_of(tagger(), callback.settings[0], callback._observation, ())
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(callback).fit(tagger(), loader(), loader())
    (said,) = [r.getMessage() for r in caplog.records if "statistics" in r.getMessage()]
    line = said.splitlines()[2]
    assert re.fullmatch(
        r"  to observe: .* statistics at most, .* on the host; checkpoints .*", line
    )
    needed = callback._needed
    assert needed.on_host == 2 * needed.statistics > 0
    assert (before.statistics, before.on_host) == (needed.statistics, needed.on_host)


def test_what_observes_nothing_is_said_too(
    tagger: Make, loader: Make, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        svd = lrcompress.Factorize(keep=0.5, at=0.5, method="svd", report_path=None)
        trainer(svd).fit(tagger(), loader(), loader())
        sparse = lrcompress.LoSparse(keep=0.5, mask_every=2, report_path=None)
        trainer(sparse).fit(tagger(), loader(), loader())
    said = [r.getMessage() for r in caplog.records if "to compress: " in r.getMessage()]
    assert len(said) == 2


def test_what_losparse_adds_before_it_prunes_is_said(
    tagger: Make, loader: Make, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Full ranks beside the weights: of 16 × 32 and 32 × 16 features 768 more each."""
    callback = lrcompress.LoSparse(
        keep=0.5, initial_rank=1.0, low_rank_share=0.5, mask_every=2, report_path=None
    )
    model = tagger()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(callback).fit(model, loader(), loader())
    (said,) = [r.getMessage() for r in caplog.records if "to prune: " in r.getMessage()]
    assert said.splitlines()[-1] == "  to prune: 0.0 MiB more of all these"
    # four layers of as many; with AdamW four values of each
    assert callback._needed.grown == pytest.approx(4 * 768 * 4 * 4, rel=0.01)
