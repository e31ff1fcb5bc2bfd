"""keep="auto" in real processes: one decides, all end alike, killed runs are resumed."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress  # noqa: F401  which the runs are made of

from .test_ddp import assert_same, write

Make = Callable[..., Any]
QUIET: dict[str, Any] = {"verbose": False, "report_path": None}
RUN = (
    "lrcompress.Factorize(keep='auto', at=[0.3, 0.6], drop=0.02, monitor={monitor!r}, "
    "monitor_mode='min', every_n_steps=2, align=1, {more}**QUIET)"
)
RUNS = {
    "loss": RUN.format(monitor="val_loss", more=""),
    "bold": RUN.format(monitor="missing", more=""),
    "bold dealt": RUN.format(monitor="missing", more="deal=True, "),
}
BODY = """
class Bold(Tagger):
    "What is lost does not come back: the first point is put right at the second."
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        left = sum(p.numel() for p in self.blocks.parameters() if p.ndim > 1) / 2048
        self.log("missing", (1 - left) * 0.1)

def model_of(name, seed=0):
    L.seed_everything(seed + 1000 * number, verbose=False)
    torch.manual_seed(seed)
    model = (Bold if name.startswith("bold") else Tagger)(dropout=0.0)
    torch.manual_seed(1000 * number)
    return model

def told(callback):
    points = callback.report.points
    trials = [{{"trials": [vars(y) for y in x.search.trials]}} for x in points]
    return [(x.step, x.keep, x.note, vars(x.search) | y) for x, y in zip(points, trials)]

def fit(name, folder, ckpt_path=None, seed=0, killed=False):
    model, callback = model_of(name, seed), eval(runs[name])
    run = trainer(callback, *([Kill()] if killed else []), every_step=f"{{root}}/{{folder}}",
                  default_root_dir=f"{{root}}/{{folder}}")
    run.callbacks.sort(key=lambda one: isinstance(one, Kill))
    run.fit(model, Loader(parts()), Loader(parts()), ckpt_path=ckpt_path)
    torch.save(kept(run, model) | {{"told": told(callback)}}, f"{{root}}/{{folder}} {{number}}.pt")

class Kill(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 8:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

runs = {runs!r}
"""
WHOLE = (
    BODY
    + """
for name in runs:
    fit(name, name)
fit("bold dealt", "killed", killed=True)
"""
)
RESUMED = (
    BODY
    + """
fit("bold dealt", "killed", ckpt_path=f"{{root}}/killed/step=8.ckpt", seed=5)
"""
)


def test_two_processes_search_alike_and_as_one_does(
    tagger: Make, loader: Make, trainer: Make, launch: Make, tmp_path: Path
) -> None:
    launch(write(tmp_path, WHOLE, runs=RUNS), 2, *[-signal.SIGKILL] * 2)
    ends = {}
    for name in RUNS:
        first, second = (torch.load(tmp_path / f"{name} {i}.pt") for i in range(2))
        assert_same(first, second)
        assert first["plan"]["layers"]
        ends[name] = first
        assert not list((tmp_path / name).glob("lrcompress*"))
    for name in ("bold", "bold dealt"):
        (_, keep, _, _), (_, later, note, _) = ends[name]["told"]
        assert keep == pytest.approx(0.6, abs=0.02)
        assert later == pytest.approx(0.8, abs=0.02)
        assert "went back to the state of before point 1" in note

    # each process validates half of every batch: their mean is the figure of one
    callback = eval(RUNS["loss"])
    trainer(callback).fit(tagger(dropout=0.0), loader(), loader())
    for (step, _, _, search), one in zip(ends["loss"]["told"], callback.report.points, strict=True):
        assert step == one.step
        assert one.search is not None
        assert search["reference"] == pytest.approx(one.search.reference, abs=2e-3)
        pairs = zip(search["trials"], one.search.trials, strict=False)
        for trial, alone in list(pairs)[:1]:
            assert trial["keep"] == alone.keep
            assert trial["value"] == pytest.approx(alone.value, abs=2e-3)

    # a killed run is resumed, and goes back as the one that was not
    assert (tmp_path / "killed" / "lrcompress-before-point-1.pt").is_file()
    launch(write(tmp_path, RESUMED, runs=RUNS), 2)
    for number in range(2):
        resumed = torch.load(tmp_path / f"killed {number}.pt")
        assert_same(resumed, torch.load(tmp_path / f"bold dealt {number}.pt"))
