"""Real processes that train together: alike to the bit, equal to one, and resumed after a kill."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

import lrcompress
from lrcompress.callbacks import compatibility, ddp
from lrcompress.distill import Distilled, Logits
from lrcompress.errors import PlatformError

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks")

Make = Callable[..., Any]
# A page of figures takes longer to draw than most runs take; the first run has one.
QUIET: dict[str, Any] = {"verbose": False, "report_path": None}
RUNS: dict[str, str] = {
    "one point": "lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=2, verbose=False)",
    "two points": (
        "lrcompress.Factorize(keep=[0.6, 0.3], at=['epoch:1', 0.7], every_n_steps=1, "
        "max_tokens=400, validate=False, **QUIET, allocation='uniform')"
    ),
    "losparse": (
        "lrcompress.LoSparse(keep=0.4, mask_every=2, init='kfac', at='epoch:1', "
        "every_n_steps=1, **QUIET)"
    ),
    "kronecker": (
        "lrcompress.Factorize(keep=0.5, at=0.5, method='kronecker', every_n_steps=2, **QUIET)"
    ),
}
DISTILLED = {f"distilled {name}": RUNS[name] for name in ("one point", "losparse")}
# Every process takes its rows of the same global batches.
PRELUDE = """
import copy, os, signal, sys
sys.path.insert(0, {here!r})
import lightning as L
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
import lrcompress
from lrcompress.distill import Distilled, Logits
from conftest import Loader, Tagger, sentences

root, number = {root!r}, int(os.environ["RANK"])
QUIET = dict(verbose=False, report_path=None)


def parts(count=2, given=None):
    whole = sentences() if given is None else given
    return [{{k: v[number::count] for k, v in batch.items()}} for batch in whole]


def trainer(*callbacks, every_step=None, strategy="ddp", **kwargs):
    saving = [] if every_step is None else [ModelCheckpoint(every_step, "{{step}}",
        every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)]
    defaults = dict(max_epochs=3, accelerator="cpu", devices=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=every_step is not None, use_distributed_sampler=False,
        default_root_dir=root, strategy=strategy)
    return L.Trainer(callbacks=[*callbacks, *saving], **(defaults | kwargs))


def distilled(model):
    return Distilled(model, losses=[Logits()], teacher_dir=root)


def made(name, **kwargs):
    model = tagger(**kwargs)
    return distilled(model) if name.startswith("distilled") else model


def seen_by(callback):
    "The statistics before each change."
    grabbed, change = [], callback._change_model
    def first(*args):
        held = callback._observation.statistics.state_dict()
        grabbed.append({{name: dict(sums)
                        for side in ("inputs", "outputs") for name, sums in held[side].items()}})
        change(*args)
    callback._change_model = first
    return grabbed


def tagger(seed=0, **kwargs):
    L.seed_everything(seed + 1000 * number, verbose=False)  # other dropout in every process
    torch.manual_seed(seed)
    model = Tagger(**kwargs)
    torch.manual_seed(1000 * number)
    return model


def kept(trainer, model):
    "All that has to be alike in all processes."
    (optimizer,) = trainer.optimizers
    distillation = getattr(model, "_distillation", None)
    teacher = distillation and distillation.teacher.module.state_dict()
    return {{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "teacher": teacher,
             "plan": lrcompress.Plan.of(model).to_dict()}}


class Watch(L.Callback):
    "Counts the collectives between and at points."

    def __init__(self):
        self.per_step, self.calls = [], 0
        for name in ("all_reduce", "all_gather_object", "broadcast", "all_gather", "barrier",
                     "broadcast_object_list", "gather_object", "reduce"):
            self.wrap(name)

    def wrap(self, name):
        plain = getattr(dist, name)
        def counted(*args, **kwargs):
            self.calls += 1
            return plain(*args, **kwargs)
        setattr(dist, name, counted)

    def on_train_batch_end(self, trainer, *args):
        self.per_step.append(self.calls)
