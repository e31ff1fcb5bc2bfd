"""A distilled module in real fits: the student in everything but its loss."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn import functional as F

import lrcompress
from lrcompress.distill import Distilled, HiddenStates, Logits, Relations
from lrcompress.errors import (
    CheckpointError,
    NoMatchError,
    ObservationError,
    PlatformError,
    SettingError,
    ShapeError,
)

from .conftest import Encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Distilled never had a teacher"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None"),
    pytest.mark.filterwarnings("ignore:You are trying to .self.log.*barebones"),
    pytest.mark.filterwarnings("ignore:Distilled learns nothing from the teacher"),
]
Make = Callable[..., Any]


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


def everything() -> list[Any]:
    return [Logits(), HiddenStates(), Relations()]


def test_it_is_the_student_in_everything_else(
    reader: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    seen = []
    for distilled in (False, True):
        module = given = reader()
        if distilled:
            module = Distilled(given, teacher=reader(1), task=0.7)
            assert module is given
            assert isinstance(module, Distilled)
            assert isinstance(module, type(reader()))
        run = trainer()
        run.fit(module, loader(), loader())
        names = {name for name in run.callback_metrics if not name.startswith("distill_")}
        groups = [
            [len(group["params"]), group["weight_decay"], group["lr"]]
            for group in run.optimizers[0].param_groups
        ]
        hparams = dict(module.hparams), dict(module.hparams_initial)
        run.save_checkpoint(tmp_path / "it.ckpt")
        saved = torch.load(tmp_path / "it.ckpt", weights_only=True)
        results = run.validate(module, loader(), verbose=False)[0].keys()
        results |= run.test(module, loader(), verbose=False)[0].keys()
        again = type(reader()).load_from_checkpoint(tmp_path / "it.ckpt")
        assert type(again) is type(reader())
        assert same(again, module)
        keys = list(module.state_dict()), [n for n, _ in module.named_parameters()]
        kept = {key: value for key, value in saved.items() if key == "hyper_parameters"}
        seen.append((names, groups, hparams, kept, results, keys, list(saved["state_dict"])))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("teacher", ["start", "other"])
def test_with_weights_of_zero_it_trains_bit_identically(
    teacher: str, reader: Make, loader: Make, trainer: Make, start_at: Make
) -> None:
    plain = reader()
    trainer().fit(plain, loader())
    none = [Logits(weight=0.0), HiddenStates(weight=0), Relations(weight={"epoch:1": 0.0})]
    source = "start" if teacher == "start" else reader(1)
    module = Distilled(reader(), teacher=source, losses=none, task=1.0)
    torch.manual_seed(0)
    L.seed_everything(0, verbose=False)
    reader()  # draws what making the student drew
    trainer(start_at()).fit(module, loader())
    assert same(plain, module)


def test_the_loss_is_the_weighted_sum(
    reader: Make, batches: Make, loader: Make, trainer: Make
) -> None:
    """One step of plain SGD on the sum, computed by hand."""
    other, batch = reader(1).eval(), batches()[0]
    by_hand = reader(dropout=0.0)
    states: dict[str, list[Tensor]] = {"mine": [], "theirs": []}
    for key, one in (("mine", by_hand), ("theirs", other)):
        for layer in one.model.layers:
            layer.register_forward_hook(lambda m, a, out, key=key: states[key].append(out[0]))
    mine, theirs = by_hand.model(**batch), other.model(**batch)
    soft = F.kl_div(
        F.log_softmax(mine.logits / 4, -1), F.softmax(theirs.logits / 4, -1), reduction="batchmean"
    )
    real = batch["attention_mask"].bool()
    gaps = [
        ((s - t)[real].square().sum() / t[real].square().sum())
        for s, t in zip(states["mine"], states["theirs"], strict=True)
    ]
    loss = 0.25 * mine.loss + 0.5 * 16 * soft + 3 * sum(gaps) / 2
    loss.backward()
    wanted = {name: p.detach() - 0.1 * p.grad for name, p in by_hand.named_parameters()}

    module = Distilled(
        reader(dropout=0.0),
        teacher=reader(1),
        losses=[Logits(0.5, temperature=4.0), HiddenStates(3.0)],
        task=0.25,
    )
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    run = trainer(max_steps=1)
    run.fit(module, loader([batch]))
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter, wanted[name], atol=1e-6), name
    logged = run.callback_metrics
    assert logged.keys() == {
        "train_loss",
        "distill_task",
        "distill_logits",
        "distill_hidden_states",
    }
    assert float(logged["distill_logits"]) == pytest.approx(16 * float(soft.detach()), rel=1e-4)
    assert float(logged["distill_hidden_states"]) == pytest.approx(
        float(sum(gaps).detach() / 2), rel=1e-4
    )
    assert float(logged["distill_task"]) == pytest.approx(float(mine.loss.detach()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Distilled takes the model as it is at the first step")
def test_a_copy_of_the_student_has_nothing_to_teach(
    reader: Make, loader: Make, trainer: Make, start_at: Make
) -> None:
    module = Distilled(reader(dropout=0.0), losses=everything())
    run = trainer(start_at(0), max_steps=1)
    run.fit(module, loader())
    for name in ("logits", "hidden_states", "relations"):
        assert float(run.callback_metrics[f"distill_{name}"]) == pytest.approx(0, abs=1e-6)


def test_the_teacher_stays_outside_and_as_it_is(
    reader: Make, loader: Make, trainer: Make, start_at: Make, tmp_path: Path
) -> None:
    module = Distilled(reader(), losses=everything())
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            distillation = module._distillation
            if trainer.global_step == 3:
                seen["teacher"] = copy.deepcopy(distillation.teacher.module.state_dict())
            if trainer.global_step > 3:
                (optimizer,) = trainer.optimizers
                held = {id(p) for group in optimizer.param_groups for p in group["params"]}
                assert held == {id(p) for p in module.parameters()}
                theirs = list(distillation.teacher.module.parameters())
                assert not held & set(map(id, theirs))
                assert not any(p.requires_grad or p.grad is not None for p in theirs)
                assert not any(m.training for m in distillation.teacher.module.modules())
                assert hooks(distillation.teacher.module) == 0
                assert type(distillation.teacher.module) is type(reader())
                assert distillation.teacher.module._trainer is None

    run = trainer(start_at(), Watch(), every_step=True)
    run.fit(module, loader(), loader())
    now = module._distillation.teacher.module.state_dict()
    assert all(torch.equal(now[key], seen["teacher"][key]) for key in now)
    assert not same(module, module._distillation.teacher.module)
    module.train()
    assert not module._distillation.teacher.module.training
    saved = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys() == reader().state_dict().keys()
    assert saved["lrcompress_teacher"].keys() == {"version", "file", "hash"}
    assert hooks(module) == 0


def test_until_compression_starts_the_loss_is_the_student_s_own(
    reader: Make, loader: Make, trainer: Make, start_at: Make
) -> None:
    plain = reader()
    trainer(max_steps=3).fit(plain, loader())
    module = Distilled(reader(), losses=everything(), task=0.1)
    trainer(start_at(3), max_steps=3).fit(module, loader())
    assert same(plain, module)
    module = Distilled(reader(), losses=everything(), task=0.1)
    trainer(start_at(2), max_steps=3).fit(module, loader())
    assert not same(plain, module)


def test_a_teacher_that_was_never_fine_tuned_warns(
    reader: Make, loader: Make, trainer: Make, start_at: Make
) -> None:
    with pytest.warns(UserWarning, match="before any fine-tuning; let compression start later"):
        trainer(start_at(0), max_steps=2).fit(Distilled(reader()), loader())


@pytest.mark.filterwarnings("error:Distilled never had a teacher")
def test_a_fit_without_a_start_warns(reader: Make, loader: Make, trainer: Make) -> None:
    with pytest.warns(UserWarning, match="never had a teacher.*add one, or give teacher="):
        trainer().fit(Distilled(reader()), loader())


@pytest.mark.parametrize("weight", [0.0, {0: 0.0, "epoch:2": [0.0, 1.0]}])
def test_losses_that_never_count_warn(
    weight: Any, reader: Make, loader: Make, trainer: Make
) -> None:
    module = Distilled(reader(), teacher=reader(1), losses=[Logits(weight)])
    with pytest.warns(UserWarning, match="learns nothing from the teacher in this run"):
        trainer(max_epochs=2).fit(module, loader())


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_going_on_without_distillation_warns(
    reader: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    def factorize() -> lrcompress.Factorize:
        return lrcompress.Factorize(0.5, method="svd", at="step:2", verbose=False, validate=False)

    first = trainer(factorize(), every_step=True, max_steps=4)
    first.fit(Distilled(reader()), loader())
    with pytest.warns(UserWarning, match="goes on without its teacher; wrap it in lrcompress.Dist"):
        trainer(factorize(), max_steps=5).fit(
            reader(), loader(), ckpt_path=tmp_path / "step=4.ckpt"
        )


def test_weights_follow_their_schedules_and_cost_nothing_at_zero(
    reader: Make, loader: Make, trainer: Make
) -> None:
    calls, logged = [], []
    other = reader(1)
    other.model.register_forward_hook(lambda *_: calls.append(1))

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            logged.append((len(calls), {n for n in trainer.logged_metrics if "distill" in n}))
            calls.clear()

    losses = [HiddenStates(weight={"step:2": [1.0, 0.0]}), Logits(weight={"epoch:1": [0, 1.0]})]
    module = Distilled(reader(), teacher=other, losses=losses, task={"step:2": [0.0, 1.0]})
    trainer(Watch()).fit(module, loader())
    first, last = {"distill_task", "distill_hidden_states"}, {"distill_task", "distill_logits"}
    wanted = [(1, first)] * 2 + [(0, set())] * 2 + [(1, last)] * 4
    assert [count for count, _ in logged] == [count for count, _ in wanted]
    assert logged[0][1] == first
    assert logged[-1][1] >= last


def test_factorize_starts_it(reader: Make, loader: Make, trainer: Make) -> None:
    module = Distilled(reader(width=16), losses=everything())
    factorize = lrcompress.Factorize(
        keep=0.4, at=0.5, method="svd", align=1, verbose=False, report_path=None
    )
    run = trainer(factorize)
    run.fit(module, loader())
    assert len(lrcompress.Plan.of(module)) > 0
    teacher = module._distillation.teacher.module
    assert len(lrcompress.Plan.of(teacher)) == 0
    assert float(run.callback_metrics["distill_hidden_states"]) > 0
    assert hooks(module) == 0


def test_a_checkpoint_of_the_same_module_teaches_a_factored_student(
    reader: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    dense = reader(1, width=16)
    run = trainer(max_steps=2)
    run.fit(dense, loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    module = Distilled(reader(width=16), teacher=str(tmp_path / "dense.ckpt"), losses=everything())
    factorize = lrcompress.Factorize(
        keep=0.4, at=0.5, method="svd", align=1, verbose=False, report_path=None
    )
    trainer(factorize).fit(module, loader())
    assert same(module._distillation.teacher.module, dense)
    assert len(lrcompress.Plan.of(module)) > 0


def test_a_plain_module_teaches_by_itself(reader: Make, loader: Make, trainer: Make) -> None:
    runs = []
    for teacher in (reader(1), reader(1).model):
        module = Distilled(reader(), teacher=teacher, losses=everything())
        L.seed_everything(0, verbose=False)
        trainer().fit(module, loader())
        runs.append(module)
    assert same(*runs)


class SelfCalling(L.LightningModule):
    """Calls itself on a tuple, has a criterion, returns a dict, takes no batch index."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.ReLU())
        self.head = nn.Linear(width, 2)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor] | None:
        x, y = batch
        if float(x[0, 0]) > 2:
            return None
        return {"loss": self.criterion(self(x), y), "extra": y}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pairs(num: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(5, 4, generator=generator), torch.arange(5) % 2) for _ in range(num)]


