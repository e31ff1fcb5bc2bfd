"""Compression of a bare ``nn.Module``: observe, allocate ranks, solve, replace layers."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lrcompress.bench.latency_ranks import Context
from lrcompress.budget import allocate
from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.candidates import candidates, parameters_of
from lrcompress.engine.factored_layers import keep_lower_ranks
from lrcompress.engine.kronecker_shapes import KroneckerShapes, check_layers, term_parameters
from lrcompress.engine.latency import choose_and_install_
from lrcompress.engine.measured_loss import MeasuredLoss
from lrcompress.engine.observation import Loss, observe_batches
from lrcompress.engine.passes import Masks, Passes
from lrcompress.engine.progress import Track, untracked
from lrcompress.engine.settings import Settings, check_device, check_present
from lrcompress.engine.solved_model import solve_model
from lrcompress.errors import PlatformError, SettingError, nearest
from lrcompress.objective import METHODS
from lrcompress.report.record import LayerRecord, PointRecord
from lrcompress.solvers.kronecker import Sizes
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.fisher import LogitsCapture, check_fisher
from lrcompress.statistics.masks import MASK, MaskSource, batch_decoder_mask, batch_mask
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.feed_forward import Blocks
from lrcompress.structure.parameter_counts import replaced_sizes
from lrcompress.structure.selection import Selection

_WRAPPERS = {"_FabricModule", "DistributedDataParallel", "FullyShardedDataParallel"}


def preview(model: nn.Module, settings: Settings) -> tuple[list[LayerRecord], Selection, int]:
    """Return the layers that would be replaced at uniform ranks, and the bytes of statistics.

    Nothing is observed or changed. Global allocation divides the same budget differently.
    """
    selection = settings.select(model)
    check_layers(model, selection.names, settings)
    firsts: dict[str, Sizes | None] = {}
    if METHODS[settings.method].form == "kronecker":
        firsts = KroneckerShapes(model, selection.names, settings).previewed(model)
    asked = [
        replace(c, unit=term_parameters(firsts[c.name], (c.out_features, c.in_features)))
        if firsts
        else c
        for c in candidates(model, selection.names, settings, {})
    ]
    ranks = allocate(asked, settings.keep, "uniform", settings.align)
    stood = replaced_sizes(model, selection.names)
    keep_lower_ranks(model, ranks)
    records = [
        LayerRecord(
            *(c.name, c.out_features, c.in_features, rank := ranks[c.name], None, None),
            first=firsts.get(c.name) if rank else None,
            stood=stood.get(c.name),
            parameters=parameters_of(c, rank),
        )
        for c in asked
    ]
    recorder = Recorder(model, selection.names, METHODS[settings.method].kinds)
    return records, selection, recorder.nbytes


def check_budget(model: nn.Module, settings: Settings) -> None:
    """Check that the targeted layers can be as small as ``keep`` asks.

    Narrowed blocks may be smaller than their layers' least ranks, and what a Kronecker product
    takes is known once its sizes are found, which takes long: of both nothing is known yet.

    Raises:
        SettingError: if they cannot.
    """
    unknown = settings.narrow_blocks or METHODS[settings.method].form == "kronecker"
    if settings.keep is not None and not unknown:
        asked = candidates(model, settings.select(model).names, settings, {})
        allocate(asked, settings.keep, "uniform", settings.align)


@torch.no_grad()
def factor_(
    model: nn.Module,
    statistics: Statistics,
    settings: Settings,
    *,
    optimizers: Iterable[Optimizer] = (),
    step: int | None = None,
    processes: Processes = ONE_PROCESS,
    owner: Mapping[str, int] | None = None,
    track: Track = untracked,
    forward_context: Context = nullcontext,
    blocks: Blocks | None = None,
    train_balanced: bool = False,
    passes: Passes | None = None,
) -> PointRecord:
    """Replace the targeted layers of ``model`` by factored ones, from statistics.

    An error leaves the model as it was; only where parameters are sharded, layers that were
    replaced before it stay so. Layers that are factored already are factored again.

    Args:
        model: changed in place.
        statistics: of the targeted layers, of the kinds the method needs.
        settings: what to do.
        optimizers: whose parameters and state follow.
        step: for the record.
        processes: those that do the same with the same model, statistics and settings. Each solves
            some layers; all end with the same values, bit for bit. Sharded ones are unsharded then.
        owner: the process of each layer, where only that one has observed it.
        track: yields layers while they are solved, timed and refitted, as a progress bar does.
        forward_context: that the model runs in, such as autocast; layers are timed in it.
        blocks: the feed-forward blocks of the model, where they may be narrowed.
        train_balanced: put balanced factors in place even where pivoted rows are to be stored:
            :func:`~lrcompress.store_pivoted_` turns them at the end. Sizes in the record are those
            of pivoted rows.
        passes: of the model, for ``settings.refit`` and ``settings.latency``.

    Returns:
        What was done, layer by layer.

    Raises:
        NoMatchError: if a pattern matches nothing.
        LayerError: if a layer has sparse rows, or is factored as the method cannot start from.
        ShapeError: if a size in ``shapes`` does not divide its layer's.
        ObservationError: if a statistic is missing of a layer that was seen, or no layer was.
        NotFiniteError: if a statistic or a weight is not finite.
        SettingError: if the budget cannot be met, or there are no passes to refit on.

    Cost:
        One symmetric eigendecomposition of the smaller side per layer, and its products; twice
        that for sums of Kronecker products. With ``refit`` that of
        :meth:`~lrcompress.engine.refit.Refit.run_`, and the dense weights stay until the end.
    """
    solved = solve_model(
        model,
        statistics,
        settings,
        processes=processes,
        owner=owner,
        track=track,
        forward_context=forward_context,
        blocks=blocks,
        train_balanced=train_balanced,
    )
    return choose_and_install_(solved, tuple(optimizers), step, passes)


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    mask: MaskSource = MASK,
    examples: Callable[[Any], int] | None = None,
    fisher: str = "labels",
    logits: str | None = None,
    offload: str | None = None,
    **settings: Any,
) -> PointRecord:
    """Factor the linear layers of ``model`` from one pass over ``batches``, without a Trainer.

    Each weight ``W`` is replaced by the factors of ``M`` that minimise ``‖P (W − M) Q‖²``, with
    the metrics ``PᵀP`` ``(out, out)`` and ``QQᵀ`` ``(in, in)`` that ``method`` takes from the
    batches; :mod:`lrcompress.objective` has the methods and their sources. Ranks are allocated so
    that ``keep`` of the targeted layers' parameters remain. The model is observed in evaluation
    mode, without dropout, and no ``.grad`` is touched. Layers that nothing uses stay, with a note
    in the record. An error leaves the model as it was.

    Args:
        model: changed in place; on any device, or spread over several.
        batches: whatever ``loss`` understands, on the model's device; one pass is made over all
            of them, none where the method needs no statistics (``svd``). After it the loss is
            measured once more, without gradients, unless they are an iterator, which can be gone
            through once. With ``refit`` or ``latency`` there are further passes, and an iterator
            is refused.
        loss: ``loss(model, batch)`` gives the mean loss over the batch's examples, or over its
            predicted tokens, a scalar.
        mask: where a batch has its padding mask: a key, an index or a function of the batch, as
            :func:`~lrcompress.statistics.masks.batch_mask` says; None if nothing is padded.
        examples: of how many terms a batch's loss is the mean; by default as
            :func:`~lrcompress.statistics.batches.batch_terms` counts them.
        fisher: whose gradients: ``"labels"``, those of the loss, or ``"model"``: of labels as the
            model predicts them, as :func:`~lrcompress.statistics.fisher.fisher_losses` says.
        logits: for ``fisher="model"``, the name of the submodule that returns the logits; by
            default the first output with ``.logits``.
        offload: device for the statistics, ``"cpu"`` for large models; by default each layer's own.
        **settings: of :class:`~lrcompress.engine.settings.Settings`: ``method``, ``keep``, …

    Returns:
        What was done, layer by layer; under ``metrics`` the mean loss of the batches before and
        after, ``observed_loss``.

    Raises:
        TypeError: if a setting has an unknown name.
        SettingError: if a setting is not what it may be, ``keep`` is missing, or it cannot be met.
        NoMatchError: if a pattern matches no layer, no layer is left to factor, or ``logits`` names
            no submodule.
        LayerError: if a layer is of a kind that cannot be factored.
        ShapeError: if a mask is not two-dimensional, or ``shapes`` do not divide their layers'.
        ObservationError: if ``batches`` is empty, or all its losses are not finite; if a layer
            has no part in the loss, was used twice in a step without ``shared``, or read
            sequences without a mask; if no layer was used, or a batch holds no tensor.
        NotFiniteError: if a weight or a statistic holds a NaN or an infinity.
        PlatformError: if ``offload`` or ``solve_device`` names a device that is not there, or the
            model is wrapped by Fabric or DDP.

    Cost:
        A pass of the model a batch, as of :func:`observe`; then that of :func:`factor_`, and a
        pass without gradients.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> batches = [torch.randn(16, 8) for _ in range(4)]
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> record = compress(model, batches, loss, keep=0.5, allocation="uniform")
        >>> [layer.rank for layer in record.layers]
        [2, 2]
    """
    known = [field.name for field in fields(Settings)]
    for name in settings.keys() - set(known):
        raise TypeError(f"compress has no option {name!r}; nearest: {nearest(name, known)}")
    chosen = Settings(**settings)
    _check_not_wrapped(model)
    names = chosen.select(model).names
    method = METHODS[chosen.method]
    if chosen.keep is None and chosen.latency is None and not (chosen.ranks or chosen.keeps):
        raise SettingError(
            "keep is missing: give keep=, or ranks or keeps for every layer, or latency="
        )
    check_fisher(fisher)
    check_device("offload", offload)
    for argument, where in (("offload", offload), ("solve_device", chosen.solve_device)):
        check_present(argument, where)
    passes = None
    if chosen.refit is not None or chosen.latency is not None:
        passes = Passes(batches, loss, lambda batch: _masks(batch, mask))
    recorder = Recorder(
        model,
        names,
        method.kinds,
        offload=offload,
        shared=chosen.shared,
        forward_only=not method.needs_gradients,
    )
    blocks: Blocks | None = None
    measured = MeasuredLoss(loss, examples)
    if method.kinds:
        given: dict[str, Any] = {"mask": mask, "examples": examples}
        given["find_blocks"] = bool(chosen.narrow_blocks)
        if fisher == "model" and method.needs_gradients:
            given["logits"] = LogitsCapture(model, logits)
        blocks = observe_batches(recorder, model, batches, measured, **given)
    record = factor_(model, recorder.statistics, chosen, blocks=blocks, passes=passes)
    measured.put_in(record, model, batches)
    return record


def _check_not_wrapped(model: nn.Module) -> None:
    """Check that nothing wraps the model that would go on with the parameters of before.

    Raises:
        PlatformError: if it is wrapped.
    """
    for kind in type(model).__mro__:
        if kind.__name__ in _WRAPPERS:
            raise PlatformError(
                f"{kind.__name__} and its optimizers would go on with the parameters that layers "
                "have now: compress the model itself, before it is wrapped, and then make the "
                "optimizer; with Fabric before fabric.setup(model, optimizer)"
            )


def _masks(batch: Any, mask: MaskSource) -> Masks:
    found, missing = batch_mask(batch, mask, "compress")
    return found, None if mask is None else batch_decoder_mask(batch, "compress"), missing
