"""Every callback in real fits on the card, in every precision, with every optimizer."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))
from short_runs import RUNS, Loader, callbacks, sentences, tagger

from conftest import Tagger

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step"),  # skipped steps
]


class Look(L.Callback):
    """Keeps the parameters, the optimizer's state and the scale that a fit ends with."""

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        states = (x for state in trainer.optimizers[0].state.values() for x in state.values())
        self.seen = [*module.state_dict().values(), *(x for x in states if x.ndim)]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scale = None if scaler is None else float(scaler.get_scale())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", RUNS)
def test_a_fit_ends_with_another_structure_and_finite_weights(
    card: Any, tmp_path: Path, name: str, precision: str
) -> None:
    look, dense = Look(), Tagger().state_dict().keys()
    model, run = card.fit(name, tmp_path, look, precision=precision)
    assert run.global_step == 8
    assert model.state_dict().keys() != dense or name == "dsee"
    assert {value.device for value in look.seen} == {card.device}
    assert all(bool(value.isfinite().all()) for value in look.seen)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["kfac", "row_fisher", "losparse", "dsee", "embedding low_rank"])
def test_a_fit_ends_as_on_the_cpu(card: Any, tmp_path: Path, name: str) -> None:
    card.needs("cuda", "standin", why="the CPU is what it is compared with")
    there, _ = card.fit(name, tmp_path, dropout=0.0)
    here = {"accelerator": "cpu", "strategy": "auto"}
    cpu, _ = card.fit(name, tmp_path, dropout=0.0, **here)
    mine, theirs = ({k: v.cpu() for k, v in one.state_dict().items()} for one in (cpu, there))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def optimized(kind: type, **settings: Any) -> type[Tagger]:
    """Return a tagger that is trained by another optimizer."""

    class Other(Tagger):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters(), lr=self.lr, **settings)

    return Other


@pytest.mark.parametrize("name", ["kfac", "dsee", "losparse"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(torch.optim.AdamW, {}), (torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9})],
)
def test_fused_optimizers_go_through_a_point_as_plain_ones(
    card: Any, tmp_path: Path, name: str, kind: type, settings: dict[str, Any]
) -> None:
    card.needs("cuda", "cpu", why="the stand-in has no fused kernels")
    ends = []
    for way in ({"fused": True}, {"foreach": False}):
        made = optimized(kind, **settings, **way)
        model, run = card.fit(name, tmp_path, kind=made, dropout=0.0)
        assert run.optimizers[0].param_groups[0]["fused"] is way.get("fused")
        ends.append({key: value.cpu() for key, value in model.state_dict().items()})
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["kfac", "losparse", "dsee"])
def test_steps_that_overflow_are_skipped_and_leave_no_trace(
    card: Any, tmp_path: Path, name: str, fused: bool
) -> None:
    """Two batches of the eight give a loss whose gradient is beyond float16 at any scale."""
    if fused:
        card.needs("cuda", why="the fused kernels ask the scaler themselves")

    class Overflowing(optimized(torch.optim.AdamW, fused=fused)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * (1e30 if batch_idx in (1, 5) else 1.0)

    class Watch(Look):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            self.before = [p.detach().clone() for p in module.parameters()]

        def on_train_batch_end(
            self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            pairs = zip(self.before, module.parameters(), strict=True)
            same = all(torch.equal(one, two) for one, two in pairs if one.shape == two.shape)
            self.still = [*getattr(self, "still", []), same]

    look = Watch()
    _, run = card.fit(name, tmp_path, look, kind=Overflowing, precision="16-mixed")
    assert all(bool(value.isfinite().all()) for value in look.seen)
    assert [step for step, same in enumerate(look.still) if same] == [1, 5]
    assert look.scale == run.precision_plugin.scaler._init_scale / 4


@pytest.mark.parametrize("given", [{"narrow_blocks": True}, {"fisher": "model", "logits": "head"}])
def test_options_of_a_point_run_in_deterministic_mode(
    card: Any, tmp_path: Path, given: dict[str, Any]
) -> None:
    """Beside the runs of test_resume.py, which take no options."""
    run = card.trainer(*callbacks("kfac", **given), default_root_dir=tmp_path, deterministic=True)
    model = tagger("kfac", tmp_path)
    run.fit(model, Loader(sentences(10)))
    assert model.state_dict().keys() != Tagger().state_dict().keys()
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