@pytest.mark.parametrize("call", [None, ""])
def test_a_module_that_calls_itself(call: str | None, loader: Make, trainer: Make) -> None:
    outputs = []

    class Watch(L.Callback):
        def on_train_batch_end(self, t: L.Trainer, m: L.LightningModule, out: Any, *_: Any) -> None:
            outputs.append(out)

    losses = [Logits(), HiddenStates(layers=["body"])]
    module = Distilled(SelfCalling(), teacher=SelfCalling(), losses=losses, call=call, mask=None)
    run = trainer(Watch(), max_epochs=1)
    skipped = (torch.full((5, 4), 3.0), torch.zeros(5, dtype=torch.long))
    run.fit(module, loader([*pairs(), skipped]))
    assert outputs[0].keys() == {"loss", "extra"}
    assert not outputs[-1]
    assert float(run.callback_metrics["distill_hidden_states"]) > 0


def test_logits_of_a_submodule_by_name(loader: Make, trainer: Make) -> None:
    runs = []
    for kwargs in ({}, {"logits": "head"}, {"logits": "head", "call": ""}):
        torch.manual_seed(0)
        module = Distilled(SelfCalling(), teacher=SelfCalling(), mask=None, **kwargs)
        trainer(max_epochs=1).fit(module, loader(pairs()))
        runs.append(module)
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


