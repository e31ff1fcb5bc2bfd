"""Base class of callbacks that change the structure of a model at scheduled points of a fit."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import RenderableType
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lrcompress.callbacks import compatibility, ddp, reporting, trainer_state, unfreezing
from lrcompress.callbacks.memory import check_memory
from lrcompress.callbacks.observation import Observation
from lrcompress.callbacks.run_description import describe_run
from lrcompress.callbacks.samples import sample_after, sample_before
from lrcompress.callbacks.sampling import Sampling
from lrcompress.callbacks.step_timing import StepTimer
from lrcompress.callbacks.structure_change import structure_change, warn_of_stale
from lrcompress.callbacks.warmup import Restart, show_true_rates
from lrcompress.distributed import ONE_PROCESS
from lrcompress.embedding import EmbeddingSettings
from lrcompress.engine.footprint import Footprint
from lrcompress.engine.settings import Settings
from lrcompress.errors import ObservationError
from lrcompress.report import PointRecord, Report
from lrcompress.schedules import Point, Warmup, squeeze, window_steps
from lrcompress.structure.plan import Plan

VERSION = 1
_VALIDATIONS = 200  # of a run that are kept for the report


class CompressionCallback(pl.Callback, ABC):
    """Observes steps before each point, changes the model at it, and can be resumed at any step.

    Subclasses define what happens at a point. Everything that a run needs to resume is in
    ``state_dict``; what happened is in ``report``.

    Args:
        points: when the structure changes.
        sampling: which steps are observed before a point.
        window: how long before a point to observe.
        validate: run validation just before and just after each point, for the report.
        report_path: where the report goes; see :func:`lrcompress.callbacks.reporting.report_file`.
        verbose: print a table at each point and at the end.

    Raises:
        SettingError: if ``report_path`` is no ``.json`` file.
    """

    def __init__(
        self,
        points: list[Point],
        sampling: Sampling,
        *,
        window: Point,
        validate: bool,
        report_path: str | None,
        verbose: bool,
    ) -> None:
        super().__init__()
        self.points, self.sampling = points, sampling
        self.validate, self.report_path, self.verbose = validate, report_path, verbose
        reporting.check_report_path(report_path)
        self._window = window
        self._hooks = ExitStack()  # for the fit
        self._last, self._fits = 0, False  # trainer of the last fit, by its identity; in one now
        self._reset()

    def _reset(self) -> None:
        self.report = Report()
        self._processes = ONE_PROCESS
        self._observation = Observation(self.sampling)
        self._stage = 0  # points that are done
        self._tried = False  # whether a batch of this fit was looked at
        self._looked = False  # whether other callbacks were
        self._point_steps: list[int] = []
        self._restart = Restart()
        self._loaded: Mapping[str, Any] | None = None
        self._live: tuple[pl.LightningModule, Sequence[Optimizer]] | None = None
        self._timer = StepTimer()
        self._needed: Footprint | None = None  # memory, once it was checked
        self._report_file: Path | None = None
        self._trial = False  # fast_dev_run: a few steps, in which points are moved

    # What a subclass defines

    at: float | str | list[float | str]  # its argument; part of the state's key
    _makes_matrices = True  # and no parameters of other shapes
    _keeps_averages = True  # of schedule-free optimizers
    _continues = False  # whether a second fit of one trainer goes on where the first ended

    @abstractmethod
    def settings_at(self, stage: int) -> Settings | EmbeddingSettings:
        """Return how layers are chosen and measured at a point."""

    def _observes(self, stage: int) -> bool:
        """Return whether a point needs statistics."""
        return bool(self.sampling.kinds)

    def _growth(self, stage: int, module: nn.Module) -> int | None:
        """Return how many parameters a point adds at first; None if it solves no layers."""

    @abstractmethod
    def _change_model(self, trainer: pl.Trainer, module: pl.LightningModule, now: int) -> None:
        """Change the model at the point ``self._stage``, and add what it did to the report."""

    @abstractmethod
    def preview(self, model: nn.Module) -> RenderableType:
        """Return what a fit would do to ``model``, as a table; nothing is changed."""

    def _phase(self) -> str:
        """Return the phase that the time of a step counts for: dense, pruning or factored."""
        return "factored" if self._stage else "dense"

    @property
    @override
    def state_key(self) -> str:
        settings = self.settings_at(0)
        return self._generate_state_key(
            at=self.at, targets=settings.targets, exclude=list(settings.exclude)
        )

    # Structure and state

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._fits = stage == "fit"
        if self._fits:
            done, again = (self._stage, self.report, self._timer), self._last == id(trainer)
            self._hooks.close()
            self._reset()
            if again and self._continues and trainer.global_step:  # which it counts on from there
                self._stage, self.report, self._timer = done
            self._last = id(trainer)
            compatibility.check_trainer(trainer, type(self).__name__, observes=self._observes(0))
            self._processes = ddp.processes_of(trainer)
            sampling = self.sampling.for_data(getattr(trainer, "datamodule", None))
            self._observation = Observation(sampling, self._processes)
            ddp.check_same_module(pl_module, self._processes)
            self._report_file = reporting.report_file(trainer, self.report_path)
            self._trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        trainer_state.match_checkpoint_structure(pl_module, self._hooks)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            trainer_state.warn_of_lost_teacher(pl_module, checkpoint)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._live, owner = (pl_module, trainer.optimizers), type(self).__name__
        show_true_rates(trainer, self._hooks)
        able = {"matrices": self._makes_matrices, "averages": self._keeps_averages}
        compatibility.check_optimizers(trainer.optimizers, owner, **able)
        names, alone = (chosen := self.settings_at(0).select(pl_module)).names, chosen.note
        ddp.check_layers(pl_module, names, self._processes, owner)
        if self._loaded is not None:
            unfreezing.resume_unfrozen_(trainer, pl_module, self._loaded.get("frozen"))
            self._resume(pl_module, trainer.optimizers, self._loaded)
            ddp.rebuild_ddp_(trainer)
        if not unfreezing.finetuning_callbacks(trainer):  # else when layers are observed
            self._check_trained(trainer, names)
        active = [x for x in self._compression_callbacks(trainer) if not x._is_done]
        for other in active[: active.index(self)] if self in active else ():
            compatibility.check_apart(names, other.settings_at(0).watched(pl_module), other, owner)
        if self.verbose and alone and not self._stage:
            reporting.tell(alone)

    def _check_unfrozen(self, trainer: pl.Trainer, module: nn.Module) -> None:
        """Check that layers are trained by now which another callback unfreezes."""
        if unfreezing.finetuning_callbacks(trainer):
            self._check_trained(trainer, self.settings_at(self._stage).select(module).names)

    def _check_trained(self, trainer: pl.Trainer, names: Sequence[str]) -> None:
        """Check that the factors of layers will be trained."""
        compatibility.check_trained(trainer, names, type(self).__name__)

    def _resume(
        self, module: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Any]
    ) -> None:
        compatibility.check_plan(state["plan"], module)
        trainer_state.reorder_parameters_(module, optimizers, state["param_names"])
        device = next(module.parameters()).device
        self._observation.load_state_dict(state["observation"], device)
        # the loader draws its order from here
        own = trainer_state.restore_rng(state["processes"], self._processes)
        if own is not None:
            self._observation.set_label_rng_state(own["labels"])
        self._restart.resume(state["restart"], optimizers, self._hooks)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return everything a run needs to resume; a collective call."""
        if self._live is None:
            return {"version": VERSION, "stage": self._stage}
        module, optimizers = self._live
        self._processes.reshard(module)
        return {
            "version": VERSION,
            "plan": Plan.of(module).to_dict(),
            "stage": self._stage,
            "param_names": trainer_state.parameter_names(module, optimizers),
            "frozen": unfreezing.frozen_names(module),
            "observation": self._observation.state_dict(),
            "report": self.report.to_dict(),
            "restart": self._restart.state_dict(),
            "processes": self._processes.all_gather(
                {"rng": trainer_state.rng_state(), "labels": self._observation.label_rng_state()}
            ),
            "times": {name: list(spent) for name, spent in self._timer.spent.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        compatibility.check_version(state_dict, VERSION, type(self).__name__)
        if "plan" not in state_dict or (self._live is not None and not self._fits):
            return  # a test after a fit loads the model alone
        ddp.check_same_checkpoint(state_dict, self._processes)
        self._loaded = state_dict
        self._stage = state_dict["stage"]
        self.report = Report.from_dict(state_dict["report"])
        self._timer = StepTimer(state_dict["times"])
        if self._live is not None:  # sharded models are loaded after on_fit_start
            self._resume(*self._live, state_dict)

    # During the fit

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ddp.check_same_lengths(trainer, self._processes)
        self._timer.first = trainer.global_step
        self._total, self._per_epoch = trainer_state.run_lengths(trainer)
        self._point_steps = self._place_points()
        compatibility.check_rising(self.points, self._point_steps)
        if self._trial:
            trainer_state.tell_trial_points(self._point_steps, self._total, type(self).__name__)
        if (step := self._next_step) is None:
            return
        blind = self._observes(self._stage) and not self._observation.started
        point, now = self.points[self._stage], trainer_state.steps_done(trainer)
        compatibility.check_ahead(point, step, now, blind=blind)
        self._prepare_next(pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not (self._is_done or self._looked):  # others are ready by now
            warn_of_stale(trainer, pl_module, self.settings_at(self._stage).watched(pl_module))
        self._looked = True

    def _place_points(self) -> list[int]:
        """Return the steps of the points."""
        return self._within_run([self._step_of(x) for x in self.points], [1] * len(self.points[1:]))

    def _step_of(self, point: Point) -> int:
        """Return the step of a moment; in a trial run it may lie beyond the end."""
        return (point.place if self._trial else point.step)(self._total, self._per_epoch)

    def _within_run(self, at: list[int], gaps: list[int]) -> list[int]:
        """Return steps, in a trial run moved to where it has them; ``gaps`` are the least."""
        return squeeze(at, gaps, int(self._total), int(self._observes(0))) if self._trial else at

    def _prepare_next(self, module: nn.Module) -> None:
        """Prepare to observe before the next point, and check that the device can take it."""
        settings, observation = self.settings_at(self._stage), self._observation
        growth, told = self._growth(self._stage, module), self.verbose and not self._stage
        if self._observes(self._stage):
            self._window_steps = window_steps(self._window, self._total, self._per_epoch)
            observation.watch(module, settings)
        elif growth is None:
            return
        self._needed = check_memory(self._live, settings, observation, growth or 0, verbose=told)

    @property
    def _is_done(self) -> bool:
        return self._stage >= len(self.points)

    @property
    def _next_step(self) -> int | None:
        """The step of the next point, if there is one."""
        return self._point_steps[self._stage] if self._stage < len(self._point_steps) else None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._loaded is not None:
            self._tried = True
            if batch_idx > 0:  # resumed within an epoch: setting up the loader drew numbers
                trainer_state.restore_rng(self._loaded["processes"], self._processes)
            # once: a point may have drawn before the others
            for one in self._compression_callbacks(trainer):
                one._loaded = None
        now = trainer_state.steps_done(trainer)
        reached = self._next_step is not None and now >= self._next_step
        if reached and trainer_state.between_steps(trainer):
            self._run_point(trainer, pl_module, now)
        if self._next_step is not None and self._observes(self._stage):
            previous = self._point_steps[self._stage - 1] if self._stage else 0
            place = self._next_step - now, min(self._window_steps, self._next_step - previous)
            if self._observation.due(*place):
                self._check_unfrozen(trainer, pl_module)
                self._observation.open_step(batch, self._observation.turn(*place))
            elif not self._tried:  # what would fail at an observed step fails at the first one
                self._observation.open_step(batch, trial=True)
            self._tried = True
        self._timer.start(None if self._observation.observing else pl_module.device)

    @override
    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        if self._observation.observing:
            self._observation.before_backward(loss, trainer_state.loss_factor(trainer))

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._observation.close_step()
        self._timer.stop(self._phase())
        callbacks = self._compression_callbacks(trainer)
        if self._trial and trainer.is_last_batch and self is callbacks[-1]:  # all have observed it
            for one in callbacks:
                if one._next_step is not None and one._next_step <= one._total:
                    one._run_point(trainer, pl_module, one._next_step)
        if trainer_state.steps_done(trainer) >= self._total:  # before the last validation
            with structure_change(trainer, pl_module):
                self._end_training(trainer, pl_module)

    def _run_point(self, trainer: pl.Trainer, module: pl.LightningModule, now: int) -> None:
        trainer_state.drop_gradients(module)
        self._check_unfrozen(trainer, module)
        if self._observes(self._stage):
            self._observation.merge_()
            self._observation.check(self.points[self._stage])
        self._processes.reshard(module)
        names = self.settings_at(self._stage).select(module).names
        ddp.check_layers(module, names, self._processes, type(self).__name__)
        if not self._stage:
            trainer_state.notify_compression_start(module)
            if not any(x.report.samples for x in self._compression_callbacks(trainer)):
                sample_before(self.report, trainer, module, self._processes)
        told, lost = len(self.report.points), reporting.dropped_state(trainer, module, names)
        with structure_change(trainer, module):
            self._change_model(trainer, module, now)
        self._stage += 1
        self._observation.reset()
        if self._next_step is not None:
            self._prepare_next(module)
        trainer_state.reset_best_scores(trainer)
        for record in self.report.points[told:]:  # all is done: what follows cannot undo it
            record.note = "; ".join(filter(None, (record.note, lost)))
            self._validate_after(trainer, record)
            whole = self._run_report(trainer).points[0].model_before
            reporting.tell_point(trainer, record, whole, verbose=self.verbose)
        reporting.save_report(trainer, self._run_report(trainer), self._report_file)

    def _validate_after(self, trainer: pl.Trainer, record: PointRecord) -> None:
        """Add to the record of a point what validation gives after it."""
        if self.validate:
            record.metrics["after"] = trainer_state.run_validation(trainer)

    def _sync_structure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check that all processes have the same structure, and adapt what runs it."""
        ddp.sync_structure_(trainer, module, self._processes)
        unfreezing.rename_unfrozen_(trainer, module)

    def _warm_up(self, steps: float, scale: float) -> None:
        """Start a learning-rate warmup over a number or a fraction of all steps.

        Where their number is unknown, a fraction is one of those up to the point.
        """
        known = self._total if math.isfinite(self._total) else self._point_steps[self._stage]
        steps = steps if steps >= 1 else steps * known
        if steps >= 1 or scale != 1:
            assert self._live is not None
            self._restart.begin(Warmup(int(steps), scale), self._live[1], self._hooks)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = trainer_state.validation_figures(trainer)
        if figures:
            gap = self._total / _VALIDATIONS if math.isfinite(self._total) else 0
            self.report.note(trainer_state.steps_done(trainer), figures, gap)

    # The end

    def _end_training(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Do what follows the last step, once or more often; all have observed and changed."""

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with structure_change(trainer, pl_module):  # where training ended before its last step
            self._end_training(trainer, pl_module)
        sample_after(self.report, trainer, pl_module, self._processes)
        self.report.seconds_per_step |= self._timer.seconds_per_step()
        self.report.cpu_seconds = self._timer.of_cpu
        self.report.finish(trainer_state.steps_done(trainer))
        self.report.about = describe_run(trainer, pl_module, self._timer.started, self._timer.first)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.num_training_batches:
            raise ObservationError(
                f"{type(self).__name__} factored nothing: the training data has no batches"
            )
        reporting.warn_of_missed(trainer, self, self.points, self._point_steps, self._stage)
        callbacks = self._compression_callbacks(trainer)
        if self is callbacks[-1]:  # all of them have ended
            paths, verbose = [x._report_file for x in callbacks], any(x.verbose for x in callbacks)
            reporting.publish_report(trainer, self._run_report(trainer), paths, verbose=verbose)

    def _run_report(self, trainer: pl.Trainer) -> Report:
        """Return the joint report of all callbacks that change the model."""
        return Report.joined(one.report for one in self._compression_callbacks(trainer))

    @staticmethod
    def _compression_callbacks(trainer: pl.Trainer) -> "list[CompressionCallback]":
        return [one for one in trainer.callbacks if isinstance(one, CompressionCallback)]  # type: ignore[attr-defined]

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # others may never answer: what is saved now is this process's own
        self._processes = self._observation.processes = ONE_PROCESS
        self._remove_hooks()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        self._observation.drop_step()
        self._hooks.close()
        self._restart = Restart()
