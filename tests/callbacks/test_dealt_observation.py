"""Each process observes its own layers: the same statistics, in several processes and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.callbacks.observation import Observation
from lrcompress.callbacks.sampling import Sampling
from lrcompress.distributed import Processes
from lrcompress.engine.settings import Settings
from lrcompress.errors import SettingError
from lrcompress.objective import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks")

Make = Callable[..., Any]
MADE = (
    "lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=1, deal=True, verbose=False, "
    "allocation='uniform', also_observe=['weighted_moment', 'output_fisher'])"
)
SCRIPT = """
import os, sys
sys.path.insert(0, {here!r})
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
import lrcompress
import lrcompress.statistics.reduction
from conftest import Loader, Tagger, sentences

root, number = {root!r}, int(os.environ["RANK"])


def never(statistics, *args):
    assert not statistics.steps, "a statistic was reduced"

lrcompress.callbacks.observation.all_reduce_ = never
lrcompress.callbacks.observation.reduce_to_first_ = never


def fit(name, ckpt_path=None, same=True):
    callback, grabbed = {made}, []
    change = callback._change_model

    def first(*args):
        statistics = callback._observation.statistics
        grabbed.append(statistics.state_dict() | {{"bytes": statistics.nbytes}})
        change(*args)

    callback._change_model = first
    torch.manual_seed(0)
    model = Tagger(dropout=0.0)
    saving = ModelCheckpoint(f"{{root}}/{{name}}", "{{step}}", every_n_train_steps=1, save_top_k=-1,
                             save_on_train_epoch_end=False)
    run = L.Trainer(max_epochs=3, accelerator="cpu", devices=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, default_root_dir=root, strategy="ddp",
        callbacks=[callback, saving])
    given = [{{k: v if same else v[number::2] for k, v in b.items()}} for b in sentences()]
    run.fit(model, Loader(given), Loader(given), ckpt_path=ckpt_path)
    torch.save({{"seen": grabbed[0], "model": model.state_dict(),
                 "report": callback.report.to_dict(),
                 "plan": lrcompress.Plan.of(model).to_dict()}}, f"{{root}}/{{name}} {{number}}.pt")

fit("same")
fit("resumed", ckpt_path=f"{{root}}/same/step=7.ckpt")
fit("parts", same=False)

callback = lrcompress.LoSparse(keep=0.4, mask_every=2, init="kfac", at="epoch:1", every_n_steps=1,
                               low_rank_share="auto", deal=True, verbose=False, report_path=None)
torch.manual_seed(0)
model = Tagger(dropout=0.0)
run = L.Trainer(max_epochs=3, accelerator="cpu", devices=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    num_sanity_val_steps=0,
    use_distributed_sampler=False, default_root_dir=root, strategy="ddp", callbacks=[callback])
run.fit(model, Loader(sentences()), Loader(sentences()))
torch.save({{"plan": lrcompress.Plan.of(model).to_dict(), "model": model.state_dict()}},
           f"{{root}}/losparse {{number}}.pt")
