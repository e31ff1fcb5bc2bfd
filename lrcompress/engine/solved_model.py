"""A model whose layers are solved for all ranks: sizes chosen, tried and installed."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lrcompress.bench.latency_ranks import Context, RankChoice, allocate_by_latency
from lrcompress.budget import Candidate, allocate, cost
from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.block_budget import allocate_with_blocks
from lrcompress.engine.candidates import candidates, parameters_of
from lrcompress.engine.distributed_solve import (
    Found,
    Solutions,
    factors_on_trial,
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
from lrcompress.engine.kronecker_shapes import check_layers, solver_for
from lrcompress.engine.narrow_blocks import SolvedBlocks, solve_blocks
from lrcompress.engine.passes import Passes
from lrcompress.engine.progress import Track, untracked
from lrcompress.engine.refit import Refit
from lrcompress.engine.settings import Settings
from lrcompress.nn import LowRankLinear, PivotedLinear
from lrcompress.objective import METHODS, few_tokens
from lrcompress.report.record import LayerRecord, PointRecord, sum_or_none
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.feed_forward import Blocks
from lrcompress.structure.parameter_counts import (
    inner_features,
    replaced_sizes,
    sizes_before,
    stored_bytes,
    whole_shape,
)
from lrcompress.structure.transaction import all_or_nothing, undone

PIVOTED = "stored as pivoted rows, rank·(out + in − rank) parameters a layer"
NOT_SEEN = "left as they are, for nothing called them in {} observed steps: {}"
TRAINED = "trained as balanced factors; as such they take {} parameters more"


@dataclass(frozen=True)
class Sizes:
    """What a share of parameters is spent on.

    Attributes:
        choice: the ranks of layers; those of narrowed blocks are not among them.
        widths: how many inner features the narrowed blocks keep, by the layer that reads them.
    """

    choice: RankChoice
    widths: dict[str, int | None]

    @property
    def key(self) -> tuple[tuple[tuple[str, int | None], ...], tuple[tuple[str, int | None], ...]]:
        """The same for equal sizes, whatever share they come from."""
        return tuple(sorted(self.choice.ranks.items())), tuple(sorted(self.widths.items()))


@dataclass(frozen=True)
class SolvedModel:
    """The targeted layers of a model, solved for all ranks at once, before any is replaced.

    Sizes are chosen for any ``keep`` without solving again, tried, and installed once: installing
    uses the solutions up. Every method is collective.

    Attributes:
        model: as it was solved.
        names: of the targeted layers.
        settings: what is done; their ``keep`` is that of :meth:`choose` by default.
        statistics: that it was solved from.
        processes: those that do the same.
        solutions: of the layers.
        narrowing: of the feed-forward blocks.
        asked: the layers, as candidates for ranks.
        pivoted: which of them are stored as pivoted rows.
        train_balanced: whether even those are balanced factors for now.
        observers: how many processes have seen tokens of a layer.
        context: that the model runs in.
        seconds: that solving took.
        unseen: layers that stay as they are, for nothing called them in the observed steps.
        track: yields layers while they are timed and refitted.
    """

    model: nn.Module
    names: Sequence[str]
    settings: Settings
    statistics: Statistics
    processes: Processes
    solutions: Solutions
    narrowing: SolvedBlocks
    asked: Sequence[Candidate]
    pivoted: Mapping[str, bool]
    train_balanced: bool
    observers: int
    context: Context
    seconds: float
    unseen: tuple[str, ...] = ()
    track: Track = untracked

    def choose(self, keep: float | None = None) -> Sizes:
        """Return the ranks and widths for a share of the parameters; nothing is changed.

        Args:
            keep: parameters that remain / parameters before; by default that of the settings.

        Raises:
            SettingError: if it cannot be met.
        """
        settings = self.settings if keep is None else replace(self.settings, keep=keep)
        seen = self.statistics.tokens / max(1, self.statistics.steps) / self.observers
        choice, widths = self.processes.run_on_first(
            lambda: _choose_sizes(
                self.model, self.asked, self.narrowing, settings, seen, self.context
            )
        )
        keep_lower_ranks(self.model, choice.ranks)
        return Sizes(choice, widths)

    @property
    def standing(self) -> Sizes:
        """The sizes that the layers have now."""
        ranks: dict[str, int | None] = {}
        for one in self.asked:
            layer = self.model.get_submodule(one.name)
            factored = isinstance(layer, LowRankLinear | PivotedLinear)
            ranks[one.name] = layer.rank if factored else None  # type: ignore[assignment]
        narrow = {n: self.narrowing.features(n) for n in self.narrowing.blocks}
        widths: dict[str, int | None] = {n: now for n, (now, all_) in narrow.items() if now < all_}
        return Sizes(RankChoice(ranks), widths)

    def kept(self, sizes: Sizes) -> float:
        """Return the share of the targeted layers' parameters that sizes amount to."""
        ranks = self._ranks(sizes)
        every = [(one, ranks[one.name]) for one in self.asked if one.name in ranks]
        given = sizes.widths, sizes.choice.ranks, self.settings.keep_range
        every += self.narrowing.sized(*given)
        return sum(cost(*one) for one in every) / sum(one.before for one, _ in every)

    def _ranks(self, sizes: Sizes) -> dict[str, int | None]:
        """Return the ranks of layers whose blocks are as they are."""
        inner = self.narrowing.low_rank(sizes.widths, sizes.choice.ranks)
        return {name: rank for name, rank in sizes.choice.ranks.items() if name not in inner}

    def predicted_loss(self, sizes: Sizes) -> float | None:
        """Return the predicted increase of the loss; None where the metric does not know it."""
        measured = self.solutions.measured
        lost = [measured[name].loss(rank) for name, rank in self._ranks(sizes).items()]
        narrow = {name: width for name, width in sizes.widths.items() if width is not None}
        given = sizes.choice.ranks
        lost += [sum(self.narrowing.lost(*one, given).values()) for one in narrow.items()]
        return sum_or_none(lost)

    @contextmanager
    def on_trial(self, sizes: Sizes) -> Iterator[None]:
        """Give the layers these sizes for the time of the block; values and all are as installed.

        Optimizers do not see it. Parameters are whole, as they are not under FSDP2.
        """
        with undone(self.model, self.names), torch.no_grad():
            if sizes.widths:
                with self._narrowed_(sizes, ()):
                    pass
            with factors_on_trial(
                self.model, self.solutions, self._factored(sizes), self._putting(sizes, ())
            ):
                yield

    @torch.no_grad()
    def install_(
        self,
        sizes: Sizes | None,
        optimizers: Iterable[Optimizer] = (),
        step: int | None = None,
        passes: Passes | None = None,
    ) -> PointRecord:
        """Replace the layers, and return what was done, layer by layer.

        An error leaves the model as it was; only where parameters are sharded, layers that were
        replaced before it stay so.

        Args:
            sizes: of the layers; None leaves all of them alone, and refits none.
            optimizers: whose parameters and state follow.
            step: for the record.
            passes: of the model, for ``settings.refit``.

        Raises:
            SettingError: if there are no passes to refit on.
        """
        started, model = time.perf_counter(), self.model
        alone = self.settings.select(model).note
        chosen = {} if sizes is None else self._factored(sizes)
        asked = replace(self.settings, refit=None) if sizes is None else self.settings
        sizes = sizes or self.standing
        ranks = self._ranks(sizes)
        later = self._stored_later(sizes)
        sizes_now, saved = sizes_before(model), saved_by_pivoting(model, later)
        before, bytes_before = _as_stored(sizes_now, saved)
        stood = replaced_sizes(model, self.names)
        stood |= {name: stood[name] - fewer for name, (fewer, _) in saved.items()}
        held = tuple(optimizers)
        refit = Refit.before(model, self.names, asked, passes, self.processes, self.track)
        with (
            all_or_nothing(model, self.names, held) if refit else nullcontext(),
            self._narrowed_(sizes, held) as records,
        ):
            given = model, self.solutions, chosen, self._putting(sizes, held), held
            reached = install_factors_(*given, away=refit is None)
            if refit:
                refit.run_(self.narrowing.pairs(sizes.widths, sizes.choice.ranks))
        records |= {
            c.name: self.solutions.measured[c.name].record(
                c.name,
                whole_shape(layer := model.get_submodule(c.name)),
                ranks[c.name],
                sizes.choice.notes.get(c.name, "") or self.narrowing.left_alone.get(c.name, ""),
                reached.get(c.name),
                stood.get(c.name),
                parameters_of(c, ranks[c.name]),
                inner_features(layer),
            )
            for c in self.asked
            if c.name in ranks
        }
        now = sum(p.numel() for p in model.parameters()), stored_bytes(model)
        after, bytes_after = _as_stored(now, saved := saved_by_pivoting(model, later))
        pivoted = PIVOTED if any(self.pivoted.values()) else ""
        narrow = self.narrowing.note(sizes.widths, sizes.choice.ranks)
        unseen = NOT_SEEN.format(self.statistics.steps, ", ".join(self.unseen))
        notes = [sizes.choice.missed, narrow, pivoted, unseen if self.unseen else "", alone]
        notes += [TRAINED.format(f"{now[0] - after:,}")] if saved else []
        notes += [refit.note] if refit else []
        inputs = max((c.in_features for c in self.asked), default=0)
        notes += [few_tokens(self.settings.method, self.statistics.tokens, inputs)]
        return PointRecord(
            self.settings.method,
            step,
            [_noted(records[name], refit) for name in self.names],
            before,
            after,
            self.statistics.figures(),
            self.seconds + time.perf_counter() - started,
            bytes_before=bytes_before,
            bytes_after=bytes_after,
            note="; ".join(filter(None, notes)),
        )

    def _narrowed_(
        self, sizes: Sizes, optimizers: Sequence[Optimizer]
    ) -> AbstractContextManager[dict[str, LayerRecord]]:
        given = sizes.widths, sizes.choice.ranks, optimizers
        return self.narrowing.narrowed_(*given, pivoted=not self.train_balanced)

    def _factored(self, sizes: Sizes) -> dict[str, int]:
        """Return the ranks of the layers that get factors, but for those of narrowed blocks."""
        return {name: rank for name, rank in self._ranks(sizes).items() if rank is not None}

    def _stored_later(self, sizes: Sizes) -> list[str]:
        """Return the layers that are balanced factors for now, and will be pivoted rows."""
        if not self.train_balanced:
            return []
        inner = self.narrowing.low_rank(sizes.widths, sizes.choice.ranks)
        pivoted = self.settings.storage == "pivoted"
        return [n for n in self.names if self.pivoted.get(n, pivoted and n in inner)]

    def _putting(
        self, sizes: Sizes, optimizers: Sequence[Optimizer]
    ) -> Callable[[str, Found | None], None]:
        ranks, measured = sizes.choice.ranks, self.solutions.measured

        def put(name: str, found: Found | None) -> None:
            rows, rank = self.pivoted[name] and not self.train_balanced, ranks[name]
            assert rank is not None
            first = measured[name].first
            put_factors(self.model, name, rank, first, found, optimizers, pivoted=rows)

        return put


