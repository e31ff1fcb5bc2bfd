"""Factorize: replace linear layers by low-rank or Kronecker factors during a fit."""

import copy
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from rich.console import RenderableType
from torch import nn
from typing_extensions import override

from lrcompress.callbacks import compatibility, reporting, trainer_state
from lrcompress.callbacks.auto_keep import AutoKeepCallback
from lrcompress.callbacks.kept_batches import check_training_step, training_passes
from lrcompress.callbacks.memory import footprint_of
from lrcompress.callbacks.plan_preview import plan_preview
from lrcompress.callbacks.sampling import Sampling
from lrcompress.callbacks.scheduled import CompressionCallback
from lrcompress.callbacks.search_settings import MAX_TRIALS, check_free, points_and_keeps, search_of
from lrcompress.callbacks.sensitivity import DenseLayers, check_measurable
from lrcompress.callbacks.warmup import check_warmup
from lrcompress.engine.compress import check_budget
from lrcompress.engine.factored_layers import store_pivoted_
from lrcompress.engine.kronecker_shapes import check_layers
from lrcompress.engine.latency import check_unsharded, choose_and_install_
from lrcompress.engine.refit import check_whole
from lrcompress.engine.settings import Settings, check_present
from lrcompress.errors import PlatformError, SettingError
from lrcompress.objective import METHODS
from lrcompress.report import PointRecord
from lrcompress.schedules import Point
from lrcompress.statistics.masks import MASK, MaskSource


