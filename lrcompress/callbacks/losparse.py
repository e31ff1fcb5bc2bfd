"""LoSparse: low rank plus sparse rows, pruned during a fit."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from rich.console import RenderableType
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lrcompress.callbacks import compatibility, ddp, reporting, trainer_state
from lrcompress.callbacks.memory import footprint_of
from lrcompress.callbacks.reporting import AUTO
from lrcompress.callbacks.sampling import Sampling
from lrcompress.callbacks.scheduled import CompressionCallback
from lrcompress.engine.settings import Settings, check_present
from lrcompress.errors import PlatformError, SettingError
from lrcompress.importance import Importance
from lrcompress.objective import METHODS, few_tokens
from lrcompress.pruning import LoSparseBudget, Pruner, check_dense, growth, preview, split_
from lrcompress.report import PointRecord
from lrcompress.report.tables import plan_table
from lrcompress.schedules import Cubic, Point
from lrcompress.statistics.masks import MASK, MaskSource
from lrcompress.structure.parameter_counts import sizes_before, stored_bytes

_FROM, _UNTIL = 0.1, 0.6  # of the way from `at` to the end
_BUDGETS = 100  # values of keep during pruning, for the report


class LoSparse(CompressionCallback):
    """Prune layers, ``W = left right + S``, to low rank plus few rows during a fit.

    At ``at`` each targeted weight ``W (out, in)`` is split by a truncated SVD into
    ``left (out, rank)``, ``right (rank, in)`` and the remainder ``S (out, in)``, so that nothing
    is lost. Then the rows of all ``S`` together are pruned gradually, those first on which the
    loss depends least: a row's score is the mean of ``|p·∂L/∂p|``, averaged over windows of
    ``mask_every`` steps and between them with ``beta1``; the share of ``S`` that stays falls from
    1 to its final value by a cubic schedule. A pruned row stays at zero. Where pruning ends,
    layers are replaced by compact ones of the surviving rows, faster and at most as large as
    ``keep`` says, and training goes on. With default arguments this is the algorithm of
    LoSparse; the others go beyond it. A run can be resumed at any step as with
    :class:`~lrcompress.Factorize`.

    Args:
        keep: Parameters that remain / parameters before, over the targeted layers. At 1 layers
            are split and nothing is pruned.
        low_rank_share: Share of the kept parameters that go to the factors, the rest to rows.
            1: low rank alone, whose rank falls during training. ``auto``: ranks and rows compete
            for one budget by the loss that each is predicted to save a parameter.
        at: When to split: a fraction of all steps, ``"epoch:N"`` or ``"step:N"``; 0 is before
            the first step.
        init: What the truncated SVD measures errors in, one of ``Factorize``'s methods; all but
            ``svd`` are observed in training, so ``at`` must not be 0.
        prune_from: When pruning starts; by default a tenth of the way from ``at`` to the end.
        prune_until: When it ends; by default at six tenths.
        fix_at: When structure is fixed and layers are compacted; by default where pruning ends,
            or half of the way from there to the end if pruned units may be revived.
        initial_rank: Share of the full rank that factors start with; rank components are then
            pruned as well, by ``|σ·∂L/∂σ|``, under the same schedule. By default factors have
            their final rank from the start, full rank where there is no sparse part.
        mask_every: Steps between two masks, over which scores are averaged.
        beta1: Of the moving average of scores.
        beta2: Of PLATON's uncertainty, which multiplies the scores; 1 leaves it out.
        row_score: ``mean`` of ``|p·∂L/∂p|`` over a row, or ``group``: ``|Σ p·∂L/∂p|``, what the
            loss is predicted to change by.
        granularity: Prune ``rows``, or single ``entries``, which makes nothing faster and cannot be
            done under FSDP2.
        revive: Let pruned rows compete again at every mask, until ``fix_at``, with the averages
            they were pruned with, which fade.
        targets: Patterns of layer names such as ``*.attention.*``. By default all linear layers
            of numbered blocks: attention and feed-forward layers, not poolers and heads.
        exclude: Patterns of layers to leave out.
        allocation: ``uniform``: every layer's factors have the same share of it; ``global``:
            ranks go where the predicted loss is; the default where ``init`` knows it.
        refit_bias: Let biases take up the mean of what is pruned, where ``init`` knows the inputs.
        window: How long before ``at`` to observe.
        every_n_steps: Observe every n-th step of the window; by default every 10th, or more often
            where that would be fewer than 16 steps.
        max_tokens: Stop observing after so many tokens, padding excluded.
        also_observe: Statistics to accumulate besides those of ``init``.
        fisher: Whose gradients to observe: of ``labels``, or of labels as the ``model`` predicts.
        logits: For ``fisher: model``, the name of the submodule that returns the logits.
        mask: Where a batch has its padding mask, as in ``Factorize``. None if nothing is padded.
        offload: Device for the statistics; by default each layer's own.
        turns: Observe layers in so many groups, one after the other, as in ``Factorize``.
        deal: Let each process observe some of the layers only, as in ``Factorize``.
        solve_device: Where layers are solved; by default where each lies.
        shrink: Shares of their mean diagonal mixed into the input and the output metric.
        validate: Run validation before splitting and after compacting, for the report.
        report_path: JSON file for the report, with a page of figures beside it; ``auto`` and None
            are as for ``Factorize``.
        verbose: Print a table where structure is fixed and at the end.

    Raises:
        SettingError: If an argument is not what it may be, or two do not go together. In ``fit``:
            if phases are not in order, ``keep`` is below one rank a layer, or two callbacks
            target one layer.
        NoMatchError: In ``fit``: if a pattern matches no layer, or ``logits`` no submodule.
        LayerError: In ``fit``: if a targeted layer is frozen, factored already or of another type.
        ObservationError: In ``fit``: if there are no batches or no statistics.
        ShapeError: In ``fit``: if a mask is not ``(examples, length)``.
        NotFiniteError: In ``fit``: if a weight or a statistic holds a NaN or an infinity.
        PlatformError: In ``fit``: if the strategy, an optimizer or another callback does not
            allow a change of structure, or processes differ.
        CheckpointError: In ``fit``: if ``ckpt_path`` does not fit the model or its optimizers.

    Source:
        Li et al., "LoSparse", ICML 2023, arXiv 2306.11222. ``beta2``: Zhang et al., "PLATON",
        ICML 2022, arXiv 2206.12562. ``initial_rank``: Zhang et al., "AdaLoRA" (2023).

    Example:
        >>> callback = LoSparse(keep=0.2, low_rank_share=0.25)
        >>> callback.shares.granularity, callback.settings.method
        ('rows', 'svd')
    """

    _keeps_averages = False  # what is pruned would come back from them

    def __init__(
        self,
        keep: float,
        low_rank_share: float | str = 0.25,
        at: float | str = 0.0,
        init: str = "svd",
        prune_from: float | str | None = None,
        prune_until: float | str | None = None,
        fix_at: float | str | None = None,
        initial_rank: float | None = None,
        mask_every: int = 10,
        beta1: float = 0.85,
        beta2: float = 1.0,
        row_score: str = "mean",
        granularity: str = "rows",
        revive: bool = False,
        targets: list[str] | None = None,
        exclude: list[str] | None = None,
        allocation: str | None = None,
        refit_bias: bool = True,
        window: float | str = "epoch:1",
        every_n_steps: int | None = None,
        max_tokens: int | None = None,
        also_observe: list[str] | None = None,
        fisher: str = "labels",
        logits: str | None = None,
        mask: MaskSource = MASK,
        offload: str | None = None,
        turns: int = 1,
        deal: bool | None = None,
        solve_device: str | None = None,
        shrink: tuple[float, float] = (0.0, 0.1),
        validate: bool = True,
        report_path: str | None = AUTO,
        verbose: bool = True,
    ) -> None:
        self.keep, self.low_rank_share, self.at, self.init = keep, low_rank_share, at, init
        self.prune_from, self.prune_until, self.fix_at = prune_from, prune_until, fix_at
        self.mask_every, self.beta1, self.beta2 = mask_every, beta1, beta2
        self.shares = LoSparseBudget(
            keep=keep,
            low_rank_share=low_rank_share,
            initial_rank=initial_rank,
            row_score=row_score,
            granularity=granularity,
            revive=revive,
        )
        self.settings = Settings(
            method=init,
            keep=keep,
            targets=targets,
            exclude=exclude or (),
            allocation=allocation,
            refit_bias=refit_bias,
            shrink=shrink,
            solve_device=solve_device,
        )
        self.shares.check_method(init)
        if not isinstance(mask_every, int) or mask_every < 1:
            raise SettingError(f"mask_every must be a whole number from 1, got {mask_every!r}")
        Importance(beta1, beta2)  # checks them
        kinds = dict.fromkeys((*METHODS[init].kinds, *(also_observe or ())))
        sampling = Sampling(
            kinds=tuple(kinds),
            every_n_steps=every_n_steps,
            max_tokens=max_tokens,
            fisher=fisher,
            logits=logits,
            mask=mask,
            offload=offload,
            turns=turns,
            deal=deal,
            owner=type(self).__name__,
        )
        self._given = {
            name: None if value is None else Point.parse(value, name)
            for name, value in (
                ("prune_from", prune_from),
                ("prune_until", prune_until),
                ("fix_at", fix_at),
            )
        }
        super().__init__(
            [Point.parse(at)],
            sampling,
            window=Point.parse(window, "window"),
            validate=validate,
            report_path=report_path,
            verbose=verbose,
        )

    @override
    def _reset(self) -> None:
        super()._reset()
        self._pruner: Pruner | None = None
        self._split_record: dict[str, Any] = {"metrics": {}, "observed": {}, "budget": []}

    @override
    def settings_at(self, stage: int) -> Settings:
        return self.settings

    @override
    def _observes(self, stage: int) -> bool:
        return stage == 0 and bool(self.sampling.kinds)

    @override
    def _growth(self, stage: int, module: nn.Module) -> int | None:
        names = self.settings.select(module).names
        return None if stage else growth(module, names, self.shares)

    @override
    def _phase(self) -> str:
        return ("dense", "pruning", "factored")[self._stage]

    def _importance(self) -> Importance:
        return Importance(self.beta1, self.beta2, self.mask_every)

    # Structure and state

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._processes.sharded and self.shares.granularity == "entries":
            raise PlatformError(
                "granularity='entries' scores every entry of a layer, of which each process has "
                "only some under FSDP2; use granularity='rows', or strategy='ddp'"
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_present("solve_device", self.settings.solve_device)
        names = self.settings.select(pl_module).names
        compatibility.check_alone(trainer, names, self, CompressionCallback)
        super().on_fit_start(trainer, pl_module)

    @override
    def _resume(
        self, module: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Any]
    ) -> None:
        super()._resume(module, optimizers, state)
        if self._stage:  # what was split for one budget cannot serve another
            self.shares.check_same(state["shares"])
        self._split_record = dict(state["split"])
        if state["pruner"] is not None:
            self._pruner = Pruner.from_state(
                state["pruner"], module, self.shares, self._importance(), self._processes
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._live is None:
            return state
        pruner = None if self._pruner is None else self._pruner.state_dict()
        return state | {
            "pruner": pruner,
            "split": self._split_record,
            "shares": asdict(self.shares),
        }

    # During the fit

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._stage:  # now, and not at the point, after the dense epochs
            check_dense(pl_module, self.settings.select(pl_module).names)
        super().on_train_start(trainer, pl_module)

    @override
    def _place_points(self) -> list[int]:
        total, per_epoch = self._total, self._per_epoch
        start = self._step_of(self.points[0])

        def step(name: str, after: int, share: float) -> int:
            given = self._given[name]
            if given is None:
                if not share:
                    return after
                Point("fraction", share).step(total, per_epoch)  # raises where length is unknown
                return after + round(share * (total - after))
            return self._step_of(given)

        begin, end = step("prune_from", start, _FROM), step("prune_until", start, _UNTIL)
        fixed = step("fix_at", end, 0.5 if self.shares.revive else 0.0)
        start, begin, end, fixed = self._within_run([start, begin, end, fixed], [0, 1, 0])
        if not (start <= begin < end <= fixed < total or self._trial):
            raise SettingError(
                "phases must follow each other, at ≤ prune_from < prune_until ≤ fix_at < end; got "
                f"at step {start}, prune_from {begin}, prune_until {end}, fix_at {fixed} of "
                f"{total:g} steps; those not given lie between at and the end"
            )
        self._schedule = Cubic(begin, end, 0.0)
        self.points = [self.points[0], Point("step", fixed)]
        return [start, fixed]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        now, pruner = trainer_state.steps_done(trainer), self._pruner
        if pruner is None or self._stage != 1 or not trainer_state.between_steps(trainer):
            return
        if now >= self._schedule.start and pruner.importance.steps == 0:
            self._processes.reshard(pl_module)
            pruner.prune_(self._schedule(now), trainer.optimizers)
            kept = self._split_record["budget"]
            enough = (self._point_steps[1] - self._schedule.start) / _BUDGETS
            due = not kept or now - kept[-1][0] >= enough
            if trainer.loggers or due:
                keep = pruner.keep
                reporting.log_figures(trainer, {"keep": keep})
                self._split_record["budget"] = [*kept, [now, keep]] if due else kept

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        pruner = self._pruner
        if pruner is None or self._stage != 1 or pruner.done:
            return
        self._processes.reshard(pl_module)
        if not pruner.trained_by(optimizer):
            return
        if self.shares.revive or trainer_state.steps_done(trainer) < self._schedule.stop:
            pruner.observe(trainer_state.gradient_factor(trainer, optimizer))

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._pruner is not None:
            self._pruner.hold_(trainer.optimizers)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def _change_model(self, trainer: pl.Trainer, module: pl.LightningModule, now: int) -> None:
        if self._stage == 0:
            self._split(trainer, module, now)
        else:
            self._fix(trainer, module, now)

    def _split(self, trainer: pl.Trainer, module: pl.LightningModule, now: int) -> None:
        chosen, statistics = self.settings.select(module), self._observation.statistics
        metrics = trainer_state.run_validation(trainer) if self.validate and now else {}
        known = {"observed": statistics.figures(), "budget": [], "alone": chosen.note}
        self._split_record = {"metrics": metrics, **known, "seen": self._observation.dealt}
        optimizers, processes = trainer.optimizers, self._processes
        means, quotas = split_(
            module,
            statistics,
            self.settings,
            self.shares,
            optimizers=optimizers,
            processes=processes,
            owner=self._observation.owner,
            track=reporting.progress_bar(trainer, verbose=self.verbose),
        )
        self._sync_structure(trainer, module)
        self._pruner = Pruner(
            module, chosen.names, quotas, self.shares, self._importance(), means, processes
        )

    def _fix(self, trainer: pl.Trainer, module: pl.LightningModule, now: int) -> None:
        assert self._pruner is not None
        started = time.perf_counter()
        if not self._pruner.importance.known:  # fewer steps than one window
            self._pruner.importance.close()
        self._pruner.prune_(0.0, trainer.optimizers)
        # the same units, before they are structure
        ddp.check_same_parameters(module, self._processes)
        before, bytes_before = sizes_before(module)
        layers = self._pruner.compact_(module, trainer.optimizers)
        self._sync_structure(trainer, module)
        after = sum(p.numel() for p in module.parameters())
        seconds = time.perf_counter() - started
        method = "LoSparse" if self.init == "svd" else f"LoSparse from {self.init}"
        observed, inputs = self._split_record["observed"], max(x.in_features for x in layers)
        few = few_tokens(self.settings.method, observed.get("tokens", 0), inputs)
        record = PointRecord(
            method,
            now,
            layers,
            before,
            after,
            observed,
            seconds,
            bytes_before=bytes_before,
            bytes_after=stored_bytes(module),
            budget=tuple(map(tuple, self._split_record["budget"])),
            note="; ".join(filter(None, (*map(self._split_record.get, ("alone", "seen")), few))),
        )
        record.metrics = {"before": self._split_record["metrics"], "after": {}}
        self.report.points.append(record)
        if not self._pruner.masks:
            self._pruner = None

    @override
    def preview(self, model: nn.Module) -> RenderableType:
        """Return what would become of ``model``, as a table; nothing is changed.

        Raises:
            NoMatchError: if a pattern matches no layer.
            LayerError: if a targeted layer is factored already or of another type.
            SettingError: if ``keep`` is less than one rank a layer takes.
        """
        records, selection, nbytes = preview(model, self.settings, self.shares)
        title = f"LoSparse: init {self.init}, keep {self.keep}, split at {self.at}"
        notes = [f"left alone: {name}: {why}" for name, why in selection.left_alone.items()]
        notes.append("ranks and rows are shown uniform; training shares them out by their scores")
        if self._point_steps:
            split, fixed = self._point_steps
            notes.append(
                f"split at step {split:,}, pruned from {self._schedule.start:,} to "
                f"{self._schedule.stop:,}, compacted at {fixed:,}, of {self._total:,.0f} steps"
            )
        given = self._observation, self._live[1] if self._live else (), self._growth(0, model) or 0
        notes += (self._needed or footprint_of(model, self.settings, *given)).lines
        whole = sum(p.numel() for p in model.parameters())
        return plan_table(records, title, whole, nbytes, notes)