"""
ALIKE = """
def per_step(watch):
    return [b - a for a, b in zip(watch.per_step, watch.per_step[1:])]

watch = Watch()
trainer(watch).fit(tagger(dropout=0.0), Loader(parts()), Loader(parts()))
plain = per_step(watch)
assert len(plain) == 17

for name, make in {runs!r}.items():
    model, watch, callback = made(name, dropout=0.0), Watch(), eval(make)
    statistics = seen_by(callback)
    run = trainer(callback, watch)
    run.fit(model, Loader(parts()), Loader(parts()))
    steps = per_step(watch)
    busy = [i + 1 for i, calls in enumerate(steps) if calls != plain[i]]
    assert busy == {busy!r}[name], (name, steps)
    torch.save(kept(run, model) | {{"statistics": statistics}}, f"{{root}}/{{name}} {{number}}.pt")

# the wrapper's own settings are those the strategy was given, and LoSparse's masks travel nowhere
strategy = DDPStrategy(gradient_as_bucket_view=True, static_graph=True)
model = tagger(dropout=0.0)
run = trainer(eval({runs!r}["losparse"]), strategy=strategy, max_steps=14)
wrappers = []

class Look(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        wrapper = trainer.strategy.model
        assert isinstance(wrapper, DistributedDataParallel) and wrapper.static_graph
        assert wrapper.gradient_as_bucket_view
        assert not hasattr(trainer.lightning_module, "_ddp_params_and_buffers_to_ignore")
        if not wrappers or wrappers[-1] is not wrapper:
            wrappers.append(wrapper)
            assert not wrapper.modules_buffers

run.callbacks.insert(0, Look())
run.fit(model, Loader(parts()))
assert len(wrappers) == 3, len(wrappers)
print("ok")
"""


def write(folder: Path, body: str, **fields: Any) -> Path:
    names = {"here": str(Path(__file__).parent), "root": str(folder)}
    script = folder / "script.py"
    script.write_text(PRELUDE.format(**names) + body.format(**fields))
    return script


def assert_same(one: Any, other: Any, **close: float) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor) and close and one.is_floating_point():
        torch.testing.assert_close(one, other, **close)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict | list | tuple):
        assert len(one) == len(other)
        pairs = (
            ((one[key], other[key]) for key in one)
            if isinstance(one, dict)
            else zip(one, other, strict=True)
        )
        for pair in pairs:
            assert_same(*pair, **close)
    else:
        assert one == other


FOUR = """
for name, make in {runs!r}.items():
    model, callback = made(name, dropout=0.0), eval(make)
    statistics = seen_by(callback)
    run = trainer(callback, devices=4)
    run.fit(model, Loader(parts(4)), Loader(parts(4)))
    torch.save(kept(run, model) | {{"statistics": statistics}}, f"{{root}}/{{name}} {{number}}.pt")
"""


def seen_by(callback: Any) -> list[Any]:
    """As in the processes' own script."""
    space: dict[str, Any] = {}
    start, end = PRELUDE.index("def seen_by"), PRELUDE.index("class Watch")
    exec(PRELUDE[start:end].format(), space)
    return space["seen_by"](callback)


def alone(name: str, make: str, tagger: Make, loader: Make, trainer: Make, folder: Path) -> Any:
    """What one process ends with, and the statistics before each point."""
    model, callback = tagger(dropout=0.0), eval(make)
    if name.startswith("distilled"):
        model = Distilled(model, losses=[Logits()], teacher_dir=str(folder))
    statistics = seen_by(callback)
    trainer(callback).fit(model, loader(), loader())
    plan = lrcompress.Plan.of(model).to_dict()
    return {"plan": plan, "statistics": statistics, "model": model.state_dict()}


def test_processes_end_alike_and_as_one_would(
    tagger: Make, loader: Make, trainer: Make, launch: Make, tmp_path: Path
) -> None:
    busy = {"one point": [9], "two points": [6, 12], "losparse": [6, 13], "kronecker": [9]}
    busy |= {name: busy[name.removeprefix("distilled ")] for name in DISTILLED}
    runs = RUNS | DISTILLED
    ends = {}
    for count, script in ((2, ALIKE), (4, FOUR)):
        folder = tmp_path / str(count)
        folder.mkdir()
        launch(write(folder, script, runs=runs, busy=busy), count)
        for name, make in runs.items():
            first, *others = (torch.load(folder / f"{name} {i}.pt") for i in range(count))
            for other in others:
                assert_same(first, other)
            if name not in ends:
                ends[name] = alone(name, make, tagger, loader, trainer, tmp_path)
            one = ends[name]
            assert first["plan"] == one["plan"], name
            assert first["plan"]["layers"]
            close = {"rtol": 1e-5, "atol": 1e-5}  # before the first point nothing has drifted
            assert_same(first["statistics"][:1], one["statistics"][:1], **close)
            assert_same(first["model"], one["model"], rtol=2e-3, atol=2e-4)


WHOLE = """
class Kill(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 10:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

runs = {runs!r}
for name, make in runs.items():
    model = tagger()
    model = distilled(model) if name == "distilled" else model
    run = trainer(eval(make), every_step=f"{{root}}/{{name}}")
    run.fit(model, Loader(parts()), Loader(parts()))
    torch.save(kept(run, model), f"{{root}}/{{name}} {{number}}.pt")

run = trainer(eval(runs["two points"]), Kill(), every_step=f"{{root}}/killed")
run.callbacks.sort(key=lambda callback: isinstance(callback, Kill))  # after the file is written
run.fit(tagger(), Loader(parts()), Loader(parts()))
"""
RESUMED = """
runs = {runs!r}
for name, folder, step in {cases!r}:
    model = tagger(seed=5)
    model = distilled(model) if name == "distilled" else model
    run = trainer(eval(runs[name]), every_step=f"{{root}}/rest {{step}}")
    run.fit(model, Loader(parts()), Loader(parts()),
            ckpt_path=f"{{root}}/{{folder}}/step={{step}}.ckpt")
    torch.save(kept(run, model), f"{{root}}/{{folder}} {{step}} resumed {{number}}.pt")
"""


def test_a_killed_run_of_two_processes_ends_as_the_uninterrupted_one(
    tagger: Make, loader: Make, batches: Make, trainer: Make, launch: Make, tmp_path: Path
) -> None:
    runs = RUNS | {"distilled": RUNS["one point"]}
    runs.pop("one point")
    launch(write(tmp_path, WHOLE, runs=runs), 2, *[-signal.SIGKILL] * 2)
    assert (tmp_path / "killed" / "step=10.ckpt").exists()
    assert not (tmp_path / "killed" / "step=11.ckpt").exists()
    cases = [
        ("two points", "killed", 10),  # mid-observation of the second
        ("two points", "two points", 3),  # mid-observation of the first
        ("losparse", "losparse", 4),
        ("losparse", "losparse", 9),  # mid-window, half pruned
        ("distilled", "distilled", 12),
    ]
    launch(write(tmp_path, RESUMED, runs=runs, cases=cases), 2)
    for name, folder, step in cases:
        for number in range(2):
            whole = torch.load(tmp_path / f"{name} {number}.pt")
            assert_same(whole, torch.load(tmp_path / f"{folder} {step} resumed {number}.pt"))
    assert whole["teacher"] is not None

    # one process goes on with what two have seen
    callback = eval(RUNS["two points"].replace("max_tokens=400", "max_tokens=None"))
    path = tmp_path / "two points" / "step=3.ckpt"
    trainer(callback).fit(tagger(), loader(), loader(), ckpt_path=path)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches())
    assert callback.report.points[0].observed["steps"] == 6
    assert callback.report.points[0].observed["tokens"] == tokens


