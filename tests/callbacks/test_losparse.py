"""LoSparse in real fits: what it computes, what it leaves behind, and how it is resumed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

import lrcompress
from lrcompress.errors import CheckpointError, LayerError, SettingError
from lrcompress.nn import LowRankLinear, LowRankSparseLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
]
Make = Callable[..., Any]
LATE = {"at": "epoch:1", "every_n_steps": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "kfac, one budget": {"init": "kfac", "low_rank_share": "auto", **LATE},
    "kfac": {"init": "kfac", **LATE},
    "falling rank": {"initial_rank": 0.5},
    "one budget of scores": {"initial_rank": 0.5, "low_rank_share": "auto"},
    "low rank alone": {"low_rank_share": 1.0},
    "uncertainty": {"beta2": 0.9, "row_score": "group"},
    "entries": {"granularity": "entries"},
    "revived": {"revive": True, "fix_at": "step:14"},
    "longer fixed": {"fix_at": "step:14"},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))


def losparse(**kwargs: Any) -> lrcompress.LoSparse:
    defaults: dict[str, Any] = {"keep": 0.4, "mask_every": 2, "verbose": False}
    defaults["report_path"] = None
    return lrcompress.LoSparse(**(defaults | kwargs))


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Watch(L.Callback):
    """Sees every step, before its batch and just before the optimizer's step."""

    def __init__(self, look: Callable[[L.Trainer, int], None]) -> None:
        self.look = look

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        self.look(trainer, trainer.global_step)


def split_layers(module: nn.Module) -> dict[str, LowRankSparseLinear]:
    return {n: m for n, m in module.named_modules() if isinstance(m, LowRankSparseLinear)}


@pytest.mark.parametrize(("tokens", "told"), [(40, True), (1000, False)])
def test_too_few_tokens_are_told_by_a_split_that_rests_on_them(
    tokens: int, told: bool, tagger: Make, loader: Make, trainer: Make
) -> None:
    callback = losparse(init="kfac", at="epoch:1", every_n_steps=1, max_tokens=tokens)
    trainer(callback).fit(tagger(), loader())
    (point,) = callback.report.points
    observed = point.observed["tokens"]
    few = f"{observed} tokens were observed of layers with up to 32 inputs"
    assert point.note.startswith(few) == told == (observed < 4 * 32)


@each_variant
def test_a_fine_tune_ends_with_what_was_asked_for(
    options: dict[str, Any], tagger: Make, loader: Make, trainer: Make
) -> None:
    model, callback = tagger(), losparse(**options)
    before = sum(p.numel() for p in model.parameters())
    run = trainer(callback)
    run.fit(model, loader(), loader())

    (point,) = callback.report.points
    assert len(point.layers) == 4
    assert point.model_before == before
    after = sum(p.numel() for p in model.parameters())
    if options.get("granularity") == "entries":
        after = sum(int(p.count_nonzero()) for p in model.parameters())
        assert after == pytest.approx(
            point.model_before - 2048 + sum(x.after for x in point.layers), abs=40
        )
    else:
        assert point.model_after == after == before - 2048 + sum(x.after for x in point.layers)
    largest_unit = 48
    assert 0.4 * 2048 - largest_unit < sum(x.after for x in point.layers) <= 0.4 * 2048
    assert callback.report.final.keys() == {"val_loss"}
    assert hooks(model) == 0
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert set(map(id, run.optimizers[0].state)) <= held


