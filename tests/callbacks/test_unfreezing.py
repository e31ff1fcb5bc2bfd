"""Fits in which Lightning's BackboneFinetuning unfreezes the layers that are factored."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch.optim import AdamW

import lrcompress
from lrcompress.errors import LayerError
from lrcompress.nn import FactoredLinear
from tests.callbacks.conftest import Loader, Tagger, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]
Make = Callable[..., Any]


class Backbone(Tagger):
    """The tagger, whose blocks are a backbone; its optimizer begins with the head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self._modules.pop("blocks")

    @property
    def blocks(self) -> Any:
        return self.backbone

    def configure_optimizers(self) -> Any:
        return AdamW(self.head.parameters(), lr=0.01)


def model() -> Backbone:
    L.seed_everything(0, verbose=False)
    return Backbone()


def callbacks(kind: str, *, first: bool, unfreeze: int = 1) -> list[L.Callback]:
    options: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
    options |= {"targets": ["backbone.*"], "every_n_steps": 1}
    if kind == "losparse":
        prune: dict[str, Any] = {"mask_every": 2, "prune_until": "step:15", "fix_at": "step:16"}
        ours: L.Callback = lrcompress.LoSparse(0.5, at="epoch:2", **prune, **options)
    else:
        ours = lrcompress.Factorize(0.5, at="epoch:2", storage=kind, **options)
    theirs = BackboneFinetuning(unfreeze_backbone_at_epoch=unfreeze, backbone_initial_lr=0.005)
    return [ours, theirs] if first else [theirs, ours]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["balanced", "pivoted", "losparse"])
def test_layers_that_are_unfrozen_are_factored_trained_and_resumed(
    kind: str, first: bool, trainer: Make, tmp_path: Path
) -> None:
    whole = model()
    run = trainer(*callbacks(kind, first=first), every_step=True, max_epochs=4)
    run.fit(whole, Loader(sentences()))
    factored = [m for m in whole.modules() if isinstance(m, FactoredLinear)]
    assert len(factored) >= 3
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert all(id(p) in held for m in factored for p in m.parameters())
    assert all(p.requires_grad for m in factored for p in m.parameters())

    # of the last step of an epoch, Lightning's own hook is not called as the next one begins
    for step in (2, 8, 14, 17, 20):
        again = model()
        run = trainer(*callbacks(kind, first=first), max_epochs=4)
        run.fit(again, Loader(sentences()), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again.state_dict().keys() == whole.state_dict().keys()
        for name, value in again.state_dict().items():
            assert value.equal(whole.state_dict()[name]), (step, name)


def test_the_names_that_lightning_keeps_are_those_of_the_new_structure(trainer: Make) -> None:
    one = model()
    run = trainer(*callbacks("pivoted", first=False), max_epochs=4)
    run.fit(one, Loader(sentences()))
    (theirs,) = (x for x in run.callbacks if isinstance(x, BaseFinetuning))
    ((groups),) = theirs.state_dict()["internal_optimizer_metadata"].values()
    named = dict(one.named_parameters())
    for group, kept in zip(run.optimizers[0].param_groups, groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(named[name]) for name in kept["params"]]


def test_what_is_never_unfrozen_is_told_when_it_is_to_be_observed(trainer: Make) -> None:
    steps: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)

    message = re.escape("'backbone.0.up' is frozen: its factors would not be trained; unfreeze it")
    with pytest.raises(LayerError, match=message):
        trainer(Count(), *callbacks("balanced", first=True, unfreeze=3), max_epochs=4).fit(
            model(), Loader(sentences())
        )
    assert steps == list(range(1, 7))  # the window begins after the first epoch
    frozen = model()
    frozen.backbone.requires_grad_(False)
    ours = callbacks("balanced", first=True)[0]
    with pytest.raises(LayerError, match=message):  # without such a callback, before training
        trainer(ours, max_epochs=4).fit(frozen, Loader(sentences()))


def test_what_was_frozen_stays_so(trainer: Make, tmp_path: Path) -> None:
    """A resumed run trains what the checkpoint's did, and no more."""

    class Keep(BackboneFinetuning):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            super().finetune_function(pl_module, epoch, optimizer)
            pl_module.head.bias.requires_grad_(False)

    def run(**kwargs: Any) -> Backbone:
        one = model()
        ours = callbacks("balanced", first=True)[0]
        theirs = Keep(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.005)
        trainer(ours, theirs, max_epochs=4, every_step=not kwargs).fit(
            one, Loader(sentences()), **kwargs
        )
        return one

    run()
    again = run(ckpt_path=tmp_path / "step=14.ckpt")
    assert not again.head.bias.requires_grad
    assert all(p.requires_grad for p in again.backbone.parameters())

    # a checkpoint that does not say what was frozen, as those of before, unfreezes nothing
    path = tmp_path / "step=14.ckpt"
    saved = torch.load(path, weights_only=True)
    (ours,) = (x for name, x in saved["callbacks"].items() if name.startswith("Factorize"))
    del ours["frozen"]
    torch.save(saved, path)
    assert not any(p.requires_grad for p in run(ckpt_path=path).backbone.parameters())