BAD = """
from lrcompress.errors import NotFiniteError, PlatformError
import lrcompress.engine.distributed_solve

def fails(message, model, given, *others, kind=PlatformError, make=None, ckpt_path=None):
    before = {{k: v.clone() for k, v in model.state_dict().items()}}
    callback = lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=2, **QUIET)
    run = trainer(eval(make) if make else callback, *others)
    try:
        run.fit(model, Loader(given), ckpt_path=ckpt_path)
    except kind as error:
        assert message in str(error), error
        return before
    raise AssertionError(message)

model = tagger()
model.blocks[1]["up"].weight.requires_grad_(number == 0)
fails("'blocks.1.up.weight' is not alike in all processes: (32, 16) trained in process 0, "
      "(32, 16) frozen in process 1", model, parts())
fails("training batches are not as many in all processes: 6.0 in process 0, 4.0 in process 1",
      tagger(), parts()[: 6 if number == 0 else 4])

class Drift(L.Callback):
    def on_train_batch_end(self, trainer, module, *args):
        if number == 1 and trainer.global_step == 9:
            module.head.weight.data[1, 2] += 1e-6
fails("'head.weight' is not the same in all 2 processes: those like the first are 0",
      tagger(), parts(), Drift())

plain = lrcompress.engine.distributed_solve.truncate
def broken(*args, **kwargs):
    if number == 1:
        raise NotFiniteError("weight holds 1 non-finite of 6 values")
    return plain(*args)
lrcompress.engine.distributed_solve.truncate = broken
model = tagger()
message = "layer 'blocks.0.up': weight holds 1 non-finite"
fails(message if number else f"process 1: {{message}}", model, parts(), kind=NotFiniteError)
assert len(lrcompress.Plan.of(model)) == 0
lrcompress.engine.distributed_solve.truncate = plain

folder = f"{{root}}/saved"
observing = "lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=1, window=1 / 3, **QUIET)"
trainer(eval(observing), every_step=folder).fit(tagger(), Loader(parts()))
for steps, message in [
    ((6, 5), "different checkpoints: observed [3, 109] in process 0, [2, 70] in process 1; keep"),
    ((6, 12), "different checkpoints: points that are done 0 in process 0, 1 in process 1; keep"),
    ((1, 2), "steps so far are not as many in all processes: 1 in process 0, 2 in process 1;"),
]:
    path = f"{{folder}}/step={{steps[number]}}.ckpt"
    fails(message, tagger(), parts(), ckpt_path=path, make=observing)

# more processes go on with what one has seen
callback = eval(observing)
trainer(callback).fit(tagger(), Loader(parts()), ckpt_path=f"{{root}}/step=7.ckpt")
assert callback.report.points[0].observed["steps"] == 6
assert callback.report.points[0].observed["tokens"] == {tokens}

class Deaf(L.Callback):
    "A process in which a layer was never seen adds zeros for it."
    def on_train_batch_start(self, trainer, module, *args):
        if number == 1:
            callback = trainer.callbacks[0]
            callback._observation.due = lambda *args: False
callback = lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=2, **QUIET)
trainer(callback, Deaf()).fit(tagger(), Loader(parts()))
assert len(callback.report.points) == 1 and callback.report.points[0].observed["tokens"] > 0
print("seven refused, one went on")
"""