class Calls(L.LightningModule):
    """Calls what it is told to."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 2)
        self.odd = Odd()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = [getattr(self, name)(batch[0]) for name in self.calls]
        found = [o["out"] if isinstance(o, dict) else o for o in outputs]
        return sum(o.square().sum() for o in found) if found else self.one.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x * self.weight}


@pytest.mark.parametrize(
    ("calls", "kwargs", "message"),
    [
        (["one", "two"], {}, r"made 2 that could: of 'one', 'two'; name one with call="),
        ([], {}, r"called no submodule whose output is a tensor or has .logits"),
        (["one", "one"], {"call": "one"}, r"one call of submodule 'one' .* called it 2 times"),
        (["two"], {"call": "one"}, r"called it no times; name another submodule with call="),
        (["odd"], {"call": "odd"}, r"call of 'odd' gives a dict without .logits; .* logits="),
    ],
)
def test_a_call_that_is_not_the_one_is_an_error_and_leaves_no_hook(
    calls: list[str], kwargs: dict[str, str], message: str, loader: Make, trainer: Make
) -> None:
    module = Distilled(Calls(calls), teacher=Calls(calls), mask=None, **kwargs)
    with pytest.raises(ObservationError, match=message):
        trainer().fit(module, loader(pairs()))
    assert hooks(module) == 0


@pytest.mark.parametrize("argument", ["call", "logits"])
def test_a_name_of_no_submodule_is_an_error(argument: str, loader: Make, trainer: Make) -> None:
    module = Distilled(Calls(["one"]), teacher=Calls(["one"]), mask=None, **{argument: "ones"})
    with pytest.raises(NoMatchError, match=r"='ones' names no submodule of .*nearest: one"):
        trainer().fit(module, loader(pairs()))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"losses": [HiddenStates(layers=["*.block.*"])]},
            NoMatchError,
            r"\*.block.* matches none",
        ),
        ({"losses": [HiddenStates(layers=["embed"])], "call": "model"}, NoMatchError, "embed"),
        (
            {"losses": [HiddenStates(layers=["other"])]},
            ObservationError,
            "'other' was called no tim",
        ),
        ({"losses": [HiddenStates()], "mask": "maks"}, ObservationError, "leaves padding out by"),
        ({"losses": [HiddenStates()], "mask": "input_ids"}, ObservationError, "'input_ids' gives"),
        (
            {"losses": [HiddenStates()], "mask": "labels"},
            ShapeError,
            r"Distilled: mask must be .*mask='labels' gives .*; nearest: mask='attention_mask'",
        ),
        ({"losses": [Relations(heads=3)]}, ShapeError, "8 features cannot be 3 heads"),
        ({"call": "modle"}, NoMatchError, "call='modle' names no submodule .*nearest: model"),
    ],
)
def test_what_a_loss_will_not_find_is_said_in_the_first_step(
    kwargs: Any,
    error: type,
    message: str,
    reader: Make,
    loader: Make,
    trainer: Make,
    start_at: Make,
) -> None:
    student = reader()
    student.other = nn.Linear(2, 2)
    module = Distilled(student, **kwargs)
    run = trainer(start_at(4))
    with pytest.raises(error, match=message):
        run.fit(module, loader())
    assert run.global_step == 0
    assert hooks(module) == 0


def test_no_hook_is_left_after_an_exception(reader: Make, loader: Make, trainer: Make) -> None:
    module = Distilled(reader(), teacher=reader(1), losses=everything())

    def fail(*_: Any) -> None:
        if module.trainer.global_step == 2:
            raise ZeroDivisionError

    module.model.head.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        trainer().fit(module, loader())
    assert hooks(module) == 1
    assert hooks(module._distillation.teacher.module) == 0


def test_copies_and_pickles_go_on_as_it_would(reader: Make, loader: Make, trainer: Make) -> None:
    module = Distilled(reader(), teacher=reader(1), losses=everything())
    trainer(max_steps=2).fit(module, loader())
    ended = []
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(one) is type(module)
        L.seed_everything(3, verbose=False)
        trainer(max_steps=2).fit(one, loader())
        ended.append(one)
    assert same(ended[0], ended[1])
    assert same(ended[0], ended[2])
    assert ended[1]._distillation is not module._distillation


def test_undistilled_is_the_student_again(reader: Make, loader: Make, trainer: Make) -> None:
    given = reader()
    module = Distilled(given, teacher=reader(1)).undistilled()
    assert module is given
    assert type(module) is type(reader())
    assert vars(module).keys() == vars(reader()).keys()
    trainer(max_steps=1).fit(module, loader())
    assert isinstance(Distilled(module), Distilled)


def test_a_class_made_on_the_way_loads_as_the_student(
    reader: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    module = Distilled(reader(), teacher=reader(1))
    run = trainer(max_steps=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    assert type(type(module).load_from_checkpoint(tmp_path / "it.ckpt")) is type(reader())
    with pytest.raises(SettingError, match="call load_from_checkpoint of that class"):
        Distilled.load_from_checkpoint(tmp_path / "it.ckpt")
    assert not is_overridden("validation_step", Distilled(SelfCalling()))


def test_fitting_twice_starts_twice(
    reader: Make, loader: Make, trainer: Make, start_at: Make
) -> None:
    module = Distilled(reader())
    teachers = []
    for step in (2, 3):
        trainer(start_at(step)).fit(module, loader())
        teachers.append(module._distillation.teacher.fingerprint)
    assert teachers[0] != teachers[1]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("source", ["start", "module"])
def test_precisions(
    precision: str, source: str, reader: Make, loader: Make, trainer: Make, start_at: Make
) -> None:
    teacher = "start" if source == "start" else reader(1)
    module = Distilled(reader(), teacher=teacher, losses=everything())
    run = trainer(start_at(), precision=precision)
    run.fit(module, loader())
    held = next(module._distillation.teacher.module.parameters())
    assert held.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert float(run.callback_metrics["distill_hidden_states"]) > 0
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"fast_dev_run": 2}, {"gradient_clip_val": 0.5}]
)
def test_other_ways_to_run(
    options: dict[str, Any], reader: Make, loader: Make, trainer: Make
) -> None:
    weights = {"epoch:0": 0.0, "epoch:1": 1.0}
    module = Distilled(reader(), teacher=reader(1), losses=[HiddenStates(weights)])
    run = trainer(**options)
    run.fit(module, loader())
    assert run.state.finished
    assert not same(module, reader())
    assert hooks(module) == 0


def test_a_barebones_run_logs_nothing(reader: Make, loader: Make) -> None:
    module = Distilled(reader(), teacher=reader(1))
    run = L.Trainer(barebones=True, accelerator="cpu", max_epochs=1)
    run.fit(module, loader())
    assert not run.callback_metrics
    assert not same(module, reader())


def test_a_step_does_not_wait_for_the_device(
    reader: Make, loader: Make, no_waits: Any, tmp_path: Path
) -> None:
    steps = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.mode = no_waits()
            self.mode.__enter__()

        def on_after_backward(self, *_: Any) -> None:
            self.mode.__exit__(None, None, None)
            steps.append(1)

        def on_exception(self, *_: Any) -> None:
            self.mode.__exit__(None, None, None)

    distilled = Distilled(reader(), teacher=reader(1), losses=everything())
    run = L.Trainer(barebones=True, max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    run.callbacks.append(Watch())
    run.fit(distilled, loader())
    assert len(steps) == 4


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_gives_its_logits(
    in_place: bool, reader: Make, loader: Make, trainer: Make, start_at: Make
) -> None:
    for teacher in ("start", reader(1)):
        student = reader()
        if in_place:
            student.model.compile(backend="eager")
        else:
            student.model = torch.compile(student.model, backend="eager")
        module = Distilled(student, teacher=teacher)
        run = trainer(start_at())
        run.fit(module, loader())
        assert float(run.callback_metrics["distill_logits"]) > 0
        assert hooks(module) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo itself
def test_compiled_blocks_give_their_outputs(reader: Make, loader: Make, trainer: Make) -> None:
    torch.compiler.reset()  # what other tests compiled counts against the limit of recompilations
    runs = []
    for compiled in ("no", "blocks", "whole"):
        module = Distilled(reader(), teacher=reader(1), losses=[HiddenStates()])
        L.seed_everything(0, verbose=False)
        for part in {"blocks": module.model.layers, "whole": [module.model]}.get(compiled, []):
            part.compile(backend="eager")
        if compiled == "whole":  # before anyone listens: what is compiled then stays deaf
            module.model(**next(iter(loader())))
            with pytest.raises(ObservationError, match=r"was called no times.* compile each block"):
                trainer().fit(module, loader())
        else:
            trainer().fit(module, loader())
            runs.append(module)
    assert same(*runs)


@pytest.mark.parametrize(
    ("changes", "losses", "error", "message"),
    [
        ({"labels": 5}, [Logits()], ShapeError, r"logits are \(4, 3\), the teacher's \(4, 5\)"),
        ({"words": 30}, [Logits()], ShapeError, "input embedding of 30 tokens, .* one of 20"),
        ({"depth": 3}, [HiddenStates()], ShapeError, "has 2 layers, .* and the teacher 3 layers"),
        ({"width": 16}, [HiddenStates()], ShapeError, r"'model.layers.0' gives .*the same width"),
        ({"heads": 4}, [Relations()], ShapeError, "student has 2, the teacher 4; give heads="),
    ],
)
def test_a_teacher_that_does_not_fit(
    changes: dict[str, int],
    losses: list[Any],
    error: type[Exception],
    message: str,
    reader: Make,
    loader: Make,
    trainer: Make,
    tmp_path: Path,
) -> None:
    module = Distilled(reader(), teacher=reader(1, **changes), losses=losses)
    with pytest.raises(error, match=message):
        trainer().fit(module, loader())
    assert hooks(module) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": 5}, r"sizes or labels: 'model.head.bias' is \(5,\), in the student \(3,"),
        ({"words": 30}, r"another vocabulary: its 'model.embed.weight' is \(30, 8\)"),
        ({"depth": 3}, r"no checkpoint of a Reader: 'model.layers.2.* only in the file"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    changes: dict[str, int], message: str, reader: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    torch.save({"state_dict": reader(1, **changes).state_dict()}, tmp_path / "other.ckpt")
    module = Distilled(reader(), teacher=str(tmp_path / "other.ckpt"))
    with pytest.raises(CheckpointError, match=message):
        trainer().fit(module, loader())


def test_a_file_that_is_no_checkpoint(
    reader: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    for name in ("no.ckpt", "no.safetensors"):
        (tmp_path / name).write_text("nothing")
        module = Distilled(reader(), teacher=str(tmp_path / name))
        with pytest.raises(CheckpointError, match=rf"the teacher .*{name} cannot be read"):
            trainer().fit(module, loader())


def test_the_tokenizer_of_the_data_is_looked_at(reader: Make, loader: Make, trainer: Make) -> None:
    class Data(L.LightningDataModule):
        tokenizer = range(25)

        def train_dataloader(self) -> Any:
            return loader()

    module = Distilled(reader(), teacher=reader(1))
    with pytest.raises(SettingError, match="tokenizer knows 25 tokens, the teacher 20"):
        trainer().fit(module, Data())


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("strat", r"'start', a checkpoint file or a module, got 'strat', .* nearest: start"),
        ("no/dense.ckpt", r"got 'no/dense.ckpt', a file that does not exist; none is in no$"),
        (3, "got 3$"),
        (".", r"got the folder '.'; for a transformers model give a module that loads it"),
    ],
)
def test_a_teacher_that_is_none(teacher: Any, message: str, reader: Make) -> None:
    student = reader()
    with pytest.raises(SettingError, match=message):
        Distilled(student, teacher=teacher)
    assert type(student) is type(reader())  # nothing is half done


def test_a_file_with_a_typo_gives_the_nearest(reader: Make, tmp_path: Path) -> None:
    (tmp_path / "dense.ckpt").touch()
    with pytest.raises(SettingError, match=r"nearest: .*dense.ckpt"):
        Distilled(reader(), teacher=str(tmp_path / "desne.ckpt"))


def test_what_cannot_be_distilled(reader: Make) -> None:
    with pytest.raises(SettingError, match="LightningModule of the package lightning, got a Lin"):
        Distilled(nn.Linear(2, 2))
    with pytest.raises(SettingError, match="LightningModule has no training_step"):
        Distilled(L.LightningModule())
    module = Distilled(reader())
    with pytest.raises(SettingError, match=r"DistilledReader is distilled already; .*undistilled"):
        Distilled(module)
    assert isinstance(module, Distilled)
    with pytest.raises(SettingError, match="teacher is the student itself, which would freeze"):
        Distilled(student := reader(), teacher=student)
    assert next(student.parameters()).requires_grad
    with pytest.raises(SettingError, match=r"losses are objects such as .*, got 'logits'"):
        Distilled(reader(), losses=["logits"])
    with pytest.raises(SettingError, match="losses is empty: nothing would be distilled; give"):
        Distilled(reader(), losses=[])
    with pytest.raises(SettingError, match=r"task must be a number that is not negative.* got -1"):
        Distilled(reader(), task=-1)


def test_what_cannot_be_fitted(reader: Make, loader: Make, trainer: Make) -> None:
    module = Distilled(reader())
    module.automatic_optimization = False
    with pytest.raises(PlatformError, match="automatic_optimization = False no one reads it"):
        trainer().fit(module, loader())
    module = Distilled(reader())
    sharding = type("FSDPStrategy", (SingleDeviceStrategy,), {})
    module.trainer = trainer(strategy=sharding("cpu"))
    with pytest.raises(PlatformError, match=r"which FSDPStrategy takes apart; use .*DDP or FSDP2"):
        module.setup(stage="fit")
    module = Distilled(reader())
    module.training_step = lambda batch, index: None
    with pytest.raises(PlatformError, match="set on the module itself and hides the one"):
        trainer().fit(module, loader())
    module = Distilled(reader(), losses=[Logits(weight={0.5: 1.0, "step:1": 0.0})])
    with pytest.raises(SettingError, match=r"points of a schedule must rise, got 0.5, step:1"):
        trainer().fit(module, loader())


def test_a_batch_without_its_mask(reader: Make, trainer: Make, loader: Make) -> None:
    losses = [HiddenStates(layers=["body"])]
    module = Distilled(SelfCalling(), teacher=SelfCalling(), losses=losses)
    with pytest.raises(ObservationError, match=r"Distilled leaves padding out by .* mask=None"):
        trainer().fit(module, loader(pairs()))


class TokenLoss(Encoder):
    """Has labels of tokens, as a language model does."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SimpleNamespace:
        output = super().forward(input_ids, attention_mask)
        return SimpleNamespace(loss=output.logits.square().mean(), logits=output.logits)


