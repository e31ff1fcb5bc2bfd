"""Access to the Lightning Trainer: its strategy, steps, validation and optimizers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.callbacks.compiled import keep_compiled
from lrcompress.distributed import Processes
from lrcompress.errors import CheckpointError, nearest
from lrcompress.schedules import StepsPerEpoch
from lrcompress.structure.plan import Plan
from lrcompress.structure.schedule_free import averaged
from lrcompress.structure.surgery import start_state_

FSDP2 = "ModelParallelStrategy"
TEACHER = "lrcompress_teacher"  # what a checkpoint says of the teacher of a distilled run


def class_names(kind: type) -> set[str]:
    """Return the names of a class and its bases: in both Lightnings they are the same."""
    return {base.__name__ for base in kind.__mro__}


def uses_fsdp2(trainer: pl.Trainer) -> bool:
    """Return whether the strategy is FSDP2, under which each process holds a part of the model."""
    return FSDP2 in class_names(type(trainer.strategy))


def run_lengths(trainer: pl.Trainer) -> tuple[float, StepsPerEpoch]:
    """Return optimizer steps in the whole run and per epoch; ``inf`` where unknown.

    Where a GradientAccumulationScheduler makes epochs differ, the steps of each.
    """
    total = float(trainer.estimated_stepping_batches)  # which loads the data, if need be
    batches = float(trainer.num_training_batches)
    if math.isinf(batches):
        return (math.inf if total == -1 else total), math.inf
    factor = _accumulation(trainer)
    if factor is None:
        return total, max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    last, epochs = max(factor), trainer.max_epochs or 1
    each = tuple(
        float(max(1, math.ceil(batches / factor[max(e for e in factor if e <= epoch)])))
        for epoch in range(max(epochs, last) + 1)
    )
    total = math.inf if epochs == -1 else sum(each[:epochs])
    return (total if trainer.max_steps == -1 else min(total, trainer.max_steps)), each


def _accumulation(trainer: pl.Trainer) -> dict[int, int] | None:
    """Return how many batches a step takes from which epoch on, if a callback changes that."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if "GradientAccumulationScheduler" in class_names(type(callback)):
            return dict(callback.scheduling)
    return None


def tell_trial_points(steps: Sequence[int], total: float, owner: str) -> None:
    """Say at which of its few steps a trial run (``fast_dev_run``) changes the model."""
    within = [step for step in steps if step <= total]
    lacking = len(steps) - len(within)
    rank_zero_info(
        f"lrcompress: in a trial run (fast_dev_run) {owner} changes the model at "
        f"step{'s' * (len(within) > 1)} {', '.join(map(str, within))} of {total:g}"
        + (f"; the run is too short for {lacking} more of its points" if lacking else "")
    )


def steps_done(trainer: pl.Trainer) -> int:
    """Return how many optimizer steps were taken; under manual optimization, how many batches."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx + 1 - int(_in_batch(trainer))


def _in_batch(trainer: pl.Trainer) -> bool:
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.ready > progress.completed


def between_steps(trainer: pl.Trainer) -> bool:
    """Return whether, at the start of a batch, no gradients are accumulated yet."""
    begun = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
    return begun % trainer.accumulate_grad_batches == 0


def loss_factor(trainer: pl.Trainer) -> float:
    """Return the factor of the loss before backward, from loss scaling and accumulation."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    factor = 1.0 if scaler is None else float(scaler.get_scale())
    if trainer.lightning_module.automatic_optimization:
        factor /= trainer.accumulate_grad_batches
    return factor