class Factorize(AutoKeepCallback):
    """Replace linear layers by low-rank ones at chosen points of an ordinary fit.

    Before each point it accumulates statistics in some of the training steps; at the point it
    factors the targeted layers, carries the optimizer's state over and lets training go on. A
    run that is interrupted and resumed ends as the uninterrupted one, bit for bit on the CPU;
    within an epoch that takes a data loader with a ``state_dict``, since Lightning starts any
    other one anew. Under DDP and FSDP2 each process observes its own batches and factors some
    of the layers. What happened is in ``report``.

    A weight ``W (out, in)`` becomes ``left right`` with ``left (out, rank)``, ``right (rank, in)``
    that minimise ``‖P (W − left right) Q‖²``; ``method`` gives the output metric ``PᵀP`` and the
    input metric ``QQᵀ``, see :mod:`lrcompress.objective`. A layer whose factors would not be
    smaller stays as it is, and so does one that nothing calls.

    Args:
        keep: Parameters that remain / parameters before, over the targeted layers, above 0 and
            at most 1. A list, falling, for several points. None if ``ranks`` or ``keeps`` cover
            every layer, or with ``latency``. ``auto``: the least that ends within ``drop`` of the
            dense model, found by trials on the validation data, which are then no test of it.
        at: When to factor: a fraction of all steps (``0.4``), ``"epoch:N"`` (after N epochs) or
            ``"step:N"``. A list, rising, for several points.
        method: What errors are measured in: ``svd``, ``fwsvd``, ``asvd``, ``drone``,
            ``row_fisher``, ``kfac`` or ``weighted_kfac``; or ``kronecker``: sums of Kronecker
            products, in the metric of ``kfac``, of dense layers and at one point.
        targets: Patterns of layer names such as ``*.attention.*``. By default all linear layers
            of numbered blocks: attention and feed-forward layers, not poolers and heads.
        exclude: Patterns of layers to leave out.
        allocation: ``uniform``: every layer keeps the same share; ``global``: ranks go where the
            predicted loss is; the default of ``row_fisher``, ``kfac`` and ``weighted_kfac``, the
            only methods that know it of every rank.
        ranks: Ranks of their own for layers matching a pattern; of ``kronecker``, terms.
        keeps: Shares of their own for layers matching a pattern.
        shapes: With ``kronecker``, the rows and columns of the first factors for layers matching
            a pattern, as ``{"*.query": [384, 768]}``; by default the divisors that lose least.
        keep_range: Least and greatest share that any one layer may keep.
        align: Ranks and widths are multiples of it, as far as no budget is lost by that.
        narrow_blocks: Let feed-forward blocks keep some of their inner features in place of ranks,
            where that is predicted to lose less: their layers become narrower dense ones, and
            what reads the features is solved anew. Blocks are found in the graph of the first
            step that is looked at; for methods that know the predicted loss.
            With ``"low_rank"`` what is left of their layers may have low rank besides.
        storage: What a low-rank matrix ends as: ``balanced`` factors of ``rank·(out + in)``
            parameters, or ``pivoted`` rows: ``rank`` rows and how the others follow from them,
            ``rank·(out + in − rank)``. The matrices are the same, but of higher ranks at the same
            ``keep``, by which less is lost, most of all at high ``keep``. What is trained are
            balanced factors, which bear higher learning rates; after the last step they are
            stored as pivoted rows. Checkpoints of before that hold balanced factors:
            ``lrcompress export --pivoted`` turns them, or :func:`~lrcompress.store_pivoted_`.
        window: How long before a point to observe: a fraction of all steps, ``"epoch:N"`` or
            ``"step:N"``.
        every_n_steps: Observe every n-th step of the window; by default every 10th, or more often
            where that would be fewer than 16 steps.
        max_tokens: Stop observing after so many tokens, padding excluded.
        also_observe: Statistics to accumulate besides the method's own. A checkpoint that holds
            them can be resumed with other methods and other ``keep``.
        fisher: Whose gradients: ``labels`` of the training data, or labels as the ``model``
            predicts them, for runs that have fitted their training data: exact with one
            prediction an example among up to 8 classes (a backward pass a class less one, of the
            observed steps), drawn otherwise.
        logits: For ``fisher: model``, the name of the submodule that returns the logits; by
            default the first output with ``.logits``.
        mask: Where a batch has its padding mask, 1 at tokens: a key (``text.mask`` for one
            within), an index or a function of the batch. ``~key``: nonzero at padding, as in
            torch's ``key_padding_mask``; ``labels``: -100 where nothing is predicted. None if
            nothing is padded. The default is the ``statistics_mask`` of a data module that has one.
        offload: Device for the statistics, ``cpu`` for large models; by default each layer's own.
        turns: Observe the layers in so many groups of about as many bytes, each in its part of the
            window: a device holds the statistics of one group, and the host those of the groups
            before it. By default of ``every_n_steps`` so many more steps are observed that a layer
            sees as many tokens; of ``max_tokens``, each group as many.
        deal: With several processes, let each observe some of the layers only, on its own batches:
            memory and time of observing are divided by their number, nothing is summed, and by
            default more steps are observed, so that a layer sees as many tokens. By default from
            1 GiB of statistics on; below, all processes observe all layers, and sums are added up.
        solve_device: Where layers are solved at a point, ``cpu`` where the accelerator is slow in
            float64 or short of memory; by default where each layer lies.
        refit_bias: Let biases take up the mean error, where the method knows the inputs.
        refit: At each point, solve left factors anew for what the compressed layers before them
            give, this share of the target from a layer's inputs before it; not under FSDP2.
        refit_tokens: On so many tokens, of the latest observed batches.
        shrink: Shares of their mean diagonal mixed into the input and the output metric.
        shared: Also factor layers used in several places, and untie tied weights.
        keep_measured: Leave layers as they are whose factors of the rank they would get are not
            faster on this machine, measured at the point in the Trainer's precision. The others
            then get lower ranks, so that ``keep`` is met; where that cannot be, the report says
            what remains.
        measured_tokens: How many tokens layers read while they are measured; by default as many
            as in a training step, padding excluded.
        latency: In place of ``keep`` or beside it, at one point: greatest time of the model / its
            time just before, such as ``0.5``, of the training step's forward pass in evaluation
            mode, eager, in the Trainer's precision. Layers are measured at all ranks, which share
            out time in place of parameters. Where it cannot be reached, layers stay as they are.
        latency_shape: Examples and length of the batch for it; by default those of the latest
            batch that was observed, whose examples and tokens are repeated or cut otherwise.
        restart_steps: Steps after a point over which the learning rate rises again, as a number
            or as a fraction of all steps.
        restart_scale: What the learning rate is multiplied by after the rise. SmolLM2
            healed at 5e-5 to 1e-4, and not at 2e-4.
        validate: Run validation just before and just after each point, for the report.
        measure_layers: At each point also measure, on the validation data, what every layer alone
            loses, beside what was predicted: one validation more a layer, for the report.
        report_path: JSON file for the report, written at each point and at the end, then with a
            page of figures beside it. ``auto``: ``report.json`` in the folder of the logger,
            without one in the trainer's ``default_root_dir``. None for no files.
        verbose: Print a table at each point and at the end.
        drop: With ``keep: auto``, by how much ``monitor`` may be worse than just before the first
            point: in its own units (``0.01``), or a share (``"1%"``). More may be lost at a point
            as far as training brings it back, as measured at points before, or half at a point
            that another follows. What is left then counts for good. The last state within
            ``drop`` is kept until the fit ends, for where the next point, or the end, is not.
        monitor: With ``keep: auto``, the metric, as validation logs it.
        monitor_mode: ``max`` or ``min``: which values are better; by default as its name says.
        max_trials: Validations a point at most; 7 find any hundredth of ``keep``.
        trial_share: Of the validation data, for the first trials; the last ones are on all of it.

    Raises:
        SettingError: If an argument is not what it may be. In ``fit``: if a point is in the past,
            beyond the end or of unknown step, or ``keep`` cannot be met.
        NoMatchError: In ``fit``: if a pattern matches no layer, or ``logits`` no submodule.
        LayerError: In ``fit``: if a targeted layer is frozen or cannot be factored.
        ShapeError: In ``fit``: if ``shapes`` do not divide a layer, or a mask is not
            ``(examples, length)``.
        ObservationError: In ``fit``: if there are no batches, no step was observed, a layer is
            called twice in a step or has no part in the loss, or the batch has no padding mask.
        NotFiniteError: In ``fit``: if a weight or a statistic holds a NaN or an infinity.
        PlatformError: In ``fit``: if the strategy, an optimizer or another callback does not
            allow a change of structure, or processes differ.
        CheckpointError: In ``fit``: if ``ckpt_path`` does not fit the model or its optimizers.

    Cost:
        At each point one symmetric eigendecomposition a layer, of its smaller side, and two
        validations unless ``validate=False``. Statistics take up to ``in² + out²`` float32 values
        a layer.

    Source:
        ``fwsvd``: Hsu et al., ICLR 2022, arXiv 2207.00112. ``asvd``: Yuan et al., arXiv
        2312.05821. ``drone``: Chen et al., NeurIPS 2021. ``kfac``: arXiv 2505.17974.

    Example:
        >>> callback = Factorize(keep=0.3, at="epoch:2")
        >>> callback.settings[0].method, str(callback.points[0])
        ('kfac', 'epoch:2')
    """

    _continues = True

    def __init__(
        self,
        keep: float | list[float] | Literal["auto"] | None = None,
        at: float | str | list[float | str] = 0.5,
        method: str = "kfac",
        targets: list[str] | None = None,
        exclude: list[str] | None = None,
        allocation: str | None = None,
        ranks: dict[str, int] | None = None,
        keeps: dict[str, float] | None = None,
        shapes: dict[str, list[int]] | None = None,
        keep_range: tuple[float, float] = (0.0, 1.0),
        align: int = 8,
        narrow_blocks: bool | str = False,
        storage: str = "balanced",
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
        refit_bias: bool = True,
        refit: float | None = None,
        refit_tokens: int = 8192,
        shrink: tuple[float, float] = (0.0, 0.1),
        shared: bool = False,
        keep_measured: bool = False,
        measured_tokens: int | None = None,
        latency: float | None = None,
        latency_shape: tuple[int, int] | None = None,
        restart_steps: float = 0.05,
        restart_scale: float = 1.0,
        validate: bool = True,
        measure_layers: bool = False,
        report_path: str | None = reporting.AUTO,
        verbose: bool = True,
        drop: float | str | None = None,
        monitor: str | None = None,
        monitor_mode: Literal["max", "min"] | None = None,
        max_trials: int = MAX_TRIALS,
        trial_share: float = 1.0,
    ) -> None:
        self.keep, self.at, self.method, self.window = keep, at, method, window
        self.restart_steps, self.restart_scale = restart_steps, restart_scale
        self.measure_layers = measure_layers
        self._makes_matrices = method != "kronecker"  # whose terms are stacked
        check_warmup(restart_steps, restart_scale)
        if keep is None and latency is None and not (ranks or keeps):
            raise SettingError("keep is missing: the share of parameters that remains, e.g. 0.3")
        points, keeps_at = points_and_keeps(at, keep, latency)
        self.settings = [
            Settings(
                method=method,
                keep=share,
                targets=targets,
                exclude=exclude or (),
                allocation=allocation,
                ranks=ranks or {},
                keeps=keeps or {},
                shapes=shapes or {},
                keep_range=keep_range,
                align=align,
                narrow_blocks=narrow_blocks,
                storage=storage,
                refit_bias=refit_bias,
                refit=refit,
                shrink=shrink,
                shared=shared,
                keep_measured=keep_measured,
                measured_tokens=measured_tokens,
                solve_device=solve_device,
                latency=latency,
                latency_shape=latency_shape,
            )
            for share in keeps_at
        ]
        asked = drop, monitor, monitor_mode, max_trials, trial_share
        self._search = search_of(keep, self.settings[0], *asked, verbose=verbose)
        if measure_layers:
            check_measurable(searched=self._search is not None, narrow_blocks=bool(narrow_blocks))
        if len(points) > 1 and METHODS[method].form != "low_rank":
            raise SettingError(
                f"method={method!r} factors dense layers, which they are at the first point "
                f"only; give one point, got at={at!r}"
            )
        kinds = dict.fromkeys((*METHODS[method].kinds, *(also_observe or ())))
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
            refit_tokens=refit_tokens if refit is not None else 1 if latency else None,
            owner=type(self).__name__,
        )
        super().__init__(
            points,
            sampling,
            window=Point.parse(window, "window"),
            validate=validate,
            report_path=report_path,
            verbose=verbose,
        )

    def between_fits(self, number: int, batches: int) -> "Factorize":
        """Return a callback that factors once, as this one does at a point, between two fits.

        Args:
            number: of the point, from 1.
            batches: how many training batches to observe, every one, before it factors.

        Raises:
            SettingError: if there is no such point, or ``batches`` is below 1.
        """
        if not 1 <= number <= len(self.points):
            raise SettingError(f"point must be from 1 to {len(self.points)}, got {number}")
        if self._search is not None:
            raise SettingError("keep='auto' is chosen within a fit; give keep as a number")
        if batches < 1:
            raise SettingError(f"batches must be a whole number from 1, got {batches}")
        made, when = copy.copy(self), Point("step", batches)
        made.settings = [self.settings[number - 1]]
        made.restart_steps, made.restart_scale = 0, 1
        CompressionCallback.__init__(
            made,
            [when],
            replace(self.sampling, every_n_steps=1),
            window=when,
            validate=self.validate,
            report_path=self.report_path,
            verbose=self.verbose,
        )
        return made

    @override
    def _reset(self) -> None:
        super()._reset()
        self._dense: DenseLayers | None = None  # while layers are measured

    @override
    def _remove_hooks(self) -> None:
        self._dense = None
        super()._remove_hooks()

    @property
    def _asked(self) -> list[list[Any]]:
        """Method and keep of every point, as a checkpoint holds them."""
        return [[one.method, one.keep] for one in self.settings]

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"asked": self._asked}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        compatibility.warn_of_others(state_dict.get("asked", [])[: self._stage], self._asked)

    @override
    def settings_at(self, stage: int) -> Settings:
        return self.settings[stage]

    @override
    def _growth(self, stage: int, module: nn.Module) -> int:
        return 0  # factors are smaller than what they replace

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        latency = self.settings[0].latency
        if self.sampling.refit_tokens:
            (check_whole if latency is None else check_unsharded)(self._processes)
            check_training_step(pl_module)
        if self._processes.sharded and self.measure_layers:
            raise PlatformError(
                "measure_layers=True puts layers back in turn, of which each process has only a "
                "part under FSDP2; leave it out, or use strategy='ddp'"
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._processes.sharded:
            self._check_layers(pl_module)
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._processes.sharded:  # by now the checkpoint has told what is done already
            self._check_layers(pl_module)
        super().on_train_start(trainer, pl_module)

    def _check_layers(self, module: nn.Module) -> None:
        """Check that layers can be factored, and as small as each point still to come asks."""
        for settings in self.settings[self._stage :]:
            check_layers(module, settings.select(module).names, settings)
            check_present("solve_device", settings.solve_device)
            check_budget(module, settings)
            if self._search is not None:
                check_free(module, settings)

    @override
    def _change_model(self, trainer: pl.Trainer, module: pl.LightningModule, now: int) -> None:
        seen, names = self._observation, self.settings[self._stage].select(module).names
        self._dense = DenseLayers(module, names) if self.measure_layers else None
        if self._search is None:
            before = trainer_state.run_validation(trainer) if self.validate else {}
            solved = self._solve(trainer, module, seen.statistics, seen.owner, seen.blocks)
            passes = training_passes(trainer, module, seen.kept, seen.sampling.mask)
            tell = reporting.tell if self.verbose else str
            record = choose_and_install_(solved, trainer.optimizers, now, passes, tell)
            self._sync_structure(trainer, module)
            record.metrics = {"before": before, "after": {}}
        else:
            record = self._search_keep(trainer, module, now)
        record.note = "; ".join(filter(None, (record.note, seen.dealt)))
        self.report.points.append(record)
        if not record.left_alone:
            self._warm_up(self.restart_steps, self.restart_scale)

    @override
    def _end_training(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Store the layers that were factored in the form asked for."""
        super()._end_training(trainer, module)
        done = [one for one in self.settings[: self._stage] if one.storage == "pivoted"]
        names = {name for one in done for name in one.select(module).names}
        if store_pivoted_(module, names, trainer.optimizers, processes=self._processes):
            self._sync_structure(trainer, module)

    @override
    def _validate_after(self, trainer: pl.Trainer, record: PointRecord) -> None:
        if self._search is None:  # which has tried the very model
            super()._validate_after(trainer, record)
        dense, self._dense = self._dense, None
        if dense is not None:
            module = trainer.lightning_module
            track = reporting.progress_bar(trainer, verbose=self.verbose)
            lost = dense.loss_increases(trainer, module, record.layers, track)
            record.layers = [replace(x, measured_loss=lost.get(x.name)) for x in record.layers]

    @override
    def preview(self, model: nn.Module) -> RenderableType:
        """Return what the first point would do to ``model``, as a table; nothing is changed.

        Raises:
            NoMatchError: if a pattern matches no layer.
            LayerError: if a targeted layer cannot be factored.
            SettingError: if ``keep`` cannot be met.
            ShapeError: if ``shapes`` do not divide a layer.
        """
        settings, live = self.settings[0], self._live
        steps = zip(self.points, self._point_steps, strict=False)
        placed = [f"point {point} is step {step:,} of {self._total:,.0f}" for point, step in steps]
        needed = self._needed or footprint_of(
            model, settings, self._observation, live[1] if live else ()
        )
        place, searched = str(self.points[0]), self._search is not None
        return plan_preview(model, settings, place, placed, needed.lines, searched=searched)
