"""The callback that makes a fine-tune come out smaller."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console, RenderableType
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lrcompress.callbacks import platform
from lrcompress.callbacks.observation import Observation, Sampling
from lrcompress.callbacks.restart import Restart
from lrcompress.engine import Settings, factor_, preview
from lrcompress.errors import CheckpointError, LayerError, ObservationError, SettingError
from lrcompress.objective import METHODS
from lrcompress.plan import Plan
from lrcompress.report import Report
from lrcompress.report.tables import plan_table, point_table, summary_table
from lrcompress.schedules import Point, Warmup
from lrcompress.statistics.batches import MASK
from lrcompress.statistics.views import view

VERSION = 1


class Factorize(pl.Callback):
    """Replace linear layers by low-rank ones at chosen points of an ordinary fit.

    Before each point it accumulates statistics in some of the training steps; at the point it
    factors the targeted layers, carries the optimizer's state over and lets training go on. A
    run that is interrupted and resumed ends as the uninterrupted one, bit for bit on one CPU
    device; within an epoch that takes a data loader with a ``state_dict``, since Lightning
    starts any other one anew. What happened is in ``report``.

    Args:
        keep: Parameters that remain / parameters before, over the targeted layers, above 0 and
            at most 1. A list, falling, for several points.
        at: When to factor: a fraction of all steps (``0.4``), ``"epoch:N"`` (after N epochs) or
            ``"step:N"``. A list, rising, for several points.
        method: What errors are measured in: ``svd``, ``fwsvd``, ``asvd``, ``drone``,
            ``row_fisher``, ``kfac`` or ``weighted_kfac``.
        targets: Patterns of layer names such as ``*.attention.*``. By default all linear layers
            of numbered blocks: attention and feed-forward layers, not poolers and heads.
        exclude: Patterns of layers to leave out.
        allocation: ``uniform``: every layer keeps the same share; ``global``: ranks go where the
            predicted loss is; the default of the last three methods, the only ones that know it.
        ranks: Ranks of their own for layers matching a pattern.
        keeps: Shares of their own for layers matching a pattern.
        keep_range: Least and greatest share that any one layer may keep.
        align: Ranks are multiples of it, as far as no budget is lost by that.
        window: How long before a point to observe: a fraction of all steps, ``"epoch:N"`` or
            ``"step:N"``.
        every_n_steps: Observe every n-th step of the window; by default every 10th, or more often
            where that would be fewer than 16 steps.
        max_tokens: Stop observing after so many tokens, padding excluded.
        also_observe: Statistics to accumulate besides the method's own. A checkpoint that holds
            them can be resumed with other methods and other ``keep``.
        fisher: Whose gradients: ``labels`` of the training data, or labels drawn from the
            ``model``'s own prediction, for runs that have fitted their training data.
        logits: For ``fisher: model``, the name of the submodule that returns the logits; by
            default the first output with ``.logits``.
        mask: Key of the batch's padding mask; None if nothing is padded.
        offload: Device for the statistics, ``cpu`` for large models; by default each layer's own.
        refit_bias: Let biases take up the mean error, where the method knows the inputs.
        shrink: Shares of their mean diagonal mixed into the input and the output metric.
        shared: Also factor layers used in several places, and untie tied weights.
        restart_steps: Steps after a point over which the learning rate rises again, as a number
            or as a fraction of all steps.
        restart_scale: What the learning rate is multiplied by after the rise.
        validate: Run validation just before and just after each point, for the report.
        report_path: File to write the report to, as JSON, at each point and at the end.
        verbose: Print a table at each point and at the end.

    Raises:
        SettingError: If an argument is not what it may be.

    Example:
        >>> callback = Factorize(keep=0.3, at="epoch:2")
        >>> callback.settings[0].method, str(callback.points[0])
        ('kfac', 'epoch:2')
    """

    def __init__(
        self,
        keep: float | list[float] | None = None,
        at: float | str | list[float | str] = 0.5,
        method: str = "kfac",
        targets: list[str] | None = None,
        exclude: list[str] | None = None,
        allocation: str | None = None,
        ranks: dict[str, int] | None = None,
        keeps: dict[str, float] | None = None,
        keep_range: tuple[float, float] = (0.0, 1.0),
        align: int = 8,
        window: float | str = "epoch:1",
        every_n_steps: int | None = None,
        max_tokens: int | None = None,
        also_observe: list[str] | None = None,
        fisher: str = "labels",
        logits: str | None = None,
        mask: str | None = MASK,
        offload: str | None = None,
        refit_bias: bool = True,
        shrink: tuple[float, float] = (0.0, 0.1),
        shared: bool = False,
        restart_steps: float = 0.05,
        restart_scale: float = 1.0,
        validate: bool = True,
        report_path: str | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self.keep, self.at, self.method, self.window = keep, at, method, window
        self.restart_steps, self.restart_scale = restart_steps, restart_scale
        self.validate, self.report_path, self.verbose = validate, report_path, verbose
        self.points = [Point.parse(one) for one in (at if isinstance(at, list) else [at])]
        self._window = Point.parse(window)
        keeps_at = keep if isinstance(keep, list) else [keep]
        if keep is None and not (ranks or keeps):
            raise SettingError("keep is missing: the share of parameters that remains, e.g. 0.3")
        if len(keeps_at) != len(self.points):
            raise SettingError(
                f"give one keep for every point, such as keep=[0.5, 0.2] for at=[0.3, 0.6]; "
                f"got keep={keep!r} for at={at!r}"
            )
        if any(b >= a for a, b in pairwise(keeps_at) if a and b):
            raise SettingError(f"keep must fall from point to point, got {keep!r}")
        self.settings = [
            Settings(
                method=method,
                keep=share,
                targets=targets,
                exclude=exclude or (),
                allocation=allocation,
                ranks=ranks or {},
                keeps=keeps or {},
                keep_range=keep_range,
                align=align,
                refit_bias=refit_bias,
                shrink=shrink,
                shared=shared,
            )
            for share in keeps_at
        ]
        kinds = dict.fromkeys((*METHODS[method].kinds, *(also_observe or ())))
        self.sampling = Sampling(
            kinds=tuple(kinds),
            every_n_steps=every_n_steps,
            max_tokens=max_tokens,
            fisher=fisher,
            logits=logits,
            mask=mask,
            offload=offload,
            owner=type(self).__name__,
        )
        if not restart_steps >= 0:
            raise SettingError(f"restart_steps must not be negative, got {restart_steps!r}")
        if not 0 < restart_scale <= 10:
            raise SettingError(
                f"restart_scale must be above 0 and at most 10, got {restart_scale!r}"
            )
        self._hooks = ExitStack()  # for the fit
        self._reset()

    def _reset(self) -> None:
        self.report = Report()
        self._observation = Observation(self.sampling)
        self._stage = 0  # points that are done
        self._at_steps: list[int] = []
        self._restart: Restart | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._live: tuple[pl.LightningModule, Sequence[Optimizer]] | None = None
        self._times: dict[str, list[float]] = {"dense": [0, 0.0], "factored": [0, 0.0]}
        self._started: float | None = None

    @property
    @override
    def state_key(self) -> str:
        settings = self.settings[0]
        return self._generate_state_key(
            at=self.at, targets=settings.targets, exclude=list(settings.exclude)
        )

    # Structure and state

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._hooks.close()
            self._reset()
            platform.refuse(trainer, type(self).__name__)
        follow = pl_module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _follow_checkpoint
        )
        self._hooks.callback(follow.remove)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._live = (pl_module, trainer.optimizers)
        names = self.settings[0].select(pl_module).names
        for name in names:
            if not view(pl_module.get_submodule(name)).parameters[0].requires_grad:
                raise LayerError(
                    f"layer {name!r} is frozen: its factors would not be trained; unfreeze it, "
                    "leave it out with exclude=, or call lrcompress.compress() on the model"
                )
        if self._loaded is not None:
            self._resume(pl_module, trainer.optimizers, self._loaded)

    def _resume(
        self, module: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Any]
    ) -> None:
        plan, found = Plan.from_dict(state["plan"]), Plan.of(module)
        if plan != found:
            raise CheckpointError(
                f"the checkpoint was written with {len(plan)} factored layers, the model has "
                f"{len(found)} of other sizes or names; load it through Trainer.fit(ckpt_path=...)"
            )
        platform.reorder_(module, optimizers, state["param_names"])
        device = next(module.parameters()).device
        self._observation.load_state_dict(state["observation"], device)
        platform.set_rng_state(state["rng"])  # the loader draws its order from here
        if state["restart"] is not None:
            self._begin_restart(Warmup(**state["restart"]["schedule"]), state["restart"]["taken"])

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._live is None:
            return {"version": VERSION, "stage": self._stage}
        module, optimizers = self._live
        restart = self._restart
        return {
            "version": VERSION,
            "plan": Plan.of(module).to_dict(),
            "stage": self._stage,
            "param_names": platform.parameter_names(module, optimizers),
            "observation": self._observation.state_dict(),
            "report": self.report.to_dict(),
            "restart": restart
            and {"schedule": vars(restart.schedule).copy(), "taken": restart.taken},
            "rng": platform.rng_state(),
            "times": {name: list(spent) for name, spent in self._times.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != VERSION:
            raise CheckpointError(
                f"expected Factorize state of version {VERSION}, "
                f"got version {state_dict.get('version')!r}"
            )
        if "plan" not in state_dict:
            return
        self._loaded = state_dict
        self._stage = state_dict["stage"]
        self.report = Report.from_dict(state_dict["report"])
        self._times = {name: list(spent) for name, spent in state_dict["times"].items()}

    # The course of a fit

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total, per_epoch = platform.lengths(trainer)
        self._at_steps = [point.step(total, per_epoch) for point in self.points]
        if sorted(set(self._at_steps)) != self._at_steps:
            raise SettingError(f"points must rise, got {self.at!r}, steps {self._at_steps}")
        step = self._next
        if step is None:
            return
        point = self.points[self._stage]
        now = platform.steps_done(trainer)
        blind = self.sampling.kinds and not self._observation.statistics.steps and step == now
        if step < now or blind:
            lies = "lies in the past" if step < now else "leaves no step to observe before it"
            raise SettingError(
                f"point {point} is step {step}, which {lies}: training starts at step {now}"
            )
        total_window = total if self._window.unit == "fraction" else float("inf")
        self._window_steps = max(1, self._window.step(total_window, per_epoch))
        nbytes = self._observation.watch(pl_module, self.settings[self._stage])
        if nbytes and self.verbose:
            rank_zero_info(f"lrcompress: statistics will take at most {nbytes / 2**20:.0f} MiB")

    @property
    def _next(self) -> int | None:
        """The step of the next point, if there is one."""
        return self._at_steps[self._stage] if self._stage < len(self._at_steps) else None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._loaded is not None:
            if batch_idx > 0:  # resumed within an epoch: setting up the loader drew numbers
                platform.set_rng_state(self._loaded["rng"])
            self._loaded = None
        now = platform.steps_done(trainer)
        if self._next is not None and now >= self._next and platform.between_steps(trainer):
            self._factor(trainer, pl_module, now)
        if self._next is not None:
            previous = self._at_steps[self._stage - 1] if self._stage else 0
            window = min(self._window_steps, self._next - previous)
            if self._observation.due(self._next - now, window):
                self._observation.open_step(batch)
        self._started = None if self._observation.watching else time.perf_counter()

    @override
    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        if self._observation.watching:
            finite = bool(loss.isfinite())
            self._observation.before_backward(finite, platform.loss_factor(trainer))

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
        if self._started is not None:
            spent = self._times["factored" if self._stage else "dense"]
            spent[0] += 1
            spent[1] += time.perf_counter() - self._started
            self._started = None

    def _factor(self, trainer: pl.Trainer, module: pl.LightningModule, now: int) -> None:
        settings = self.settings[self._stage]
        self._observation.check(self.points[self._stage])
        before = platform.validate(trainer) if self.validate else {}
        statistics = self._observation.statistics
        record = factor_(module, statistics, settings, optimizers=trainer.optimizers, step=now)
        after = platform.validate(trainer) if self.validate else {}
        record.metrics = {"before": before, "after": after}
        self.report.points.append(record)
        self._stage += 1
        self._observation.forget()
        if self._next is not None:
            self._observation.watch(module, self.settings[self._stage])
        platform.reset_best(trainer)
        total, _ = platform.lengths(trainer)
        steps = self.restart_steps if self.restart_steps >= 1 else self.restart_steps * total
        if steps >= 1 or self.restart_scale != 1:
            self._begin_restart(Warmup(int(steps), self.restart_scale), 0)
        self._save_report(trainer)
        if self.verbose:
            platform.show(trainer, point_table(record))
        platform.log(trainer, record.figures())

    def _begin_restart(self, schedule: Warmup, taken: int) -> None:
        assert self._live is not None
        if self._restart is not None:
            self._restart.schedule, self._restart.taken = schedule, taken
            return
        self._restart = Restart(schedule, taken)
        self._restart.attach(self._live[1], self._hooks)

    # The end

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, (steps, seconds) in self._times.items():
            if steps:
                self.report.seconds_per_step[name] = seconds / steps
        known = self.report.points[0].metrics.get("before", {}) if self.report.points else {}
        seen = trainer.callback_metrics
        self.report.final = {name: float(seen[name]) for name in known if name in seen}
        self._save_report(trainer)

    def _save_report(self, trainer: pl.Trainer) -> None:
        if self.report_path is not None and trainer.is_global_zero:
            self.report.save(self.report_path)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.num_training_batches:
            raise ObservationError(
                f"{type(self).__name__} factored nothing: the training data has no batches"
            )
        missed = self.points[self._stage :]
        if missed:
            rank_zero_warn(
                f"{type(self).__name__} did not reach point {missed[0]}: training ended at step "
                f"{platform.steps_done(trainer)}, the point was step "
                f"{self._at_steps[self._stage]}"
            )
        if self.report.points and self.verbose and trainer.is_global_zero:
            Console().print(summary_table(self.report))

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        self._observation.close_step()
        self._hooks.close()
        self._restart = None

    def preview(self, model: nn.Module) -> RenderableType:
        """Return what the first point would do to ``model``, as a table; nothing is changed."""
        settings = self.settings[0]
        records, selection, nbytes = preview(model, settings)
        title = f"Factorize: {settings.method}, keep {settings.keep}, at {self.points[0]}"
        notes = [f"left alone: {name}: {why}" for name, why in selection.left_alone.items()]
        if settings.spread == "global":
            notes.append("ranks are shown uniform; global allocation shares them out at the point")
        whole = sum(p.numel() for p in model.parameters())
        return plan_table(records, title, whole, nbytes, notes)


def _follow_checkpoint(
    module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: object
) -> None:
    """Give the module the structure of the state dict it is about to load."""
    Plan.matching(module, state_dict, prefix).apply_(module)
