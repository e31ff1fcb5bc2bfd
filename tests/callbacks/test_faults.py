"""An error at any hook: nothing is left behind, and a resumed run ends as one without it."""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lrcompress
from lrcompress.callbacks.warmup import _RATES

Make = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:.*did not reach point"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
HOOKS = [
    *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    *("on_before_zero_grad", "on_train_batch_end", "on_validation_start"),
    *("on_validation_batch_end", "on_validation_end", "on_train_epoch_end"),
    *("on_save_checkpoint", "on_train_end", "on_fit_end"),
]
OPTIONS: dict[str, Any] = {"verbose": False, "report_path": None}
SEEN: dict[str, Any] = OPTIONS | {"at": "step:4", "window": "step:4", "every_n_steps": 1}
RUNS: dict[str, Callable[[], L.Callback]] = {
    "factorize": lambda: lrcompress.Factorize(
        0.5, storage="pivoted", restart_steps=3, fisher="model", logits="head", **SEEN
    ),
    "losparse": lambda: lrcompress.LoSparse(
        0.5, init="kfac", mask_every=1, prune_until="step:6", fix_at="step:7", **SEEN
    ),
    "dsee": lambda: lrcompress.DSEE(
        keep=0.5, rank=2, entries=4, updates=["*.up"], prune_at="step:4", **OPTIONS
    ),
    "embedding": lambda: lrcompress.FactorizeEmbedding(
        keep=None, rank=8, targets=["embed"], method="low_rank", **SEEN
    ),
}


class FaultError(Exception):
    """What another callback raises."""


class Fails(L.Callback):
    """Counts every hook, and raises at one call of one."""

    def __init__(self, hook: str = "", call: int = 0) -> None:
        self.calls: Counter[str] = Counter()
        for name in HOOKS:
            setattr(self, name, self._made(name, hook, call))

    def _made(self, name: str, hook: str, call: int) -> Callable[..., None]:
        def counted(*_: Any, **__: Any) -> None:
            self.calls[name] += 1
            if name == hook and self.calls[name] == call:
                raise FaultError(f"{hook}, call {call}")

        return counted


def left_behind(run: L.Trainer, model: nn.Module) -> list[str]:
    """What an interrupted fit must not leave: hooks, patches, stances."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found = [
        f"{kind} of {n}" for n, m in model.named_modules() for kind in kinds if getattr(m, kind)
    ]
    found += [f"forward of {n}" for n, m in model.named_modules() if "forward" in vars(m)]
    found += [f"hooks of {n}" for n, p in model.named_parameters() if p._backward_hooks]
    for kind in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        found += [kind for optimizer in run.optimizers if getattr(optimizer, kind)]
    state = {
        "a restart": bool(_RATES),
        "torch's fast path is off": not torch.backends.mha.get_fastpath_enabled(),
        "torch compiles nothing": torch._dynamo.eval_frame._stance.stance != "default",
    }
    return found + [what for what, is_left in state.items() if is_left]


@pytest.fixture
def begin(
    tagger: Make, loader: Make, trainer: Make, batches: Make, tmp_path: Path
) -> Callable[..., tuple[L.Trainer, nn.Module]]:
    """Fit 8 steps of 2 epochs until the fault; return the trainer and the module."""

    def fit(
        kind: str, fails: Fails, *, first: bool, save: bool = False, ckpt_path: Path | None = None
    ) -> tuple[L.Trainer, nn.Module]:
        model, ours = tagger(), RUNS[kind]()
        order = [fails, ours] if first else [ours, fails]
        run = trainer(*order, every_step=save, max_epochs=2)
        with suppress(FaultError):
            run.fit(model, loader(batches(4)), loader(batches(1)), ckpt_path=ckpt_path)
        return run, model

    return fit


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("kind", RUNS)
def test_an_error_at_any_hook_leaves_nothing_behind(
    kind: str, first: bool, begin: Make, batches: Make, tmp_path: Path
) -> None:
    whole = Fails()
    _, ended = begin(kind, whole, first=first, save=True)
    assert set(whole.calls) == set(HOOKS)
    (batch,) = batches(1)
    for hook in HOOKS:
        most = whole.calls[hook]
        ends = {1, most} if "train_batch" in hook else set()
        for call in sorted({most // 2 + 1} | ends):
            if hook == "on_save_checkpoint":
                continue  # only where something is saved, below
            where = f"{hook}, call {call} of {most}"
            run, model = begin(kind, Fails(hook, call), first=first)
            assert not left_behind(run, model), where
            assert model.eval()(batch).isfinite().all(), where
            copy.deepcopy(model)  # nothing of a run hangs on to it

    expected = ended.state_dict()
    for hook in ("on_train_batch_start", "on_before_optimizer_step", "on_save_checkpoint"):
        for path in tmp_path.glob("*.ckpt"):
            path.unlink()
        run, model = begin(kind, Fails(hook, 6), first=first, save=True)
        assert not left_behind(run, model), hook
        last = max(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
        _, again = begin(kind, Fails(), first=first, ckpt_path=last)
        assert again.state_dict().keys() == expected.keys(), hook
        assert all(x.equal(expected[name]) for name, x in again.state_dict().items()), hook
