"""Compression of a bare ``nn.Module``: observe, allocate ranks, solve, replace layers."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lrcompress.bench.latency_ranks import Context, RankChoice, allocate_by_latency
from lrcompress.budget import Candidate, allocate, cost, match_bounds, pivoted_costs
from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.block_budget import allocate_with_blocks
from lrcompress.engine.distributed_solve import (
    Found,
    LayerSummary,
    greatest_rank,
    install_factors_,
    solve_layers,
)
from lrcompress.engine.factored_layers import (
    is_pivoted,
    keep_lower_ranks,
    put_factors,
    saved_by_pivoting,
)
from lrcompress.engine.kronecker_shapes import (
    KroneckerShapes,
    by_layer,
    check_layers,
    solver_for,
    term_parameters,
)
from lrcompress.engine.narrow_blocks import SolvedBlocks, solve_blocks
from lrcompress.engine.observation import Loss, observe_batches
from lrcompress.engine.refit import Masks, Passes, Refit
from lrcompress.engine.settings import Settings, check_device, check_present
from lrcompress.errors import SettingError
from lrcompress.nn import LowRankLinear, PivotedLinear
from lrcompress.objective import METHODS
from lrcompress.report.record import LayerRecord, PointRecord
from lrcompress.solvers.kronecker import Sizes
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.masks import MASK, MaskSource, batch_decoder_mask, batch_mask
from lrcompress.statistics.moments import Statistics
from lrcompress.statistics.views import view
from lrcompress.structure.feed_forward import Blocks
from lrcompress.structure.parameter_counts import replaced_sizes, sizes_before, stored_bytes
from lrcompress.structure.selection import Selection
from lrcompress.structure.transaction import all_or_nothing

PIVOTED = "stored as pivoted rows, rank·(out + in − rank) parameters a layer"
TRAINED = "trained as balanced factors; as such they take {} parameters more"


def candidates(
    model: nn.Module,
    names: Sequence[str],
    settings: Settings,
    measured: Mapping[str, LayerSummary],
) -> list[Candidate]:
    """Return the layers as candidates for ranks, with their error curves and bounds.

    Args:
        model: whose layers they are.
        names: of the layers.
        settings: their ranks, keeps and bounds.
        measured: the layers as far as they are solved; others cost what low-rank factors do.

    Raises:
        NoMatchError: if a pattern of ``ranks`` or ``keeps`` matches no targeted layer.
        SettingError: if a layer has both a rank and a keep of its own.
    """
    ranks = by_layer("ranks", settings.ranks, names)
    keeps = by_layer("keeps", settings.keeps, names)
    both = sorted(ranks.keys() & keeps.keys())
    if both:
        raise SettingError(f"layer {both[0]!r} is given both a rank and a keep")
    result = []
    for name in names:
        layer = model.get_submodule(name)
        shape = view(layer).shape
        one = measured.get(name)
        unit = one.unit if one else 0
        costs = pivoted_costs(*shape) if is_pivoted(layer, settings) else ()
        lowest, highest = match_bounds(settings.keep_range, *shape, unit or None, costs)
        if isinstance(layer, LowRankLinear | PivotedLinear):
            highest = layer.rank if highest is None else min(highest, layer.rank)
        result.append(
            Candidate(
                name,
                *shape,
                energies=one.curve if one else None,
                rank=ranks.get(name),
                keep=keeps.get(name),
                lowest=lowest,
                highest=highest,
                unit=unit,
                most=len(one.energies) if one else 0,
                costs=costs,
            )
        )
    return result


def _parameters(one: Candidate, rank: int | None) -> int | None:
    """Return the parameters of a layer that is no pair of factors, for the record."""
    return cost(one, rank) if one.costs and rank is not None else None


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
            parameters=_parameters(c, rank),
        )
        for c in asked
    ]
    recorder = Recorder(model, selection.names, METHODS[settings.method].kinds)
    return records, selection, recorder.nbytes


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
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
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
        track: yields layers while they are solved, as a progress bar does.
        forward_context: that the model runs in, such as autocast; layers are timed in it.
        blocks: the feed-forward blocks of the model, where they may be narrowed.
        train_balanced: put balanced factors in place even where pivoted rows are to be stored:
            :func:`~lrcompress.engine.factored_layers.store_pivoted_` turns them at the end. Sizes
            in the record are those of pivoted rows.
        passes: of the model, for ``settings.refit``.

    Returns:
        What was done, layer by layer.

    Raises:
        NoMatchError: if a pattern matches nothing.
        LayerError: if a layer has sparse rows, or is factored as the method cannot start from.
        ShapeError: if a size in ``shapes`` does not divide its layer's.
        ObservationError: if a layer was never seen.
        NotFiniteError: if a statistic or a weight is not finite.
        SettingError: if the budget cannot be met, or there are no passes to refit on.

    Cost:
        One symmetric eigendecomposition of the smaller side per layer, and its products; twice
        that for sums of Kronecker products. With ``refit`` that of
        :meth:`~lrcompress.engine.refit.Refit.run_`, and the dense weights stay until the end.
    """
    started = time.perf_counter()
    names = settings.select(model).names
    check_layers(model, names, settings)
    shared: dict[str, Any] = {"processes": processes, "owner": owner, "track": track}
    narrowing = solve_blocks(model, names, blocks, statistics, settings, **shared)
    narrow = narrowing.narrow
    ranked = tuple(name for name in names if name not in narrow) if narrow else names
    pivoted = {name: is_pivoted(model.get_submodule(name), settings) for name in ranked}
    solutions = solve_layers(
        model,
        ranked,
        statistics,
        settings.method,
        refit_bias=settings.refit_bias,
        shrink=settings.shrink,
        most={n: greatest_rank(model.get_submodule(n), pivoted=pivoted[n]) for n in ranked},
        solver=solver_for(model, ranked, settings),
        device=settings.solve_device,
        **shared,
    )
    measured = solutions.measured
    asked = candidates(model, ranked, settings, measured)
    observers = 1 if owner else processes.size
    seen = statistics.tokens / max(1, statistics.steps) / observers
    choice, widths = processes.run_on_first(
        lambda: _choose_sizes(model, asked, narrowing, settings, seen, forward_context)
    )
    keep_lower_ranks(model, ranks := choice.ranks)
    chosen = {name: rank for name, rank in ranks.items() if rank is not None}
    later = [name for name in pivoted if pivoted[name] and train_balanced]
    before, bytes_before = _as_stored(sizes_before(model), saved := saved_by_pivoting(model, later))
    stood = replaced_sizes(model, names)
    stood |= {name: stood[name] - fewer for name, (fewer, _) in saved.items()}
    held = tuple(optimizers)

    def put(name: str, found: Found | None) -> None:
        rows, first = pivoted[name] and not train_balanced, measured[name].first
        put_factors(model, name, chosen[name], first, found, held, pivoted=rows)

    refit = Refit.before(model, names, settings, passes, processes)
    with (
        all_or_nothing(model, names, held) if refit else nullcontext(),
        narrowing.narrowed_(widths, held) as records,
    ):
        reached = install_factors_(model, solutions, chosen, put, held, away=refit is None)
        if refit:
            refit.run_(narrowing.pairs(widths))
    records |= {
        c.name: measured[c.name].record(
            c.name,
            (c.out_features, c.in_features),
            ranks[c.name],
            choice.notes.get(c.name, "") or narrowing.left_alone.get(c.name, ""),
            reached.get(c.name),
            stood.get(c.name),
            _parameters(c, ranks[c.name]),
        )
        for c in asked
        if c.name in ranks
    }
    now = sum(p.numel() for p in model.parameters()), stored_bytes(model)
    after, bytes_after = _as_stored(now, saved := saved_by_pivoting(model, later))
    notes = [choice.missed, narrowing.note(widths), PIVOTED if any(pivoted.values()) else ""]
    notes += [TRAINED.format(f"{now[0] - after:,}")] if saved else []
    notes += [refit.note] if refit else []
    return PointRecord(
        settings.method,
        step,
        [_noted(records[name], refit) for name in names],
        before,
        after,
        statistics.figures(),
        time.perf_counter() - started,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        note="; ".join(filter(None, notes)),
    )


