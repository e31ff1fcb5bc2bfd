"""FactorizeEmbedding: replace embedding tables by factored ones during a fit."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import RenderableType
from torch import nn
from typing_extensions import override

from lrcompress.callbacks import trainer_state
from lrcompress.callbacks.reporting import AUTO
from lrcompress.callbacks.sampling import Sampling
from lrcompress.callbacks.scheduled import CompressionCallback
from lrcompress.callbacks.warmup import check_warmup
from lrcompress.embedding import EmbeddingSettings, EmbeddingTable, factor_tables_, record_of
from lrcompress.errors import PlatformError, SettingError
from lrcompress.report.tables import plan_table
from lrcompress.schedules import Point, parse_points
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.masks import MASK, MaskSource
from lrcompress.statistics.moments import TABLE_KINDS
from lrcompress.structure.parameter_counts import replaced_sizes


class FactorizeEmbedding(CompressionCallback):
    """Replace embedding tables by factored ones at chosen points of an ordinary fit.

    Before each point it counts which tokens training reads; at the point a table becomes one of
    lower rank that is nearest to it where it is read most, its optimizer state is carried over,
    and training goes on. It can run beside :class:`~lrcompress.Factorize` in one fit, and is
    resumed like it. The vocabulary is fixed from then on: call :func:`~lrcompress.merge_dense`
    before ``resize_token_embeddings``.

    With ``low_rank`` a table ``E (vocabulary, width)`` becomes ``left right`` with
    ``left (vocabulary, rank)`` and ``right (rank, width)``. They minimise
    ``‖D^½ (E − left right) H^½‖²`` with ``D`` the weights of the rows. ``H`` is the identity, or
    with a tied output head ``head_share · C + (1 − head_share) · mean(diag C) · I`` with ``C`` the
    second moment of the head's inputs.

    Args:
        keep: Parameters that remain / parameters before, of each table, above 0 and at most 1. A
            list, falling, for several points.
        rank: Columns of the ``left`` factor, in place of ``keep``; for one point only.
        at: When to factor: a fraction of all steps (``0.4``), ``"epoch:N"`` (after N epochs) or
            ``"step:N"``. A list, rising, for several points.
        method: ``low_rank``: a product of two matrices; ``kronecker``: a row is ``rank`` multiples
            of one block of ``width / rank`` values; ``safe``: a transformer layer over rows of
            lower width, which starts as ``low_rank`` and learns the rest, best from a teacher
            (``Distilled``), for encoders.
        targets: Patterns of names of embeddings, such as ``*.position_embeddings``. By default the
            token embedding.
        exclude: Patterns of embeddings to leave out.
        weighting: A row counts by its tokens' ``frequency`` in training, by the ``fisher``
            information of its row, or like all others (``none``).
        heads: An output head that is tied to the table shares its factors (``tied``), chosen for
            both uses together, or keeps the table for itself (``untied``): the model then grows by
            the factors.
        head_share: Share of tied heads in the weight of the columns; the rest is the embedding's
            own use, which counts all columns alike.
        floor: A row counts ``(1 − floor) · weight + floor · mean weight``, so that tokens that
            training never reads count too.
        window: How long before a point to observe: a fraction of all steps, ``"epoch:N"`` or
            ``"step:N"``.
        every_n_steps: Observe every n-th step of the window; by default every 10th, or more often
            where that would be fewer than 16 steps.
        max_tokens: Stop observing after so many tokens, padding excluded.
        fisher: Whose gradients: of ``labels``, or of labels as the ``model`` predicts.
        logits: For ``fisher: model``, the name of the submodule that returns the logits.
        mask: Where a batch has its padding mask, 1 at tokens: a key (``text.mask`` for one
            within), an index or a function of the batch. ``~key``: nonzero at padding, as in
            torch's ``key_padding_mask``; ``labels``: -100 where nothing is predicted. None if
            nothing is padded. The default is the ``statistics_mask`` of a data module that has one.
        offload: Device for the statistics; by default each layer's own.
        restart_steps: Steps after a point over which the learning rate rises again, as a number
            or as a fraction of all steps.
        restart_scale: What the learning rate is multiplied by after the rise.
        validate: Run validation just before and just after each point, for the report.
        report_path: JSON file for the report, with a page of figures beside it; ``auto`` and None
            are as for ``Factorize``.
        verbose: Print a table at each point and at the end.

    Raises:
        SettingError: If an argument is not what it may be. In ``fit``: if a point is in the past,
            beyond the end or of unknown step, or no rank makes a table as small as requested.
        NoMatchError: In ``fit``: if a pattern matches no embedding, there is no token embedding,
            or ``logits`` matches no submodule.
        LayerError: In ``fit``: if a table is frozen or cannot be factored, its tied head cannot
            have the form of ``method``, or ``safe`` meets a model that generates.
        ShapeError: In ``fit``: if ``rank`` does not divide the width with ``kronecker``, or a
            mask is not ``(examples, length)``.
        ObservationError: In ``fit``: if there are no batches, no step was observed, a table is
            never read, or the batch has no padding mask.
        NotFiniteError: In ``fit``: if a table or a statistic holds a NaN or an infinity.
        PlatformError: In ``fit``: if strategy (such as FSDP2), optimizer (such as SparseAdam) or
            another callback does not allow it, or processes differ.
        CheckpointError: In ``fit``: if ``ckpt_path`` does not fit the model or its optimizers.

    Cost:
        At each point ``O(vocabulary · width²)`` operations a table; statistics of up to
        ``2 · vocabulary`` values, and ``width²`` for a tied head.

    Source:
        Lan et al., "ALBERT", ICLR 2020; Tahaei et al., "KroneckerBERT", NAACL 2022, arXiv
        2109.06243; Reid et al., "Subformer", Findings of EMNLP 2021, arXiv 2101.00234.

    Example:
        >>> callback = FactorizeEmbedding(keep=0.2, at="epoch:2")
        >>> callback.settings[0].weighting, str(callback.points[0])
        ('frequency', 'epoch:2')
    """

    _continues = True

    def __init__(
        self,
        keep: float | list[float] | None = None,
        rank: int | None = None,
        at: float | str | list[float | str] = 0.5,
        method: str = "low_rank",
        targets: list[str] | None = None,
        exclude: list[str] | None = None,
        weighting: str = "frequency",
        heads: str = "tied",
        head_share: float = 0.5,
        floor: float = 0.1,
        window: float | str = "epoch:1",
        every_n_steps: int | None = None,
        max_tokens: int | None = None,
        fisher: str = "labels",
        logits: str | None = None,
        mask: MaskSource = MASK,
        offload: str | None = None,
        restart_steps: float = 0.05,
        restart_scale: float = 1.0,
        validate: bool = True,
        report_path: str | None = AUTO,
        verbose: bool = True,
    ) -> None:
        self.keep, self.rank, self.at, self.window = keep, rank, at, window
        self._makes_matrices = method != "safe"  # which brings vectors too
        self.restart_steps, self.restart_scale = restart_steps, restart_scale
        check_warmup(restart_steps, restart_scale)
        points, keeps = parse_points(at, keep)
        if len(points) > 1 and method != "low_rank":
            raise SettingError(
                f"method {method!r} makes tables that cannot be factored again; give one point, "
                f"got at={at!r}"
            )
        self.settings = [
            EmbeddingSettings(
                method=method,
                keep=share,
                rank=rank,
                targets=targets,
                exclude=exclude or (),
                weighting=weighting,
                heads=heads,
                head_share=head_share,
                floor=floor,
            )
            for share in keeps
        ]
        sampling = Sampling(
            kinds=self.settings[0].kinds,
            every_n_steps=every_n_steps,
            max_tokens=max_tokens,
            fisher=fisher,
            logits=logits,
            mask=mask,
            offload=offload,
            owner=type(self).__name__,
            of_tables=TABLE_KINDS,
        )
        super().__init__(
            points,
            sampling,
            window=Point.parse(window, "window"),
            validate=validate,
            report_path=report_path,
            verbose=verbose,
        )

    @override
    def settings_at(self, stage: int) -> EmbeddingSettings:
        return self.settings[stage]

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer_state.uses_fsdp2(trainer):
            raise PlatformError(
                "FactorizeEmbedding replaces tables that other layers may hold too, which sharding "
                "cannot follow; use strategy='ddp', or factor in a fit on one device first and "
                "begin the sharded one from the folder that lrcompress.save_pretrained writes"
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        settings = self.settings[0]
        tables = settings.tables(pl_module)
        for table in tables if not self._stage else ():
            settings.rank_of(table)
            if table.heads and settings.heads == "untied":
                rank_zero_warn(_cost(table))
        for optimizer in trainer.optimizers:
            if type(optimizer).__name__ == "SparseAdam":
                raise PlatformError(
                    "SparseAdam takes sparse gradients alone, and what widens a narrow table gets "
                    "dense ones; use another optimizer, such as torch.optim.Adam with "
                    "nn.Embedding(sparse=False)"
                )
        super().on_fit_start(trainer, pl_module)

    @override
    def _change_model(self, trainer: pl.Trainer, module: pl.LightningModule, now: int) -> None:
        settings, statistics = self.settings[self._stage], self._observation.statistics
        before = trainer_state.run_validation(trainer) if self.validate else {}
        optimizers, processes = trainer.optimizers, self._processes
        record = factor_tables_(
            module, statistics, settings, optimizers=optimizers, step=now, processes=processes
        )
        self._sync_structure(trainer, module)
        record.metrics = {"before": before, "after": {}}
        self.report.points.append(record)
        self._warm_up(self.restart_steps, self.restart_scale)

    @override
    def preview(self, model: nn.Module) -> RenderableType:
        """Return what the first point would do to ``model``, as a table; nothing is changed.

        Raises:
            NoMatchError: if a pattern matches no embedding, or there is no token embedding.
            LayerError: if a table cannot be factored, or its tied head cannot follow.
            SettingError: if no rank makes a table as small as requested.
            ShapeError: if ``rank`` does not divide the width with ``kronecker``.
        """
        settings = self.settings[0]
        tables = settings.tables(model)
        stood = replaced_sizes(model, [table.name for table in tables])
        records = [record_of(table, settings, stood=stood.get(table.name)) for table in tables]
        recorder = Recorder(model, settings.watched(model), settings.kinds)
        by = f"by {settings.weighting}"
        title = f"FactorizeEmbedding: {settings.method} {by}, at {self.points[0]}"
        untied = [_cost(x) for x in tables if x.heads and settings.heads == "untied"]
        notes: list[Any] = [f"{x.name}: {x.note}" for x in records if x.note]
        notes += untied + [
            f"point {point} is step {step:,} of {self._total:,.0f}"
            for point, step in zip(self.points, self._point_steps, strict=False)
        ]
        whole = sum(p.numel() for p in model.parameters())
        kept = sum(math.prod(x.shape) for x in tables if x.heads and settings.heads == "untied")
        return plan_table(records, title, whole, recorder.nbytes, notes, kept)


def _cost(table: EmbeddingTable) -> str:
    return (
        f"heads='untied': {table.heads[0]!r} keeps the {math.prod(table.shape):,} parameters of "
        f"{table.name!r} for itself, so the model grows by those of the factors"
    )