def test_labels_of_a_call_are_a_mask_of_what_is_predicted(
    reader: Make, batches: Make, loader: Make, trainer: Make
) -> None:
    (batch,) = batches(1)
    batch["labels"] = torch.where(batch["input_ids"] < 10, -100, batch["input_ids"] - 10)
    found = []
    for mask in ("labels", lambda one: one["labels"] != -100):
        made = reader(dropout=0.0), reader(1, dropout=0.0)
        for seed, one in enumerate(made):
            torch.manual_seed(seed)
            one.model = TokenLoss(8, 2, 3, 20, 2, 0.0)
        module = Distilled(made[0], teacher=made[1], losses=[HiddenStates()], mask=mask)
        run = trainer(max_steps=1)
        run.fit(module, loader([batch]))
        found.append(float(run.callback_metrics["distill_hidden_states"]))
    assert found[0] == found[1]


def test_features_without_a_gradient(reader: Make, loader: Make, trainer: Make) -> None:
    losses = [HiddenStates(layers=["model.layers.0"])]
    module = Distilled(reader(), teacher=reader(1), losses=losses)
    module.model.embed.requires_grad_(False)
    module.model.layers[0].requires_grad_(False)
    with pytest.raises(ObservationError, match=r"'model.layers.0' came without a gradient"):
        trainer().fit(module, loader())


def test_a_module_that_cannot_be_copied(
    reader: Make, loader: Make, trainer: Make, start_at: Make
) -> None:
    module = Distilled(reader())
    module.model.kept = torch.ones(2, requires_grad=True) * 2  # what a model keeps of a step
    trainer(start_at(), max_steps=3).fit(module, loader())
    module.past = [module.model.kept * 2]
    with pytest.raises(PlatformError, match="cannot be copied as its own teacher: Only Tensors"):
        trainer(start_at(), max_steps=3).fit(module, loader())


def test_the_hook_of_the_student_s_own_class_is_called(
    reader: Make, loader: Make, trainer: Make, start_at: Make
) -> None:
    heard = []

    class Listening(type(reader())):  # type: ignore[misc]
        def on_compression_start(self) -> None:
            heard.append(SimpleNamespace(step=self.trainer.global_step))

    trainer(start_at()).fit(Distilled(Listening()), loader())
    assert [one.step for one in heard] == [2]
