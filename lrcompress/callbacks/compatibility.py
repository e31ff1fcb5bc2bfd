"""Checks that a trainer, its strategy and its optimizers allow a change of structure in a fit."""

from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lrcompress.callbacks.trainer_state import FSDP2, class_names
from lrcompress.errors import CheckpointError, LayerError, PlatformError, SettingError
from lrcompress.statistics.views import view
from lrcompress.structure.plan import Plan
from lrcompress.structure.schedule_free import is_schedule_free, unknown_schedule_free

_REFUSED = {
    "StochasticWeightAveraging": "keeps a copy of the dense weights to average into",
    "WeightAveraging": "keeps a copy of the dense weights to average into",
    "ModelPruning": "masks parameters that will have left the model",
}
# Strategies that are DDPStrategies by inheritance alone.
_OTHER_THAN_DDP = {"DeepSpeedStrategy", "XLAStrategy"}
# What to do under strategies that shard the module before a callback may change it.
BETWEEN_FITS = (
    "fit without the callback, make one file of the checkpoint if it is a folder, then "
    "`lrcompress factor --config RECIPE --checkpoint LAST.ckpt --out FACTORED.ckpt` with "
    "Factorize in the recipe, and fit again with lrcompress.StartFrom('FACTORED.ckpt') in its "
    "place"
)


def check_trainer(trainer: pl.Trainer, owner: str, *, observes: bool = False) -> None:
    """Check that strategy, callbacks and module of a trainer allow a change of structure.

    Args:
        trainer: in a fit.
        owner: for the message.
        observes: whether training steps are observed, by the batch that each begins with.

    Raises:
        PlatformError: if one does not; the message has the reason and what to do.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name in class_names(type(callback)) & _REFUSED.keys():
            raise PlatformError(
                f"{owner} replaces layers while fit runs, and {name} {_REFUSED[name]}; "
                f"remove {name}, or call lrcompress.compress() after the fit; averages of your "
                "own can follow by the hook on_structure_change"
            )
    _check_strategy(trainer.strategy, owner)
    if (
        observes
        and "dataloader_iter" in signature(trainer.lightning_module.training_step).parameters
    ):
        raise PlatformError(
            f"{owner} looks at a batch before the step, and training_step(dataloader_iter) "
            "fetches its own; take training_step(batch, batch_idx), or method='svd', which "
            "observes nothing"
        )


def _check_strategy(strategy: Any, owner: str) -> None:
    names, name = class_names(type(strategy)), type(strategy).__name__
    if "SingleDeviceStrategy" in names:
        return
    if FSDP2 in names:
        check_no_tensor_parallel(strategy, owner)
        return
    if "DDPStrategy" not in names or names & _OTHER_THAN_DDP:
        raise PlatformError(
            f"{owner} replaces layers while fit runs, which it can do on one device, under DDP "
            f"and FSDP2 (ModelParallelStrategy), not under {name}; use strategy='ddp' or "
            f"Trainer(devices=1), or factor between two fits: {BETWEEN_FITS}"
        )
    method = getattr(strategy, "_start_method", "popen")
    if method != "popen":
        raise PlatformError(
            f"{owner} changes the module in processes that {method} starts, and the object in "
            "the process that called fit would stay dense; use strategy='ddp' in a script, or "
            "torchrun. In a notebook, train on one device"
        )
    if getattr(strategy, "_model_averaging_period", None) is not None:
        raise PlatformError(
            f"{owner} needs the same parameters in all processes, which model averaging lets "
            "drift apart between its periods; leave model_averaging_period out"
        )


def check_no_tensor_parallel(strategy: Any, owner: str) -> None:
    """Check that FSDP2 is not combined with tensor parallelism.

    Raises:
        PlatformError: if it is; the message says what to do.
    """
    over = strategy.device_mesh["tensor_parallel"].size()
    if over > 1:
        raise PlatformError(
            f"{owner} follows parameters that lie over processes by rows, and tensor parallelism "
            f"lays them over {over} otherwise; use ModelParallelStrategy(data_parallel_size=N, "
            "tensor_parallel_size=1)"
        )


# Optimizers that cannot take new parameters while they train, and why.
_OPTIMIZERS = {
    "ZeroRedundancyOptimizer": "holds only a part of its state in each process; use the optimizer "
    "it wraps",
    "LBFGS": "keeps all gradients in one flat vector of the length they had at its first step; "
    "use another optimizer, or call lrcompress.compress() after the fit",
    "CPUOffloadOptimizer": "steps copies of the parameters on the host that it made at the start; "
    "use the optimizer it wraps",
}


def check_optimizers(
    optimizers: Sequence[Optimizer], owner: str, *, matrices: bool = True, averages: bool = True
) -> None:
    """Check that optimizers can go on with new parameters in the place of old ones.

    Args:
        optimizers: of the trainer.
        owner: for the message.
        matrices: whether all new parameters are matrices, which is all that Muon takes.
        averages: whether a schedule-free optimizer can follow what is done to them.

    Raises:
        PlatformError: if one cannot; the message says why and what to do.
    """
    for optimizer in optimizers:
        names = class_names(type(optimizer))
        for name in names & _OPTIMIZERS.keys():
            raise PlatformError(
                f"{owner} puts new parameters in an optimizer while it trains, and {name} "
                f"{_OPTIMIZERS[name]}"
            )
        if "Muon" in names and not matrices:
            raise PlatformError(
                f"{owner} makes parameters here that are no matrices, and Muon takes matrices "
                "only; use another optimizer"
            )
        if unknown_schedule_free(optimizer) or (is_schedule_free(optimizer) and not averages):
            raise PlatformError(
                f"{owner} cannot follow the averages that {type(optimizer).__name__} keeps; use "
                + (
                    "one that is not schedule-free"
                    if not averages
                    else "AdamWScheduleFree, "
                    "RAdamScheduleFree or SGDScheduleFree of the package schedulefree"
                )
            )


def check_trained(trainer: pl.Trainer, names: Sequence[str], owner: str) -> None:
    """Check that layers are trained, as their factors are to be.

    Args:
        trainer: with its module and optimizers.
        names: of the layers.
        owner: for the message.

    Raises:
        LayerError: if the weight of one is frozen.
        PlatformError: if no optimizer holds it.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for name in names:
        weight = view(trainer.lightning_module.get_submodule(name), table=True).parameters[0]
        if not weight.requires_grad:
            raise LayerError(
                f"layer {name!r} is frozen: its factors would not be trained; unfreeze it, "
                "leave it out with exclude=, or call lrcompress.compress() on the model"
            )
        if id(weight) not in held:
            raise PlatformError(
                f"no optimizer holds the weight of layer {name!r}, so its factors would not be "
                f"trained after {owner} has replaced it; give it to one in configure_optimizers, "
                "or leave the layer out with exclude="
            )