@each_variant
def test_a_run_resumed_at_any_step_ends_bit_identical(
    options: dict[str, Any], tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    whole = tagger()
    trainer(losparse(**options), every_step=True).fit(whole, loader(), loader())
    saved = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    assert len(saved) == 18

    for path in saved[:-1]:
        torch.manual_seed(123)
        model = tagger()
        torch.rand(int(path.stem[5:]))
        trainer(losparse(**options)).fit(model, loader(), loader(), ckpt_path=path)
        assert same(model, whole), path.name


def test_with_keep_1_the_run_is_a_dense_fine_tune_of_the_split_model(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    trainer(losparse(keep=1.0, low_rank_share=0.2, fix_at="step:17"), max_steps=18).fit(
        model, loader()
    )
    kinds = {type(m) for n, m in model.named_modules() if n.endswith((".up", ".down"))}
    assert kinds == {nn.Linear}  # at keep 1 nothing else is as small

    def last(trainer: L.Trainer, step: int) -> None:
        if step == 16:
            module = trainer.lightning_module
            found.append({n: module.get_submodule(n).weight.clone() for n in names})

    names = [f"blocks.{i}.{side}" for i in (0, 1) for side in ("up", "down")]
    found: list[dict[str, Tensor]] = []
    callback = losparse(keep=1.0, low_rank_share=0.2, fix_at="step:17")
    trainer(callback, Watch(last)).fit(tagger(), loader())
    by_hand = tagger()
    for name in names:
        dense = by_hand.get_submodule(name)
        m, n = dense.weight.shape
        rank = math.ceil(0.2 * m * n / (m + n))
        u, s, vh = torch.linalg.svd(dense.weight.detach().double(), full_matrices=False)
        new = LowRankSparseLinear.in_place_of(dense, rank)
        with torch.no_grad():
            new.left.weight.copy_(u[:, :rank] * s[:rank].sqrt())
            new.right.copy_(s[:rank].sqrt()[:, None] * vh[:rank])
            new.rows.copy_(dense.weight - new.left.weight @ new.right)
        by_hand.set_submodule(name, new)
    trainer(Watch(last)).fit(by_hand, loader())
    for name in names:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-4, rtol=1e-3)


class ByHand:
    """The paper's algorithm once more, over plain tensors beside a run of 18 steps."""

    begin, end, dense, budget = 2, 11, 2048, math.floor(0.4 * 2048)

    def __init__(self) -> None:
        self.window: dict[str, list[Tensor]] = {}
        self.average: dict[str, Tensor] = {}
        self.expected: dict[int, dict[str, Tensor]] = {}
        self.found: dict[int, dict[str, Tensor]] = {}

    def look(self, trainer: L.Trainer, step: int) -> None:
        if step >= self.end:  # compacted
            return
        layers = split_layers(trainer.lightning_module)
        self.found[step] = {n: layer.kept[layer.rank :].clone() for n, layer in layers.items()}
        for name, layer in layers.items():
            gradient = layer.inner.weight.grad[layer.rank :]
            rows = [
                torch.stack([(w * g).abs() for w, g in zip(row, by, strict=True)])
                for row, by in zip(layer.rows.detach(), gradient, strict=True)
            ]
            self.window.setdefault(name, []).append(torch.stack(rows))
        if len(next(iter(self.window.values()))) == 2:
            for name, seen in self.window.items():
                mean = torch.stack(seen).mean(0)
                before = self.average.get(name, torch.zeros_like(mean))
                self.average[name] = 0.85 * before + 0.15 * mean
            self.window.clear()
            self.expected[step + 1] = self.kept(layers, step + 1)

    def kept(self, layers: dict[str, LowRankSparseLinear], step: int) -> dict[str, Tensor]:
        final = (self.budget - sum(x.rank * 48 for x in layers.values())) / self.dense
        done = min(1.0, max(0.0, (step - self.begin) / (self.end - self.begin)))
        share = final + (1 - final) * (1 - done) ** 3
        if step < self.begin:
            share = 1.0
        ranked = sorted(
            (
                (float(self.average[name].mean(1)[row]), name, row)
                for name, layer in layers.items()
                for row in range(layer.num_rows)
                if layer.kept[layer.rank + row]
            ),
            reverse=True,
        )
        kept = {n: torch.zeros(x.num_rows, dtype=torch.bool) for n, x in layers.items()}
        spent = 0
        for _, name, row in ranked:
            spent += layers[name].in_features
            if spent > share * self.dense + 1e-6:
                break
            kept[name][row] = True
        return kept


def test_what_stays_is_what_the_definition_says(tagger: Make, loader: Make, trainer: Make) -> None:
    by_hand = ByHand()
    trainer(losparse(beta1=0.85), Watch(by_hand.look)).fit(tagger(), loader())
    steps = by_hand.expected.keys() & by_hand.found.keys()
    assert len(steps) >= 4
    for step in steps:
        for name, kept in by_hand.expected[step].items():
            assert torch.equal(by_hand.found[step][name], kept), (step, name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_importance_is_that_of_the_whole_batch_before_clipping(
    accumulate: int, tagger: Make, batches: Make, loader: Make, trainer: Make
) -> None:
    whole = batches()
    parts = [
        {key: value[i::accumulate] for key, value in batch.items()}
        for batch in whole
        for i in range(accumulate)
    ]
    scores = []
    for given, count, clip in ((whole, 1, None), (parts, accumulate, 0.01)):
        model = tagger(lr=0.0, dropout=0.0)
        callback = losparse(prune_from="step:14", prune_until="step:15")
        found: list[Any] = []

        def look(
            trainer: L.Trainer, step: int, callback: Any = callback, found: list[Any] = found
        ) -> None:
            if step == 5:
                found.append({k: v.clone() for k, v in callback._pruner.importance._mean.items()})

        run = trainer(Watch(look), callback, accumulate_grad_batches=count, gradient_clip_val=clip)
        run.fit(model, loader(given))
        scores.append(found[0])
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score, rtol=2e-2, atol=1e-7)


def test_loss_scaling_does_not_change_importance(tagger: Make, loader: Make, trainer: Make) -> None:
    scores = []
    for scaled in (False, True):
        callback = losparse(prune_from="step:14", prune_until="step:15")
        found: list[Any] = []

        def look(
            trainer: L.Trainer, step: int, callback: Any = callback, found: list[Any] = found
        ) -> None:
            if step == 5:
                found.append({k: v.clone() for k, v in callback._pruner.importance._mean.items()})

        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        precision = (
            {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]} if scaled else {}
        )
        trainer(Watch(look), callback, **precision).fit(tagger(lr=0.0, dropout=0.0), loader())
        scores.append(found[0])
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score, rtol=0.05, atol=1e-6)