def test_what_is_wrong_in_one_process_ends_all(
    tagger: Make, loader: Make, trainer: Make, batches: Make, launch: Make, tmp_path: Path
) -> None:
    callback = lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=1, window=1 / 3, **QUIET)
    trainer(callback, every_step=True).fit(tagger(), loader(), loader())
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches())
    told = launch(write(tmp_path, BAD, tokens=tokens), 2)
    assert [out.splitlines()[-1] for out in told] == ["seven refused, one went on"] * 2


LOST = """
import time
from datetime import timedelta
import lrcompress.engine.compress, lrcompress.engine.distributed_solve
from lrcompress.errors import PlatformError

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def wait(*args, **kwargs):
    while not os.path.exists(f"{{root}}/hanging"):
        time.sleep(0.1)
    die()

def lose(case):
    "Lose the second process in the middle of the point."
    if number == 1 and case == "solving":
        lrcompress.engine.distributed_solve.truncate = die
    elif number == 1 and case == "sharing":
        lrcompress.engine.distributed_solve.broadcast_layers_ = die
    elif number == 1 and case == "hanging":
        lrcompress.engine.distributed_solve.truncate = wait
    model = tagger()
    callback = lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=2, verbose=False)
    before, change = [], callback._change_model
    patience = timedelta(seconds=8 if case == "hanging" else 300)
    run = trainer(callback, strategy=DDPStrategy(timeout=patience))
    def first(*args):
        before.append(copy.deepcopy([kept(run, model), dict(model.named_parameters())]))
        change(*args)
    callback._change_model = first
    try:
        run.fit(model, Loader(parts()))
    except PlatformError as error:
        assert "process 0 of 2 waited for the others in vain: " in str(error), error
        assert "Start all of them again from the last checkpoint" in str(error)
        assert ("imed out" in str(error)) == (case == "hanging"), error
        # all as it was just before, and the optimizer's parameters are those of the model
        assert torch.equal(torch.stack([p.sum() for p in before[0][1].values()]),
                           torch.stack([p.sum() for p in model.parameters()]))
        assert str(kept(run, model)) == str(before[0][0])
        held = {{id(p) for group in run.optimizers[0].param_groups for p in group["params"]}}
        assert held == {{id(p) for p in model.parameters()}} and len(held) == 11
        open(f"{{root}}/{{case}}", "w").close()
        os._exit(7)

for case, port in {cases!r}.items():
    if not os.fork():
        os.environ["MASTER_PORT"] = port
        lose(case)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    assert code == 7 if number == 0 else code != 0, (case, code)
print("lost three times")
"""