def gradient_factor(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Return the factor that turns ``.grad``, before the optimizer's step, into a mean gradient.

    Lightning has unscaled it by then, except for optimizers that do so themselves.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return 1.0 / float(scaler.get_scale())


def run_validation(trainer: pl.Trainer, batches: float | None = None) -> dict[str, float]:
    """Validate once inside a fit and return the metrics, without any other effect.

    Loggers, checkpoints and early stopping do not see it, and random numbers continue as if it
    had not been. Schedule-free optimizers are in evaluation mode meanwhile. Empty where the trainer
    has nothing to validate.

    Args:
        trainer: in a fit.
        batches: of each loader, as a number or as a share; by default the trainer's own limit.
    """
    if not trainer.enable_validation or trainer.barebones:
        return {}
    loop, limit = trainer.validate_loop, trainer.limit_val_batches
    with isolate_rng(), averaged(trainer.optimizers), _validating(trainer):
        trainer.limit_val_batches = limit if batches is None else batches
        try:
            logged = loop.run()
        finally:
            trainer.limit_val_batches = limit
    return {name: float(value) for figures in logged for name, value in figures.items()}


def greatest_value(trainer: pl.Trainer, name: str) -> float | None:
    """Return the most that a metric of the latest :func:`run_validation` can ever be.

    It is known of objects of ``torchmetrics`` alone; None for other metrics, and without a bound.
    """
    logged = (trainer.validate_loop._results or {}).values()
    own = name.partition("/dataloader_idx_")[0]
    bounds = [getattr(x.value, "plot_upper_bound", None) for x in logged if x.meta.name == own]
    known = [float(one) for one in bounds if one is not None]
    return max(known) if known and len(known) == len(bounds) else None


def validation_batches(trainer: pl.Trainer, share: float) -> int | None:
    """Return how many batches of each loader are a share of the longest, from 1; None for all.

    The trainer has validated before. All it is too where loaders have no length.
    """
    most = max(trainer.validate_loop.max_batches, default=math.inf)
    return None if share >= 1 or math.isinf(most) else max(1, math.ceil(share * most))


def validation_figures(trainer: pl.Trainer) -> dict[str, float]:
    """Return the metrics of the fit's validation that has just ended, of all its loaders.

    Of any other nothing: of the sanity check and of :func:`run_validation`.
    """
    results = trainer._results
    if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or results is None:
        return {}
    figures: dict[str, Any] = {}
    try:  # it shows one loader's at a time, by now those of none
        for loader in {metric.meta.dataloader_idx: None for metric in results.values()}:
            results.dataloader_idx = loader
            figures |= results.metrics(on_step=False)["callback"]
    finally:
        results.dataloader_idx = None
    return {name: float(value) for name, value in figures.items()}


@contextmanager
def _validating(trainer: pl.Trainer) -> Iterator[None]:
    """Put the trainer in the state of ``trainer.validate`` inside the block, and back after it."""
    connector, loop = trainer._logger_connector, trainer.validate_loop
    held = (trainer.state.fn, trainer.state.stage, trainer.loggers, loop.verbose)
    inference = loop.inference_mode
    inner = (connector._first_loop_iter, connector._current_fx)
    trainer.state.fn, trainer.state.stage = TrainerFn.VALIDATING, RunningStage.VALIDATING
    trainer.loggers, loop.verbose = [], False
    connector._first_loop_iter = None
    loop.inference_mode = False  # or metrics would be left with tensors that training cannot update
    try:
        yield
    finally:
        trainer.state.fn, trainer.state.stage, trainer.loggers, loop.verbose = held
        connector._first_loop_iter, connector._current_fx = inner
        loop.inference_mode = inference


def notify_compression_start(module: pl.LightningModule) -> None:
    """Call the module's ``on_compression_start``, if any, before the first change of structure.

    Distillation has this method: it keeps a copy of the uncompressed model as its teacher.
    """
    hear = getattr(module, "on_compression_start", None)
    if hear is not None:
        hear()


def drop_gradients(module: pl.LightningModule) -> None:
    """Drop the last step's gradients, so that they take no memory at a point.

    Points lie between steps, so the next one would clear them. Under manual optimization it may
    not, and they stay.
    """
    if module.automatic_optimization:
        module.zero_grad(set_to_none=True)


def warn_of_lost_teacher(module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Warn if a run with distillation is resumed with a module without it."""
    if TEACHER in checkpoint and not hasattr(module, "on_compression_start"):
        rank_zero_warn(
            "the checkpoint is one of a run with distillation, the module is not distilled: it "
            "goes on without its teacher; wrap it in lrcompress.Distilled as before"
        )


def match_checkpoint_structure(module: pl.LightningModule, stack: ExitStack) -> None:
    """Give the module the structure of each state dict it loads, until ``stack`` closes."""
    handle = module.register_load_state_dict_pre_hook(_match)  # type: ignore[no-untyped-call]
    stack.callback(handle.remove)


def _match(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    Plan.matching(module, state, prefix).apply_(module)
    keep_compiled(module)


def reset_best_scores(trainer: pl.Trainer) -> None:
    """Reset the best scores of ModelCheckpoint and EarlyStopping after a change of structure.

    A denser model would be kept as best, and the drop at a point would count as the end of
    progress. The best file so far stays on disk and is named; the next best goes to another,
    which gets a number where ``filename`` has no part that changes. A ModelCheckpoint that
    monitors nothing has no best: it goes on replacing its latest file.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kinds = class_names(type(callback))
        if "ModelCheckpoint" in kinds and callback.monitor is not None:
            if callback.best_model_path:
                rank_zero_info(
                    f"lrcompress: {callback.best_model_path} stays as it was before this point; "
                    "the best after it goes to another file, ModelCheckpoint.best_model_path"
                )
            worst = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
            callback.best_k_models, callback.kth_best_model_path = {}, ""
            callback.best_model_score, callback.current_score = None, None
            callback.best_model_path, callback.kth_value = "", worst
        if "EarlyStopping" in kinds:
            worst = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
            callback.best_score, callback.wait_count = worst, 0


def parameter_names(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[list[list[str]]]:
    """Return the names of the parameters of every group of every optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def reorder_parameters_(
    model: nn.Module, optimizers: Sequence[Optimizer], saved: list[list[list[str]]]
) -> None:
    """Reorder parameters as a checkpoint holds their optimizer state.

    Raises:
        CheckpointError: if a group holds other parameters than the checkpoint's.
    """
    current = parameter_names(model, optimizers)
    for i, (optimizer, groups, wanted) in enumerate(zip(optimizers, current, saved, strict=True)):
        for group, have, want in zip(optimizer.param_groups, groups, wanted, strict=True):
            if have == want:
                continue
            differ = sorted(set(have) ^ set(want))
            if differ:
                where = "only in the checkpoint" if differ[0] in want else "only in the model"
                raise CheckpointError(
                    f"optimizer {i}: parameter {differ[0]!r} is {where}; "
                    "build the optimizer from the same parameters as the run that was saved"
                )
            place = {name: index for index, name in enumerate(have)}
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][place[name]] for name in want]


def regroup_parameters_(
    model: nn.Module, optimizers: Sequence[Optimizer], wanted: Sequence[Sequence[Sequence[str]]]
) -> None:
    """Set the parameters of every group of every optimizer by name, and drop state of others.

    Parameters that the model does not have stay where they are; they are called "".

    Raises:
        CheckpointError: if there are other optimizers or groups, or a name is not in the model.
    """
    named = dict(model.named_parameters())
    sizes = [len(optimizer.param_groups) for optimizer in optimizers]
    if sizes != [len(groups) for groups in wanted]:
        raise CheckpointError(
            f"expected optimizers with {[len(groups) for groups in wanted]} groups of parameters, "
            f"got {sizes}; build them as the run that was saved did"
        )
    missing = {name for groups in wanted for names in groups for name in names} - {"", *named}
    if missing:
        raise CheckpointError(
            f"no parameter {min(missing)!r} in the model, which the optimizer shall train; "
            f"nearest names: {nearest(min(missing), named)}"
        )
    known = {id(parameter) for parameter in named.values()}
    for optimizer, groups in zip(optimizers, wanted, strict=True):
        for group, names in zip(optimizer.param_groups, groups, strict=True):
            strange = iter([p for p in group["params"] if id(p) not in known])
            group["params"] = [named[name] if name else next(strange) for name in names]
            if "param_names" in group:
                group["param_names"] = list(names)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter in [p for p in optimizer.state if id(p) not in held]:
            del optimizer.state[parameter]
        for group in optimizer.param_groups:
            start_state_(optimizer, group["params"])


def rng_state() -> dict[str, Any]:
    """Return the random state of the CPU and of this process's own accelerator, in tensors.

    Other accelerators of the machine are other processes' own.
    """
    own = _accelerator()
    held = {} if own is None else {own: torch.get_device_module(own).get_rng_state()}
    return {"cpu": torch.get_rng_state(), **held}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set torch's random number generators to a state from :func:`rng_state`.

    An accelerator of which it holds nothing stays as it is.
    """
    torch.set_rng_state(state["cpu"].cpu())
    own = _accelerator()
    held = state.get(own) if own else None
    if isinstance(held, list):  # files of earlier versions hold those of all that were visible
        held = dict(enumerate(held)).get(torch.accelerator.current_device_index())
    if own is not None and held is not None:
        torch.get_device_module(own).set_rng_state(held.cpu())


def _accelerator() -> str | None:
    """Return the type of the machine's accelerator, if it has one."""
    found = torch.accelerator.current_accelerator()
    return found.type if found is not None and torch.accelerator.is_available() else None


def restore_rng(
    states: Sequence[Mapping[str, Any]], processes: Processes
) -> Mapping[str, Any] | None:
    """Set torch's generators to the state in a checkpoint of this process, and return it all.

    None if the checkpoint was written by fewer processes.
    """
    if processes.index >= len(states):
        return None
    own = states[processes.index]
    set_rng_state(own["rng"])
    return own


def weights_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """Return a checkpoint of the weights only, with what loading it needs."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=True)


def logged_step(trainer: pl.Trainer) -> int:
    """Return the step under which loggers store what is logged now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