def check_apart(names: Sequence[str], others: Sequence[str], other: object, owner: str) -> None:
    """Check that two callbacks replace different layers.

    Args:
        names: of the layers of one.
        others: of those of the other.
        other: the other callback, for the message.
        owner: the one, for the message.

    Raises:
        SettingError: if they have one in common.
    """
    both = set(names) & set(others)
    if both:
        raise SettingError(
            f"{type(other).__name__} and {owner} both replace layer {min(both)!r}: leave it out "
            "of one of them with exclude=, or give one several points"
        )


def check_rising(points: Sequence[object], steps: Sequence[int]) -> None:
    """Check that points lie at rising steps.

    Raises:
        SettingError: if they do not.
    """
    if any(after <= before for before, after in pairwise(steps)):
        named = ", ".join(map(str, points))
        raise SettingError(f"points must rise, got {named}: steps {steps}")


def check_ahead(point: object, step: int, now: int, *, blind: bool) -> None:
    """Check that the step of the next point is not over, nor the first one of a window.

    Args:
        point: in words.
        step: of the point.
        now: where training starts.
        blind: whether nothing could be observed before a point at ``now``.

    Raises:
        SettingError: if it is.
    """
    if step < now or (blind and step == now):
        lies = "lies in the past" if step < now else "leaves no step to observe before it"
        raise SettingError(
            f"point {point} is step {step}, which {lies}: training starts at step {now}"
        )


def warn_of_others(was: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> None:
    """Warn of points that are done with another method or share than is asked for now."""
    for one, other in zip(was, now, strict=False):
        if list(one) != list(other):
            rank_zero_warn(
                f"the checkpoint was written after a point with method={one[0]!r}, "
                f"keep={one[1]!r}, which stays as it is; method={other[0]!r}, keep={other[1]!r} "
                "has no effect on it: resume from a checkpoint before that point"
            )


def check_alone(trainer: pl.Trainer, names: Collection[str], owner: object, others: type) -> None:
    """Check that no other callback of a kind targets one of these layers.

    Raises:
        SettingError: if one does.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, others) and other is not owner:
            settings = other.settings_at(0)  # type: ignore[attr-defined]
            both = {*names} & {*settings.select(trainer.lightning_module).names}
            if both:
                raise SettingError(
                    f"{type(owner).__name__} and {type(other).__name__} both target layer "
                    f"{min(both)!r}; leave it to one of them with targets= and exclude="
                )


def check_version(state: Mapping[str, Any], version: int, owner: str) -> None:
    """Check the version of a callback's state in a checkpoint.

    Raises:
        CheckpointError: if it is another.
    """
    if state.get("version") != version:
        raise CheckpointError(
            f"expected {owner} state of version {version}, got version {state.get('version')!r}"
        )


def check_plan(planned: Mapping[str, Any], module: nn.Module) -> None:
    """Check that a module has the structure of the checkpoint that was loaded.

    Raises:
        CheckpointError: if it has another.
    """
    plan, found = Plan.from_dict(planned), Plan.of(module)
    if plan != found:
        raise CheckpointError(
            f"the checkpoint was written with {len(plan)} factored layers, the model has "
            f"{len(found)} of other sizes or names; load it through Trainer.fit(ckpt_path=...)"
        )
