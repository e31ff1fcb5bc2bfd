"""DSEE: train sparse low-rank updates of a frozen backbone and prune it, during a fit."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from rich.console import RenderableType
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lrcompress.budget import check_keep
from lrcompress.callbacks import reporting, trainer_state
from lrcompress.callbacks.reporting import AUTO
from lrcompress.callbacks.sampling import Sampling
from lrcompress.callbacks.scheduled import CompressionCallback
from lrcompress.engine.settings import Settings
from lrcompress.errors import CheckpointError, LayerError, PlatformError, SettingError
from lrcompress.pruning import dsee, effective_size, heads
from lrcompress.pruning.magnitude import check_scope
from lrcompress.report.tables import plan_table
from lrcompress.schedules import Cubic, Point
from lrcompress.structure.selection import select

_STRUCTURES = ("entries", "heads")
_PRUNE_AT = 1 / 3  # of the way from `at` to the end
_MOMENTS = 20  # at which gradual pruning goes on


class DSEE(CompressionCallback):
    """Train sparse low-rank updates beside a frozen backbone, prune it, and merge both.

    At ``at`` some weights ``W (out, in)`` get an update, ``W + left right + S``, with
    ``left (out, rank)``, ``right (rank, in)`` and ``entries`` values in ``S`` where GoDec finds
    that low rank cannot follow ``W``; everything else but poolers and heads is frozen and leaves
    the optimizer. At ``prune_at`` the smallest entries of the weights with their updates, or whole
    attention heads, are set to zero. The updates are trained to the end and then merged into the
    weights: a plain model with true zeros or fewer heads. With ``entries=0`` and ``keep=1`` this
    is LoRA. A run is resumed as with :class:`~lrcompress.Factorize`.

    Zero entries make nothing smaller or faster by themselves; removed heads do. With
    ``structure="heads"`` a head's output is multiplied by a coefficient, 1 at first, until
    ``prune_at``; the gradient of ``l1 · Σ|coefficient|`` is added to that of the loss. Heads with
    the smallest are pruned: zero from then on, removed from the model at the end.

    Args:
        keep: Entries of the pruned matrices that are not zero in the end / all of them; with
            ``structure="heads"`` the share of the heads that stay, at least one an attention. At 1
            nothing is pruned.
        rank: Of the low-rank part of each update.
        entries: Of the sparse part of each update.
        at: When updates are attached: a fraction of all steps, ``"epoch:N"`` or ``"step:N"``; 0 is
            before the first step.
        updates: Patterns of the layers that get an update. By default the query and value
            projections of numbered blocks.
        pruned: Patterns of the layers that are pruned. By default all linear layers of numbered
            blocks; with ``structure="heads"`` all attention among them.
        exclude: Patterns of layers that are not pruned.
        trained: Patterns of parameters that are trained besides the updates, such as
            ``*LayerNorm*``. By default those of linear layers outside of numbered blocks: poolers
            and heads.
        structure: Prune single ``entries``, or ``heads``.
        scope: Over what sizes are compared: ``global``, of all layers together, or ``layer``.
        prune_at: When pruning is done; by default a third of the way from ``at`` to the end.
        prune_from: Prune entries gradually from there to ``prune_at``, by a cubic schedule; by
            default all at once.
        l1: What ``Σ|coefficient|`` of the heads is multiplied by in the loss.
        merge: At the end, put plain layers in place of those with an update. Else frozen weights,
            masks and updates stay, and pruned heads are zero and not removed.
        seed: Of GoDec and of the random factor.
        validate: Run validation just before and just after pruning, for the report.
        report_path: JSON file for the report, with a page of figures beside it; ``auto`` and None
            are as for ``Factorize``.
        verbose: Print a table when pruning is done and at the end.

    Raises:
        SettingError: If an argument is not what it may be, or two do not go together. In ``fit``:
            beside a callback that factors or prunes, or if a point is too late or of unknown step.
        NoMatchError: In ``fit``: if a pattern matches nothing.
        LayerError: In ``fit``: if a layer is not plain, or no optimizer holds its weight.
        ShapeError: In ``fit``: if a layer is too small for ``rank`` or ``entries``.
        PlatformError: In ``fit``: under FSDP2 and whatever else does not allow a change of layers.
        CheckpointError: In ``fit``: if ``ckpt_path`` does not fit, or was written after merging.
        ObservationError: In ``fit``: if the training data has no batches.
        NotFiniteError: In ``fit``: if a weight that gets an update is not finite.

    Source:
        Chen et al., "DSEE: Dually Sparsity-embedded Efficient Tuning", ACL 2023, arXiv 2111.00160.

    Example:
        >>> callback = DSEE(keep=0.5)
        >>> callback.rank, callback.entries
        (16, 64)
    """

    _keeps_averages = False  # what is pruned would come back from them

    def __init__(
        self,
        keep: float,
        rank: int = 16,
        entries: int = 64,
        at: float | str = 0.0,
        updates: list[str] | None = None,
        pruned: list[str] | None = None,
        exclude: list[str] | None = None,
        trained: list[str] | None = None,
        structure: str = "entries",
        scope: str = "global",
        prune_at: float | str | None = None,
        prune_from: float | str | None = None,
        l1: float = 1e-4,
        merge: bool = True,
        seed: int = 0,
        validate: bool = True,
        report_path: str | None = AUTO,
        verbose: bool = True,
    ) -> None:
        self.keep, self.rank, self.entries, self.at = keep, rank, entries, at
        self.updates, self.pruned, self.exclude, self.trained = updates, pruned, exclude, trained
        self.structure, self.scope, self.l1 = structure, scope, l1
        self.prune_at, self.prune_from = prune_at, prune_from
        self.merge, self.seed, self._makes_matrices = merge, seed, False  # entries are a vector
        self._check()
        self._prune_at, self._prune_from = (
            None if given is None else Point.parse(given, name)
            for name, given in (("prune_at", prune_at), ("prune_from", prune_from))
        )
        super().__init__(
            [Point.parse(at)],
            Sampling(kinds=(), owner="DSEE"),
            window=Point("epoch", 1),
            validate=validate,
            report_path=report_path,
            verbose=verbose,
        )

    def _check(self) -> None:
        check_keep(self.keep)
        check_scope(self.scope)
        dsee.check_update(self.rank, self.entries)
        if self.structure not in _STRUCTURES:
            raise SettingError(
                f"structure must be one of {', '.join(_STRUCTURES)}, got {self.structure!r}"
            )
        if not self.l1 >= 0:
            raise SettingError(f"l1 must not be negative, got {self.l1!r}")
        if self.prune_from is not None and (self.structure == "heads" or self.keep == 1):
            raise SettingError(
                "prune_from: heads go all at once, at prune_at; leave it out"
                if self.structure == "heads"
                else "prune_from: with keep=1 nothing is pruned; leave it out"
            )

    @override
    def _reset(self) -> None:
        super()._reset()
        self._updates: tuple[str, ...] = ()
        self._pruned: tuple[str, ...] = ()
        self._attentions: list[heads.Attention] = []
        self._moments: list[int] = []
        # As the module was before: what its optimizers' groups held, and what was frozen.
        self._before: dict[str, Any] = {"groups": [], "frozen": []}
        self._merged = False

    @property
    @override
    def state_key(self) -> str:
        asked = {"updates": self.updates, "pruned": self.pruned, "exclude": self.exclude}
        return self._generate_state_key(at=self.at, **asked)

    @override
    def settings_at(self, stage: int) -> Settings:
        return Settings(method="svd", targets=list(dict.fromkeys((*self._updates, *self._pruned))))

    @override
    def _phase(self) -> str:
        return "pruning" if 0 < self._stage < len(self.points) else super()._phase()

    @override
    def _check_trained(self, trainer: pl.Trainer, names: Sequence[str]) -> None:
        """Accept frozen layers: their updates are trained."""

    # Structure and state

    def _resolve(self, module: nn.Module) -> None:
        """Find the layers that the patterns match."""
        self._updates = dsee.updated_names(module, self.updates)
        self._pruned, self._attentions = (), []
        if self.keep < 1:
            self._pruned = select(module, self.pruned, self.exclude or (), argument="pruned").names
        if self.keep < 1 and self.structure == "heads":
            self._attentions = heads.attentions(module, self._pruned)
            inside = {name for one in self._attentions for name in one.names}
            self._pruned = tuple(name for name in self._pruned if name in inside)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer_state.uses_fsdp2(trainer):
            raise PlatformError(
                "DSEE freezes and prunes single entries of layers of which each process has only "
                "some under FSDP2; use strategy='ddp', or Trainer(devices=1): with a frozen "
                "backbone gradients and optimizer take little memory"
            )
        others = [
            type(one).__name__ for one in self._compression_callbacks(trainer) if one is not self
        ]
        if stage == "fit" and others:
            raise SettingError(
                f"DSEE freezes the whole model and holds on to its optimizer's groups, {others[0]} "
                "changes layers meanwhile; run them in two fits, one after the other"
            )
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._resolve(pl_module)

    @property
    def _asked(self) -> dict[str, Any]:
        """The settings that the structure depends on."""
        return {
            "rank": self.rank,
            "entries": self.entries,
            "structure": self.structure,
            "layers": list(self._updates),
        }

    @override
    def _resume(
        self, module: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Any]
    ) -> None:
        own = state["dsee"]
        if state["stage"]:
            for name, now in self._asked.items():
                if own["asked"][name] != now:
                    raise SettingError(
                        f"the checkpoint was written after updates were attached with "
                        f"{name}={own['asked'][name]!r}, got {name}={now!r}; go on with the same, "
                        "or resume from a checkpoint before that"
                    )
            dsee.freeze_(module, own["trained"])
            trainer_state.regroup_parameters_(module, optimizers, state["param_names"])
        self._before, self._merged = dict(own["before"]), own["merged"]
        super()._resume(module, optimizers, state)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._live is None:
            return state
        own = {
            "asked": self._asked,
            "trained": [n for n, p in self._live[0].named_parameters() if p.requires_grad],
            "before": self._before,
            "merged": self._merged,
        }
        return state | {"dsee": own}

    # During the fit

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total, _ = trainer_state.run_lengths(trainer)
        if self._merged and trainer_state.steps_done(trainer) < total:
            raise CheckpointError(
                "the checkpoint was written after the updates were merged, at the end of a run; "
                "resume from one before that, or leave ckpt_path out and start from its weights"
            )
        if not self._stage:
            named = (self._pruned, self._updates)
            dsee.check_updatable(pl_module, *named, self.rank, self.entries)
        super().on_train_start(trainer, pl_module)

    @override
    def _place_points(self) -> list[int]:
        if self.keep == 1:
            return super()._place_points()
        total, per_epoch = self._total, self._per_epoch
        start = self._step_of(self.points[0])
        if self._prune_at is None:  # a fraction of unknown length raises
            Point("fraction", _PRUNE_AT).step(total, per_epoch)
            end = start + round(_PRUNE_AT * (total - start))
        else:
            end = self._step_of(self._prune_at)
        begin = end if self._prune_from is None else self._step_of(self._prune_from)
        gaps = [1, 0] if self._prune_from is None else [0, 1]
        start, begin, end = self._within_run([start, begin, end], gaps)
        if not start <= begin <= end or start == end:
            raise SettingError(
                "phases must follow each other, at ≤ prune_from ≤ prune_at, at < prune_at; got "
                f"at step {start}, prune_from {begin}, prune_at {end} of {total:g} steps"
            )
        self._schedule = Cubic(begin, end, self.keep)
        found = {begin + (end - begin) * moment // _MOMENTS for moment in range(1, _MOMENTS)}
        self._moments = sorted(found - {begin, end})
        self.points = [self.points[0], Point("step", end)]
        return [start, end]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        now = trainer_state.steps_done(trainer)
        if self._stage == 1 and now in self._moments and trainer_state.between_steps(trainer):
            dsee.prune_(pl_module, self._pruned, self._schedule(now), self.scope)
            reporting.log_figures(trainer, {"keep": self._schedule(now)})

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._stage != 1 or not self._attentions:
            return
        scale = trainer_state.gradient_factor(trainer, optimizer)
        heads.penalise_(pl_module, self._attentions, optimizer, self.l1 / scale)

    @override
    def _change_model(self, trainer: pl.Trainer, module: pl.LightningModule, now: int) -> None:
        last = self._stage == len(self.points) - 1
        before = trainer_state.run_validation(trainer) if last and now and self.validate else {}
        started = time.perf_counter()
        if self._stage == 0:
            self._attach(trainer, module)
        else:
            self._prune(trainer, module)
        self._sync_structure(trainer, module)
        if last:
            seconds = time.perf_counter() - started
            method = f"DSEE, {self.structure}" if self._pruned else "DSEE"
            layers = self._pruned or self._updates
            record = effective_size.pruning_record(
                method, now, module, layers, self._attentions, self.merge
            )
            record.seconds, record.metrics = seconds, {"before": before, "after": {}}
            record.note = (
                f"{len(self._updates)} layers were updated, each by rank {self.rank} and "
                f"{self.entries} entries"
            )
            self.report.points.append(record)

    def _attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        optimizers = trainer.optimizers
        groups = trainer_state.parameter_names(module, optimizers)
        outputs = {one.output: one.heads for one in self._attentions}
        changed = {*self._updates, *outputs}
        trained = dsee.trained_names(module, self.trained, {*changed, *self._pruned})
        held = {name for one in groups for names in one for name in names}
        lost = [name for name in changed if f"{name}.weight" not in held]
        if lost:
            raise LayerError(
                f"no optimizer holds the weight of layer {min(lost)!r}, in whose place its update "
                "would be trained; give the optimizer all parameters, DSEE freezes them itself"
            )
        self._before = {
            "groups": groups,
            "frozen": [name for name, p in module.named_parameters() if not p.requires_grad],
        }
        dsee.attach_(
            module,
            self._updates,
            rank=self.rank,
            entries=self.entries,
            heads=outputs,
            seed=self.seed,
            processes=self._processes,
            track=reporting.progress_bar(trainer, verbose=self.verbose),
        )
        coming: dict[str, list[str]] = {}
        for name in dsee.update_parameters(module):
            coming.setdefault(f"{name.rpartition('.')[0]}.weight", []).append(name)
        for name in (*trained, ""):
            coming[name] = [name]
        dsee.freeze_(module, {name for names in coming.values() for name in names})
        trainer_state.regroup_parameters_(module, optimizers, _replaced(groups, coming))

    def _prune(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self._attentions:
            dsee.prune_(module, self._pruned, self.keep, self.scope)
            return
        kept = heads.kept_heads(module, self._attentions, self.keep, self.scope)
        heads.silence_(module, kept)
        groups = trainer_state.parameter_names(module, trainer.optimizers)
        fixed = {f"{name}.coefficients" for name in kept}
        stay = {n: [n] for one in groups for names in one for n in names if n not in fixed}
        trainer_state.regroup_parameters_(module, trainer.optimizers, _replaced(groups, stay))

    @override
    def _end_training(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Merge the updates."""
        if self._merged or not self.merge or not self._stage:
            return
        if self._stage == len(self.points):
            heads.remove_heads_(module, self._attentions)
        dsee.merge_updates_(module)
        names = dict(module.named_parameters())
        dsee.freeze_(module, names.keys() - set(self._before["frozen"]))
        trainer_state.regroup_parameters_(module, trainer.optimizers, self._before["groups"])
        self._merged = True
        self._sync_structure(trainer, module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.report.points:
            effective_size.recount_(self.report.points[-1], pl_module)

    @override
    def preview(self, model: nn.Module) -> RenderableType:
        """Return the result for ``model`` as a table, nothing is changed. Raises as ``fit``."""
        self._resolve(model)
        dsee.check_updatable(model, self._pruned, self._updates, self.rank, self.entries)
        chosen = {*self._pruned, *self._updates}
        others = set(dsee.trained_names(model, self.trained, chosen))
        layers = effective_size.preview(
            model, self._pruned or self._updates, self.keep, self._attentions
        )
        trained = effective_size.update_size(model, self._updates, self.rank, self.entries)
        trained += sum(p.numel() for name, p in model.named_parameters() if name in others)
        trained += sum(one.heads for one in self._attentions)
        whole = sum(p.numel() for p in model.parameters())
        notes = [
            f"{len(self._updates)} layers get updates of rank {self.rank} and {self.entries} "
            f"entries: {trained:,} of {whole:,} parameters are trained, with {len(others)} others",
            "what is pruned is shown uniform; training shares it out by size"
            + ("" if self._attentions or not self._pruned else "; zeros are stored"),
        ]
        if self._point_steps:
            steps = ", pruned at ".join(f"{step:,}" for step in self._point_steps)
            notes.append(f"updates attached at step {steps}, of {self._total:,.0f} steps")
        title = f"DSEE: {self.structure}, keep {self.keep}, at {self.at}"
        lost = effective_size.bias_size(model, self.keep, self._attentions)
        return plan_table(layers, title, whole, 0, notes, -lost)


def _replaced(
    groups: list[list[list[str]]], coming: Mapping[str, Sequence[str]]
) -> list[list[list[str]]]:
    """Return the groups with some names replaced by others; those not named are left out."""
    return [
        [[name for old in names for name in coming.get(old, ())] for names in one] for one in groups
    ]