def test_a_process_that_dies_or_hangs_at_a_point_leaves_the_others_whole(
    launch: Make, free_port: Make, tmp_path: Path
) -> None:
    ports = {case: free_port() for case in ("solving", "sharing", "hanging")}
    script = write(tmp_path, LOST, cases=ports)
    told = launch(script, 2)
    assert [out.splitlines()[-1] for out in told] == ["lost three times"] * 2


class FSDPStrategy:
    pass


class DeepSpeedStrategy(DDPStrategy):
    pass


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy(), r"under DDP and FSDP2 .*, not under FSDPStrategy; use strategy='ddp'"),
        (DeepSpeedStrategy(), r"not under DeepSpeedStrategy; .*`lrcompress factor --config RECIPE"),
        (DDPStrategy(start_method="spawn"), r"processes that spawn starts, .*='ddp' in a script"),
        (DDPStrategy(model_averaging_period=4), r"leave model_averaging_period out"),
    ],
    ids=["fsdp", "deepspeed", "spawn", "averaging"],
)
def test_refuses_what_cannot_follow(strategy: Any, message: str) -> None:
    trainer: Any = SimpleNamespace(callbacks=[], strategy=strategy)
    with pytest.raises(PlatformError, match=message):
        compatibility.check_trainer(trainer, "Factorize")


def test_refuses_optimizers_that_hold_a_part_of_their_state() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    with pytest.raises(PlatformError, match=r"use the optimizer it wraps"):
        compatibility.check_optimizers([ZeroRedundancyOptimizer([torch.ones(1)])], "Factorize")


def test_a_hook_s_memory_of_buckets_is_forgotten() -> None:
    state = PowerSGDState(None)
    state.iter, state.error_dict[0] = 2000, torch.ones(3)
    ddp._reset_communication_hook(state)
    assert (state.iter, state.error_dict) == (0, {})
    ddp._reset_communication_hook(None)
