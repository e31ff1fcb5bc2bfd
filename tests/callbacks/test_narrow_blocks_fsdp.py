"""Narrowed feed-forward blocks under FSDP2, in real processes: as under DDP, and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .test_fsdp import assert_same

Make = Callable[..., Any]
MADE = (
    "lrcompress.Factorize(keep=[0.7, 0.3], at=['epoch:1', 0.7], every_n_steps=1, align=1, "
    "narrow_blocks=True, report_path=None, verbose=False, validate=False)"
)
LOW_RANK = MADE.replace("narrow_blocks=True", "narrow_blocks='low_rank'").replace("0.3]", "0.2]")
RUNS = {
    "narrow": MADE,
    "dealt": MADE.replace("align=1", "align=1, deal=True"),
    "low rank": LOW_RANK,
    "pivoted": LOW_RANK.replace("align=1", "align=1, deal=True, storage='pivoted'"),
}
SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from sharded_runs import *


def run(name, make, where, checkpoint=None, **resumed):
    strategy = fsdp(distributed=name == "dealt") if where == "fsdp" else where
    model = tagger(checkpoint=checkpoint, dropout=0.0, seed=5 if checkpoint else 0)
    callback = eval(make)
    save_to = None if resumed else "{root}/" + name + " " + where
    fit = trainer(callback, root={root!r}, save_to=save_to, every=7, strategy=strategy)
    fit.fit(model, loader(), loader(), **resumed)
    layers = [point.layers for point in callback.report.points]
    points = [[(x.name, x.narrow, x.rank, x.error) for x in one] for one in layers]
    end = kept(fit, model) | {{"points": points}}
    if where == "fsdp":
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        assert len([m for m in model.modules() if isinstance(m, FSDPModule)]) == 3
    if NUMBER == 0:
        step = " " + checkpoint.split("=")[-1][:-5] if checkpoint else ""
        torch.save(end, "{root}/" + name + " " + where + step + ".pt")


for name, make in {runs!r}.items():
    for where in ("ddp", "fsdp"):
        run(name, make, where)
    for step in (7, 14):  # between the points, and after them
        path = f"{root}/{{name}} fsdp/step={{step}}.ckpt"
        run(name, make, "fsdp", path, ckpt_path=path)
"""


def test_blocks_are_narrowed_as_under_ddp_and_a_resumed_run_ends_alike(
    launch: Make, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent), root=str(tmp_path), runs=RUNS))
    launch(script, 2)
    for name in RUNS:
        one, other = (torch.load(tmp_path / f"{name} {where}.pt") for where in ("ddp", "fsdp"))
        kinds = {layer["kind"] for layer in one["plan"]["layers"]}
        wanted = {"low rank": "narrow_low_rank", "pivoted": "narrow_pivoted"}.get(name, "narrow")
        assert wanted in kinds
        assert any(narrow for _, narrow, *_ in one["points"][0])
        assert one["optimizer"]
        assert_same(one, other)
        for step in (7, 14):
            again = torch.load(tmp_path / f"{name} fsdp {step}.pt")
            for part in ("model", "optimizer", "plan"):
                assert_same(again[part], one[part])