def _noted(record: LayerRecord, refit: Refit | None) -> LayerRecord:
    why = refit.left_alone.get(record.name) if refit else None
    if why is None:
        return record
    return replace(record, note="; ".join(filter(None, (record.note, f"not refitted: {why}"))))


@torch.no_grad()
def solve_model(
    model: nn.Module,
    statistics: Statistics,
    settings: Settings,
    *,
    processes: Processes = ONE_PROCESS,
    owner: Mapping[str, int] | None = None,
    track: Track = untracked,
    forward_context: Context = nullcontext,
    blocks: Blocks | None = None,
    train_balanced: bool = False,
) -> SolvedModel:
    """Solve the targeted layers of a model for all ranks; nothing is changed.

    Arguments and errors are those of :func:`~lrcompress.engine.compress.factor_`.

    Cost:
        One symmetric eigendecomposition of the smaller side per layer, and its products; twice
        that for sums of Kronecker products. Solutions take as much of the host's memory, over all
        processes, as the weights.
    """
    started = time.perf_counter()
    unseen = _unseen(settings.select(model).names, statistics, settings.method, processes, owner)
    names = tuple(name for name in settings.select(model).names if name not in unseen)
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
    return SolvedModel(
        model,
        names,
        settings,
        statistics,
        processes,
        solutions,
        narrowing,
        candidates(model, ranked, settings, solutions.measured),
        pivoted,
        train_balanced,
        1 if owner else processes.size,
        forward_context,
        time.perf_counter() - started,
        unseen,
        track,
    )


def _unseen(
    names: Sequence[str],
    statistics: Statistics,
    method: str,
    processes: Processes,
    owner: Mapping[str, int] | None,
) -> tuple[str, ...]:
    """Return layers of which nothing was seen, the same in all processes; none if that is all."""
    if not METHODS[method].kinds:
        return ()
    mine = [x for x in names if owner is None or owner[x] == processes.index]
    seen = statistics.source.keys() | statistics.outputs.keys()
    every = processes.all_gather([name for name in mine if name not in seen])
    found = {name for one in every for name in one}
    return tuple(name for name in names if name in found) if len(found) < len(names) else ()


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
        given = settings.keep, settings.align, narrowing.ranked_widths(settings.keep_range)
        ranks, widths = allocate_with_blocks(asked, blocks, *given)
        return RankChoice(ranks), widths
    if not settings.keep_measured:
        return RankChoice(allocate(asked, *budget)), {}
    tokens = settings.measured_tokens or max(1, round(seen))
    return allocate_by_latency(model, asked, *budget, tokens, context), {}