def _noted(record: LayerRecord, refit: Refit | None) -> LayerRecord:
    why = refit.left_alone.get(record.name) if refit else None
    if why is None:
        return record
    return replace(record, note="; ".join(filter(None, (record.note, f"not refitted: {why}"))))


def _as_stored(sizes: tuple[int, int], saved: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Return parameters and bytes of a model without what is saved of layers."""
    parameters, nbytes = sizes
    return (
        parameters - sum(fewer for fewer, _ in saved.values()),
        nbytes - sum(fewer for _, fewer in saved.values()),
    )


def _choose_sizes(
    model: nn.Module,
    asked: Sequence[Candidate],
    narrowing: SolvedBlocks,
    settings: Settings,
    seen: float,
    context: Context,
) -> tuple[RankChoice, dict[str, int | None]]:
    """Return the ranks of layers, and the widths of blocks that are narrowed in their place."""
    budget = settings.keep, settings.spread, settings.align
    if narrowing.blocks:
        blocks = narrowing.candidates(settings.keep_range)
        ranks, widths = allocate_with_blocks(asked, blocks, settings.keep, settings.align)
        return RankChoice(ranks), widths
    if not settings.keep_measured:
        return RankChoice(allocate(asked, *budget)), {}
    tokens = settings.measured_tokens or max(1, round(seen))
    return allocate_by_latency(model, asked, *budget, tokens, context), {}


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    mask: MaskSource = MASK,
    examples: Callable[[Any], int] | None = None,
    offload: str | None = None,
    **settings: Any,
) -> PointRecord:
    """Factor the linear layers of ``model`` from one pass over ``batches``, without a Trainer.

    Each weight ``W`` is replaced by the factors of ``M`` that minimise ``‖P (W − M) Q‖²``, with
    the metrics ``PᵀP`` ``(out, out)`` and ``QQᵀ`` ``(in, in)`` that ``method`` takes from the
    batches; :mod:`lrcompress.objective` has the methods and their sources. Ranks are allocated so
    that ``keep`` of the targeted layers' parameters remain. The model is observed in evaluation
    mode, without dropout, and no ``.grad`` is touched. An error leaves the model as it was.

    Args:
        model: changed in place; on any device, or spread over several.
        batches: whatever ``loss`` understands, on the model's device; one pass is made over all
            of them, none where the method needs no statistics (``svd``), and with ``refit`` some
            more: an iterator, which can be gone through once, is refused then.
        loss: ``loss(model, batch)`` gives the mean loss over the batch's examples, or over its
            predicted tokens, a scalar.
        mask: where a batch has its padding mask: a key, an index or a function of the batch, as
            :func:`~lrcompress.statistics.masks.batch_mask` says; None if nothing is padded.
        examples: of how many terms a batch's loss is the mean; by default as
            :func:`~lrcompress.statistics.batches.batch_terms` counts them.
        offload: device for the statistics, ``"cpu"`` for large models; by default each layer's own.
        **settings: of :class:`~lrcompress.engine.settings.Settings`: ``method``, ``keep``, …

    Returns:
        What was done, layer by layer.

    Raises:
        TypeError: if a setting has an unknown name.
        SettingError: if a setting is not what it may be, ``keep`` is missing, or it cannot be met.
        NoMatchError: if a pattern matches no layer, or no layer is left to factor.
        LayerError: if a layer is of a kind that cannot be factored.
        ShapeError: if a mask is not two-dimensional, or ``shapes`` do not divide their layers'.
        ObservationError: if ``batches`` is empty, or all its losses are not finite; if a layer
            was never used or has no part in the loss, was used twice in a step without
            ``shared``, or read sequences without a mask; if a batch holds no tensor.
        NotFiniteError: if a weight or a statistic holds a NaN or an infinity.
        PlatformError: if ``offload`` or ``solve_device`` names a device that is not there.

    Cost:
        A pass of the model a batch, as of :func:`observe`; then that of :func:`factor_`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> batches = [torch.randn(16, 8) for _ in range(4)]
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> record = compress(model, batches, loss, keep=0.5, allocation="uniform")
        >>> [layer.rank for layer in record.layers]
        [2, 2]
    """
    chosen = Settings(**settings)
    names = chosen.select(model).names
    method = METHODS[chosen.method]
    if chosen.keep is None and not (chosen.ranks or chosen.keeps):
        raise SettingError("keep is missing: give keep=, or ranks or keeps for every layer")
    check_device("offload", offload)
    for argument, where in (("offload", offload), ("solve_device", chosen.solve_device)):
        check_present(argument, where)
    passes = None
    if chosen.refit is not None:
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
    if method.kinds:
        given: dict[str, Any] = {"mask": mask, "examples": examples}
        given["find_blocks"] = chosen.narrow_blocks
        blocks = observe_batches(recorder, model, batches, loss, **given)
    return factor_(model, recorder.statistics, chosen, blocks=blocks, passes=passes)


def _masks(batch: Any, mask: MaskSource) -> Masks:
    found, missing = batch_mask(batch, mask, "compress")
    return found, None if mask is None else batch_decoder_mask(batch), missing