def test_a_fused_optimizer_leaves_gradients_scaled_and_importance_is_not(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model, callback = tagger(lr=0.0, dropout=0.0), losparse(prune_until="step:2")
    factors: list[float] = []

    def look(trainer: L.Trainer, step: int) -> None:
        optimizer = trainer.optimizers[0]
        factors.append(lrcompress.callbacks.trainer_state.gradient_factor(trainer, optimizer))

    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    half = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer(Watch(look), callback, plugins=[half], max_steps=3, max_epochs=1).fit(model, loader())
    assert factors == [1 / 512] * 3


def test_what_is_pruned_stays_at_zero_with_its_optimizer_state(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    pruned = []

    def look(trainer: L.Trainer, step: int) -> None:
        state = trainer.optimizers[0].state
        for layer in split_layers(trainer.lightning_module).values():
            gone = ~layer.kept
            assert layer.inner.weight[gone].count_nonzero() == 0
            assert layer.inner.weight.grad[gone].count_nonzero() == 0
            for value in state.get(layer.inner.weight, {}).values():
                if value.ndim:
                    assert value[gone].count_nonzero() == 0
            pruned.append(int(gone.sum()))

    trainer(losparse(), Watch(look)).fit(tagger(), loader())
    assert max(pruned) > 5


def test_the_scheduler_and_the_optimizer_object_stay(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    rates = []

    def look(trainer: L.Trainer, step: int) -> None:
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        assert len(trainer.optimizers[0].param_groups) == 2

    trainer(losparse(), Watch(look)).fit(tagger(), loader())
    assert rates == pytest.approx([0.01 * 0.97**step for step in range(18)])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_any_precision(precision: str, tagger: Make, loader: Make, trainer: Make) -> None:
    model, callback = tagger(), losparse()
    trainer(callback, precision=precision).fit(model, loader(), loader())
    assert callback.report.points[0].keep == pytest.approx(0.4, abs=0.03)
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in model.parameters()} == {expected}


def test_a_compiled_module(tagger: Make, loader: Make, trainer: Make) -> None:
    plain = tagger(dropout=0.0)
    trainer(losparse()).fit(plain, loader())
    model = tagger(dropout=0.0)
    model.forward = torch.compile(model.forward, backend="eager")
    trainer(losparse()).fit(model, loader())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=1e-5, rtol=1e-4)


def test_manual_optimization(tagger: Make, loader: Make, trainer: Make) -> None:
    model, callback = tagger(), losparse()
    model.automatic_optimization = False
    step = model.training_step

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = model.optimizers()
        optimizer.zero_grad()
        model.manual_backward(step(batch, batch_idx))
        optimizer.step()

    model.training_step = training_step
    trainer(callback).fit(model, loader())
    assert callback.report.points[0].keep == pytest.approx(0.4, abs=0.03)


def test_weights_alone_give_the_structure_back(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    model = tagger()
    trainer(losparse(), every_step=True).fit(model, loader(), loader())
    for step in (5, 18):  # while pruning, and compacted
        fresh = tagger()
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        lrcompress.restore_structure(fresh, checkpoint)
        fresh.load_state_dict(checkpoint["state_dict"])
    assert same(fresh, model)


def test_the_report_and_the_plan_are_shown(
    tagger: Make, loader: Make, trainer: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    callback = losparse(verbose=True, at="epoch:1", report_path=str(path))
    trainer(callback).fit(tagger(), loader(), loader())
    shown = capsys.readouterr().out
    assert "LoSparse at step" in shown
    assert "rows" in shown
    assert "what was lost and gained" in shown
    report = lrcompress.Report.from_dict(__import__("json").loads(path.read_text()))
    assert report.to_dict() == callback.report.to_dict()
    assert set(report.seconds_per_step) == {"dense", "pruning", "factored"}
    assert report.points[0].metrics["before"].keys() == {"val_loss"}


def test_a_run_shorter_than_one_window_is_pruned_by_what_was_seen(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    callback = losparse(mask_every=100)
    trainer(callback).fit(tagger(), loader())
    assert callback.report.points[0].keep == pytest.approx(0.4, abs=0.03)


def test_preview_changes_nothing(tagger: Make) -> None:
    import rich

    model = tagger()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rich.print(losparse(low_rank_share="auto", init="kfac", at="epoch:1").preview(model))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# What cannot be done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep must be above 0 and at most 1 .* got 0"),
        ({"low_rank_share": 0}, r"low_rank_share must be above 0 and at most 1, or 'auto', got 0"),
        ({"low_rank_share": "atuo"}, r"low_rank_share must be .* or 'auto', got 'atuo'"),
        ({"low_rank_share": "auto"}, r"which method 'svd' does not know; use one of row_fisher"),
        ({"initial_rank": 1.5}, r"initial_rank is a share of the full rank.* got 1.5"),
        ({"row_score": "max"}, r"row_score must be one of mean, group, got 'max'"),
        ({"granularity": "columns"}, r"granularity must be one of rows, entries, got 'columns'"),
        ({"granularity": "entries", "low_rank_share": 1}, r"low_rank_share must be .* below 1"),
        ({"mask_every": 0}, r"mask_every must be a whole number from 1, got 0"),
        ({"beta1": 1.0}, r"beta1 must be from 0 to below 1, got 1.0"),
        ({"beta2": -0.1}, r"beta2 must be from 0 to 1 \(no uncertainty\), got -0.1"),
        ({"init": "kfca"}, r"method must be one of .*got 'kfca', nearest: kfac"),
        ({"window": 2}, r"window is a fraction .* did you mean 'epoch:2'"),
        ({"fix_at": "x"}, r"fix_at is a fraction .* got 'x'"),
        ({"at": 2}, r"a point is a fraction .* did you mean 'epoch:2'"),
    ],
)
def test_an_argument_outside_what_it_may_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        losparse(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prune_from": 0.5, "prune_until": 0.4},
            r"at step 0, prune_from 9, prune_until 7, fix_at 7 of 18",
        ),
        (
            {"at": "epoch:1", "prune_from": 0.1},
            r"at ≤ prune_from < prune_until ≤ fix_at < end.*got",
        ),
        ({"fix_at": 0.3}, r"phases must follow each other"),
        ({"prune_until": "epoch:3"}, r"point epoch:3 is step 18, at or beyond the end"),
        ({"init": "kfac"}, r"point 0 is step 0, which leaves no step to observe before it"),
        (
            {"keep": 0.05},
            r"keep=0.05 leaves 102 of 2,048.*one rank and no row in each of 4.*take 192",
        ),
        ({"targets": ["blocks.9"]}, r"pattern 'blocks.9' matches none"),
    ],
)
def test_a_schedule_or_a_budget_that_cannot_be(
    options: dict[str, Any], message: str, tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    with pytest.raises((SettingError, LookupError), match=message):
        trainer(losparse(**options)).fit(model, loader())
    assert not split_layers(model)
    assert hooks(model) == 0


def test_the_same_layer_cannot_be_factored_twice(tagger: Make, loader: Make, trainer: Make) -> None:
    other = lrcompress.Factorize(
        keep=0.5, at=0.5, method="svd", targets=["blocks.0.*"], report_path=None
    )
    with pytest.raises(
        SettingError, match=r"LoSparse and Factorize both target layer 'blocks.0.down'"
    ):
        trainer(losparse(), other).fit(tagger(), loader())
    model = tagger()
    trainer(losparse(exclude=["blocks.0.*"]), other).fit(model, loader())
    assert isinstance(model.blocks[0]["up"], LowRankLinear)


def test_a_factored_layer_is_no_start(tagger: Make, loader: Make, trainer: Make) -> None:
    model = tagger()
    name = "blocks.0.up"
    model.set_submodule(name, LowRankLinear.in_place_of(model.get_submodule(name), 4))
    with pytest.raises(
        LayerError, match=r"layer 'blocks.0.up' is factored already; LoSparse starts"
    ):
        trainer(losparse()).fit(model, loader())


def test_what_losparse_made_is_no_start_for_factorize(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    trainer(losparse()).fit(model, loader())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    again = lrcompress.Factorize(keep=0.2, at=0.5, verbose=False, report_path=None)
    with pytest.raises(
        LayerError, match=r"layer 'blocks.0.up' is low rank plus sparse rows, which"
    ):
        trainer(again).fit(model, loader())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": 0.3}, r"after layers were split for keep=0.4, got keep=0.3; go on with the same"),
        ({"granularity": "entries"}, r"split for granularity='rows', got granularity='entries'"),
    ],
)
def test_a_budget_cannot_change_once_layers_are_split(
    changed: dict[str, Any],
    message: str,
    tagger: Make,
    loader: Make,
    trainer: Make,
    tmp_path: Path,
) -> None:
    trainer(losparse(), every_step=True).fit(tagger(), loader())
    with pytest.raises(SettingError, match=message):
        trainer(losparse(**changed)).fit(tagger(), loader(), ckpt_path=tmp_path / "step=6.ckpt")


def test_state_of_another_version(tagger: Make) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected LoSparse state of version 1, got version 9"
    ):
        losparse().load_state_dict({"version": 9})
