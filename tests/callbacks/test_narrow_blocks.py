"""Narrowed feed-forward blocks in real fits: several points, resume, processes, folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import lrcompress
from lrcompress.errors import SettingError
from lrcompress.nn import NarrowLowRank, PrunedLinear
from tests.architectures.matrix import check_reloads
from tests.architectures.models import batch_for, made

from .test_factorize import hooks, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
]
Make = Callable[..., Any]
MADE = (
    "lrcompress.Factorize(keep=[0.7, 0.4], at=['epoch:1', 0.7], every_n_steps=1, align=1, "
    "narrow_blocks=True, report_path=None, verbose=False)"
)
LOW_RANK = MADE.replace("narrow_blocks=True", "narrow_blocks='low_rank'").replace("0.4]", "0.2]")


def narrow_layers(model: torch.nn.Module) -> dict[str, PrunedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PrunedLinear)}


def test_a_fine_tune_comes_out_narrower_at_each_point(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model, callback = tagger(), eval(MADE)
    before = sum(p.numel() for p in model.parameters())
    run = trainer(callback)
    run.fit(model, loader(), loader())
    layers = narrow_layers(model)
    assert len(layers) >= 2
    first, second = callback.report.points
    assert second.model_after == sum(p.numel() for p in model.parameters())
    assert second.model_after < first.model_after < before
    assert (first.keep, second.keep) == pytest.approx((0.7, 0.4), abs=0.05)
    assert "feed-forward blocks narrowed" in second.note
    was = {x.name: x.narrow for x in first.layers}
    for layer in second.layers:
        if layer.narrow:
            assert layer.narrow[0] <= (was[layer.name] or (32,))[0]
            assert layers[layer.name].weight.numel() == layer.after
    assert hooks(model) == 0
    (optimizer,) = run.optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    for name, layer in layers.items():  # each in the group that its parameter was in
        assert any(layer.weight is p for p in optimizer.param_groups[0]["params"]), name
        assert any(layer.bias is p for p in optimizer.param_groups[1]["params"]), name


def test_a_run_resumed_at_any_step_ends_bit_identical(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    whole = tagger()
    trainer(eval(MADE), every_step=True).fit(whole, loader(), loader())
    assert narrow_layers(whole)
    saved = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    assert len(saved) == 18
    for path in saved[:-1]:
        model = tagger(width=16)
        trainer(eval(MADE)).fit(model, loader(), loader(), ckpt_path=path)
        assert same(model, whole), path.name


def test_low_rank_on_top_is_trained_and_stored_as_pivoted_rows(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    callback = eval(LOW_RANK.replace("align=1", "align=1, storage='pivoted'"))
    run = trainer(callback)
    run.fit(model, loader(), loader())
    both = {n: m for n, m in model.named_modules() if isinstance(m, NarrowLowRank)}
    assert both
    assert {layer.kind for layer in both.values()} == {"narrow_pivoted"}
    first, second = callback.report.points
    assert (first.keep, second.keep) == pytest.approx((0.7, 0.2), abs=0.05)
    assert second.model_after == sum(p.numel() for p in model.parameters())
    for layer in (x for x in second.layers if x.name in both):
        assert layer.after == sum(p.numel() for p in both[layer.name].factors)
    (optimizer,) = run.optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_run_with_low_rank_on_top_resumes_bit_identical(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    whole = tagger()
    trainer(eval(LOW_RANK), every_step=True).fit(whole, loader(), loader())
    assert any(isinstance(m, NarrowLowRank) for m in whole.modules())
    saved = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    for path in saved[1:-1:3]:
        model = tagger(width=16)
        trainer(eval(LOW_RANK)).fit(model, loader(), loader(), ckpt_path=path)
        assert same(model, whole), path.name


SCRIPT = """
import os, sys
sys.path.insert(0, {here!r})
import lightning as L
import torch
import lrcompress
from conftest import Loader, Tagger, sentences

number = int(os.environ["RANK"])
for name, make in {runs!r}.items():
    torch.manual_seed(0)
    model, callback = Tagger(dropout=0.0), eval(make)
    run = L.Trainer(max_epochs=3, accelerator="cpu", devices=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, strategy="ddp", callbacks=[callback])
    given = sentences()
    if not callback.sampling.deal:
        given = [{{k: v[number::2] for k, v in b.items()}} for b in given]
    run.fit(model, Loader(given), Loader(given))
    torch.save({{"model": model.state_dict(), "optimizer": run.optimizers[0].state_dict(),
                 "plan": lrcompress.Plan.of(model).to_dict()}}, f"{root}/{{name}} {{number}}.pt")