"""


def test_dealt_statistics_are_those_of_one_process_that_sees_the_same_batches(
    tagger: Make, loader: Make, trainer: Make, launch: Make, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    fields = {"here": str(Path(__file__).parent), "root": str(tmp_path), "made": MADE}
    script.write_text(SCRIPT.format(**fields))
    launch(script, 2)

    callback, seen = eval(MADE), []
    change = callback._change_model

    def first(*args: Any) -> None:
        statistics = callback._observation.statistics
        seen.append(statistics.state_dict() | {"bytes": statistics.nbytes})
        change(*args)

    callback._change_model = first
    torch.manual_seed(0)
    model = tagger(dropout=0.0)
    trainer(callback).fit(model, loader(), loader())
    (whole,) = seen

    for name in ("same", "resumed"):
        both = [torch.load(tmp_path / f"{name} {i}.pt") for i in range(2)]
        found: dict[str, Any] = {"inputs": {}, "outputs": {}}
        for number, one in enumerate(both):
            for side, held in found.items():
                mine = one["seen"][side]
                assert mine, (side, number)
                assert not held.keys() & mine.keys()  # a layer in one process alone
                held |= mine
            assert one["seen"]["bytes"] <= 0.6 * whole["bytes"]
            assert one["report"]["points"][0]["observed"]["tokens"] == whole["counts"][2]
        for side, held in found.items():
            torch.testing.assert_close(held, dict(whole[side]), rtol=1e-4, atol=1e-6)
        assert both[0]["plan"] == both[1]["plan"] == lrcompress.Plan.of(model).to_dict()
        for key, value in both[0]["model"].items():
            assert torch.equal(value, both[1]["model"][key]), key
            torch.testing.assert_close(value, model.state_dict()[key], rtol=2e-3, atol=2e-4)
    note = both[0]["report"]["points"][0]["note"]
    assert note == "each layer was observed by one of 2 processes, on its own batches"

    # within the window, then one process alone, which observes all layers from there on
    alone = eval(MADE)
    path = tmp_path / "same" / "step=7.ckpt"
    trainer(alone).fit(tagger(dropout=0.0), loader(), loader(), ckpt_path=path)
    assert alone.report.points[0].observed["tokens"] == whole["counts"][2]
    assert [x.rank for x in alone.report.points[0].layers] == [
        x.rank for x in callback.report.points[0].layers
    ]
    for mine, theirs in zip(
        alone.report.points[0].layers, callback.report.points[0].layers, strict=True
    ):
        assert mine.error == pytest.approx(theirs.error, rel=1e-3)

    check_losparse(tagger, loader, trainer, tmp_path)


def check_losparse(tagger: Make, loader: Make, trainer: Make, tmp_path: Path) -> None:
    both = [torch.load(tmp_path / f"losparse {i}.pt") for i in range(2)]
    sparse = lrcompress.LoSparse(
        keep=0.4,
        mask_every=2,
        init="kfac",
        at="epoch:1",
        every_n_steps=1,
        low_rank_share="auto",
        verbose=False,
        report_path=None,
    )
    torch.manual_seed(0)
    pruned = tagger(dropout=0.0)
    trainer(sparse).fit(pruned, loader(), loader())
    assert both[0]["plan"] == both[1]["plan"] == lrcompress.Plan.of(pruned).to_dict()
    for key, value in pruned.state_dict().items():
        assert torch.equal(both[0]["model"][key], both[1]["model"][key]), key
        torch.testing.assert_close(both[0]["model"][key], value, rtol=2e-3, atol=2e-4)


def watched(deal: bool | None, index: int = 0, size: int = 2, sharded: bool = False) -> Observation:
    class Sharded(Processes):
        pass

    Sharded.sharded = sharded
    processes = Sharded(index, size)
    kinds = ("input_moment", "output_moment")
    fisher = "model" if sharded else "labels"
    sampling = Sampling(kinds=kinds, owner="Factorize", deal=deal, fisher=fisher)
    observation = Observation(sampling, processes)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    observation.watch(model, Settings(method="kfac", keep=0.5, targets=["*"]))
    return observation


def test_small_models_are_observed_by_all_and_large_ones_are_dealt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert watched(None).owner is None
    assert watched(False).owner is None
    assert watched(True, size=1).owner is None
    assert watched(True).owner is not None
    monkeypatch.setattr("lrcompress.callbacks.observation._DEALT_FROM", 100)
    assert watched(None).owner is not None


def test_more_steps_are_observed_where_layers_are_dealt() -> None:
    def steps(observation: Observation) -> int:
        return sum(observation.due(ahead, 100) for ahead in range(1, 101))

    assert steps(watched(False)) == 16  # every 6th
    assert steps(watched(True)) == 33  # every 3rd


def test_sharded_models_with_drawn_labels_are_not_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="deal=True with fisher='model' is not possible under"):
        watched(True, sharded=True)
    monkeypatch.setattr("lrcompress.callbacks.observation._DEALT_FROM", 100)
    assert watched(None, sharded=True).owner is None


class Block(torch.nn.Module):
    """Attention's and the feed-forward's layers of a Llama-type block, in modules of their own."""

    def __init__(self, width: int = 768, inner: int = 1536) -> None:
        super().__init__()
        square = {x: torch.nn.Linear(width, width, bias=False) for x in ("q", "k", "v", "o")}
        self.attention = torch.nn.ModuleDict(square)
        wide = {x: torch.nn.Linear(width, inner, bias=False) for x in ("gate", "up")}
        self.mlp = torch.nn.ModuleDict({**wide, "down": torch.nn.Linear(inner, width, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, m = self.attention, self.mlp
        x = x + a["o"](a["q"](x) * a["k"](x).sigmoid() + a["v"](x))
        return x + m["down"](m["gate"](x).relu() * m["up"](x))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("method", ["kfac", "drone"])
def test_bytes_of_a_process_are_six_tenths_of_its_share_of_full_squares(
    method: str, size: int
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block() for _ in range(4)))
    kinds = METHODS[method].kinds
    squares = 0
    for _, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            squares += 4 * layer.out_features**2 * (method == "kfac")
    squares += sum(
        4 * 4 * n**2 for n in (768, 768, 768, 1536)
    )  # inputs that are read by one or more
    for index in range(size):
        sampling = Sampling(kinds=kinds, owner="Factorize", deal=True, mask=None)
        observation = Observation(sampling, Processes(index, size))
        observation.watch(model, Settings(method=method, keep=0.5, targets=["*"]))
        x = torch.randn(4, 768)
        observation.open_step([x])
        loss = model(x).square().mean()
        observation.before_backward(loss, 1.0)
        loss.backward()
        observation.close_step()
        assert observation.statistics.nbytes <= 0.6 / size * squares
        assert observation.statistics.nbytes <= observation.nbytes
