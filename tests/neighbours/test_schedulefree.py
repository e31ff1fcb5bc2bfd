"""Schedule-free optimizers: the averages are factored, and averaging begins anew from factors."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import schedulefree
import torch

import lrcompress
from lrcompress.errors import PlatformError
from lrcompress.nn import LowRankLinear, PivotedLinear
from tests.callbacks.conftest import Loader, Tagger, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:Attribute 'optimizer' removed from hparams"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"verbose": False, "report_path": None}
KINDS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, foreach=False),
    "adamw foreach": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, weight_decay=0.1),
    "radam": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.01),
    "sgd": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Free(Tagger):
    """As the documentation of schedulefree wants it: train() to step, eval() to validate."""

    def __init__(self, optimizer: Callable[[Any], Any]) -> None:
        super().__init__(dropout=0.0)
        self.make = optimizer

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def on_train_start(self) -> None:
        self.optimizers().optimizer.train()  # type: ignore[union-attr]

    def on_validation_epoch_start(self) -> None:
        self.optimizers().optimizer.eval()  # type: ignore[union-attr]

    def on_validation_epoch_end(self) -> None:
        self.optimizers().optimizer.train()  # type: ignore[union-attr]


class Forgetful(Free):
    """Validates as it trains."""

    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...


class Look(L.Callback):
    """Copies weights and state as they are after a change, before the next step."""

    def on_structure_change(self, trainer: L.Trainer, module: L.LightningModule, _: Any) -> None:
        (self.optimizer,) = trainer.optimizers
        state = {n: self.optimizer.state[p] for n, p in module.named_parameters()}
        self.weights = {n: p.detach().clone() for n, p in module.named_parameters()}
        self.state = {n: {k: v.clone() for k, v in one.items()} for n, one in state.items()}


def model(kind: str, of: type[Free] = Free) -> Free:
    L.seed_everything(0, verbose=False)
    return of(KINDS[kind])


def dense(kind: str, trainer: Make, steps: int, of: type[Free] = Free) -> tuple[Free, Any]:
    """The model and its optimizer after some steps, with the averages as weights."""
    made = model(kind, of)
    run = trainer(max_steps=steps, max_epochs=-1)
    run.fit(made, Loader(sentences()))
    (optimizer,) = run.optimizers
    optimizer.eval()
    return made, optimizer


@pytest.mark.parametrize("validate", [True, False])
@each_kind
def test_averages_are_factored_and_state_is_carried(
    kind: str, validate: bool, trainer: Make
) -> None:
    before, optimizer = dense(kind, trainer, 6)
    look, made = Look(), model(kind)
    ours = lrcompress.Factorize(
        keep=0.5, at="epoch:1", method="svd", validate=validate, refit_bias=False, **QUIET
    )
    trainer(look, ours, max_epochs=2).fit(made, Loader(sentences()), Loader(sentences(2)))
    weights = dict(before.named_parameters())
    factored = [name for name, m in made.named_modules() if isinstance(m, LowRankLinear)]
    assert len(factored) >= 2
    for name in factored:
        right, left = (look.weights[f"{name}.{side}.weight"] for side in ("right", "left"))
        u, s, v = torch.linalg.svd(weights[f"{name}.weight"].detach().double())
        rank = len(right)
        torch.testing.assert_close(left @ right, (u[:, :rank] * s[:rank] @ v[:rank]).float())
        for side, value in (("right", right), ("left", left)):
            assert look.state[f"{name}.{side}.weight"]["z"].equal(value)
        if kind != "sgd":
            was = optimizer.state[weights[f"{name}.weight"]]["exp_avg_sq"]
            now = look.state[f"{name}.right.weight"]["exp_avg_sq"]
            torch.testing.assert_close(now, left.square().mT @ was)
    for name in ("embed.weight", "head.weight"):
        torch.testing.assert_close(look.weights[name], weights[name].detach())
        assert look.state[name]["z"].equal(look.weights[name])
    (group,) = look.optimizer.param_groups
    assert group["k"] == 12  # steps go on, or second moments would count as few
    assert group["train_mode"]


@each_kind
def test_validation_at_a_point_is_of_the_averages(kind: str, trainer: Make) -> None:
    before, _ = dense(kind, trainer, 6, Forgetful)
    (told,) = trainer().validate(before, Loader(sentences(2)), verbose=False)
    ours = lrcompress.Factorize(keep=0.5, at="epoch:1", method="svd", **QUIET)
    trainer(ours, max_epochs=2).fit(
        model(kind, Forgetful), Loader(sentences()), Loader(sentences(2))
    )
    (record,) = ours.report.points
    assert record.metrics["before"]["val_loss"] == pytest.approx(told["val_loss"], rel=1e-5)


@each_kind
def test_a_run_resumed_at_any_step_ends_as_the_uninterrupted_one(
    kind: str, trainer: Make, tmp_path: Path
) -> None:
    def run(**kwargs: Any) -> Free:
        made = model(kind)
        ours = lrcompress.Factorize(
            keep=0.5, at="step:4", every_n_steps=1, storage="pivoted", **QUIET
        )
        trainer(ours, max_epochs=2, every_step=not kwargs).fit(made, Loader(sentences()), **kwargs)
        return made

    whole = run()
    assert any(isinstance(m, PivotedLinear) for m in whole.modules())
    for step in (2, 4, 5, 8):
        again = run(ckpt_path=tmp_path / f"step={step}.ckpt").state_dict()
        for name, value in whole.state_dict().items():
            assert again[name].equal(value), (step, name)


def test_keep_auto_tries_and_goes_on_with_averages(trainer: Make) -> None:
    ours = lrcompress.Factorize(
        keep="auto", drop=10.0, monitor="val_loss", at="epoch:1", every_n_steps=1, **QUIET
    )
    made = model("adamw")
    run = trainer(ours, max_epochs=2)
    run.fit(made, Loader(sentences()), Loader(sentences(2)))
    assert any(isinstance(m, LowRankLinear) for m in made.modules())
    (optimizer,) = run.optimizers
    assert optimizer.param_groups[0]["train_mode"]
    for parameter in made.parameters():
        assert optimizer.state[parameter]["z"].shape == parameter.shape


@pytest.mark.parametrize(
    ("callback", "kind", "message"),
    [
        (
            lrcompress.LoSparse(keep=0.5, **QUIET),
            KINDS["adamw"],
            "LoSparse cannot follow the averages that AdamWScheduleFree keeps; use one that is not",
        ),
        (
            lrcompress.DSEE(keep=1, updates=["*.up"], **QUIET),
            KINDS["sgd"],
            "DSEE cannot follow the averages that SGDScheduleFree keeps; use one that is not",
        ),
        (
            lrcompress.Factorize(keep=0.5, **QUIET),
            lambda p: schedulefree.AdamWScheduleFreeReference(p),
            "the averages that AdamWScheduleFreeReference keeps; use AdamWScheduleFree, RAdam",
        ),
        (
            lrcompress.Factorize(keep=0.5, **QUIET),
            lambda p: schedulefree.AdamWScheduleFreeClosure(p),
            "the averages that AdamWScheduleFreeClosure keeps; use AdamWScheduleFree, RAdam",
        ),
    ],
)
def test_what_cannot_follow_is_refused_before_training(
    callback: L.Callback, kind: Callable[[Any], Any], message: str, trainer: Make
) -> None:
    with pytest.raises(PlatformError, match=re.escape(message)):
        trainer(callback).fit(Free(kind), Loader(sentences()))