"""


def test_two_processes_end_alike_and_as_one_would(
    tagger: Make, loader: Make, trainer: Make, launch: Make, tmp_path: Path
) -> None:
    runs = {"summed": MADE, "dealt": MADE.replace("align=1", "align=1, deal=True")}
    runs |= {
        f"{name} low rank": make.replace("narrow_blocks=True", "narrow_blocks='low_rank'")
        for name, make in runs.items()
    }
    script = tmp_path / "script.py"
    here = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(here=here, root=str(tmp_path), runs=runs))
    launch(script, 2)
    for name, make in runs.items():
        one, other = (torch.load(tmp_path / f"{name} {number}.pt") for number in range(2))
        assert one["plan"] == other["plan"]
        for side in ("model", "optimizer"):
            torch.testing.assert_close(one[side], other[side], rtol=0, atol=0)
        torch.manual_seed(0)
        model = tagger(dropout=0.0)
        trainer(eval(make)).fit(model, loader(), loader())
        kinds = {x["kind"] for x in one["plan"]["layers"]}
        assert "narrow_low_rank" in kinds if "low rank" in name else "narrow" in kinds
        assert one["plan"] == lrcompress.Plan.of(model).to_dict()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(one["model"][key], value, rtol=5e-3, atol=5e-4)


def test_layers_cannot_be_measured_alone() -> None:
    with pytest.raises(SettingError, match="measure_layers=True puts dense layers back one by one"):
        lrcompress.Factorize(keep=0.5, narrow_blocks=True, measure_layers=True)
    with pytest.raises(SettingError, match="which method 'svd' does not know"):
        lrcompress.Factorize(keep=0.5, narrow_blocks=True, method="svd")


def test_a_preview_says_that_blocks_are_found_later(tagger: Make) -> None:
    console = Console(width=200)
    with console.capture() as shown:
        console.print(eval(MADE).preview(tagger()))
    assert "feed-forward blocks are found in the first step that is looked at" in shown.get()


def reloaded_and_merged(architecture: str, model: nn.Module, folder: Path) -> nn.Module:
    """Check that a model is saved, loaded and merged as it is; return it merged."""
    check_reloads(architecture, model.eval(), folder)
    batch = batch_for(model)
    with torch.no_grad():
        before = model(**batch).logits
        merged = lrcompress.merge_dense(model)
        torch.testing.assert_close(merged(**batch).logits, before, rtol=1e-3, atol=1e-4)
    return merged


@pytest.mark.parametrize("architecture", ["BERT", "GPT-2", "Llama", "T5", "BART", "ViT"])
def test_narrow_models_are_saved_reloaded_and_merged(architecture: str, tmp_path: Path) -> None:
    model = made(architecture)
    record = lrcompress.compress(
        model,
        [batch_for(model)],
        lambda model, batch: model(**batch).loss,
        keep=0.6,
        align=1,
        narrow_blocks=True,
        mask="attention_mask" if architecture != "ViT" else None,
    )
    assert narrow_layers(model), record.note
    merged = reloaded_and_merged(architecture, model, tmp_path)
    assert not narrow_layers(merged)
    assert "narrow" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("architecture", "keep"), [("BERT", 0.3), ("GPT-2", 0.1), ("Llama", 0.3)])
def test_models_with_low_rank_on_top_are_saved_reloaded_and_merged(
    architecture: str, keep: float, tmp_path: Path
) -> None:
    model = made(architecture)
    lrcompress.compress(
        model,
        [batch_for(model)],
        lambda model, batch: model(**batch).loss,
        keep=keep,
        align=1,
        narrow_blocks="low_rank",
        storage="pivoted",
    )
    assert any(isinstance(m, NarrowLowRank) for m in model.modules())
    merged = reloaded_and_merged(architecture, model, tmp_path)
    assert not len(lrcompress.Plan.of(merged))
    assert "narrow pivoted" in (tmp_path / "README.md").read_text()
