"""Narrow feed-forward blocks: solve, and replace their layers by narrower ones."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.budget import Candidate, match_bounds
from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.block_budget import RankedWidth
from lrcompress.engine.distributed_solve import broadcast_layers_, own_weights, solving_rounds
from lrcompress.engine.narrow_low_rank import NarrowedRanks, Problems, solve_ranks
from lrcompress.engine.progress import Track, untracked
from lrcompress.engine.settings import LOW_RANK, Settings
from lrcompress.errors import SettingError
from lrcompress.linalg import double, noted_retries
from lrcompress.nn import NarrowLowRank, PrunedLinear, Replacement
from lrcompress.objective import METHODS
from lrcompress.report.record import LayerRecord
from lrcompress.solvers.narrowing import Narrowed, Narrowings, narrowings, relative_error
from lrcompress.statistics.moments import Statistics
from lrcompress.statistics.views import view
from lrcompress.structure.feed_forward import Block, Blocks
from lrcompress.structure.parameter_counts import replaced_sizes
from lrcompress.structure.surgery import carry_left, check_kinds, replace_, swap_parameters_
from lrcompress.structure.transaction import all_or_nothing

Ranks = Mapping[str, int | None]

_SHOWN = 20  # widths of an error curve that are kept for the report
# Tokens that count as one: features are heavy-tailed and neighbours alike. On text that was held
# out, narrowed blocks of SmolLM2 lose 1.33 (keep .8) and 1.17 times (.5) as much more than on
# what they were solved on as ranks do; three make that 1.38 and 1.22, one would 1.11 and 1.07.
_ALIKE = 3.0


@dataclass(frozen=True)
class BlockSummary:
    """What narrowing a block loses, small enough to send to every process.

    Attributes:
        losses: of every width, in the metric, on the CPU; on the tokens that were observed.
        loss_scale: half of the losses times this predicts the increase of the loss.
        note: of the metric, and of solvers that failed at first.
        tokens: that were observed.
    """

    losses: Tensor
    loss_scale: float
    note: str
    tokens: int

    @property
    def expected(self) -> Tensor:
        """What is lost of every width on other tokens than those that were observed.

        What is removed was fitted by what stays, ``k`` features by ``N`` tokens that count: by
        least squares the error on them is too small by ``1 − k/N``, and on others too large by
        ``1 / (1 − k/N)``. Ranks fit nothing of the kind. With fewer than two tokens a feature
        nothing is known, and the factor stays at four.
        """
        share = double(torch.arange(len(self.losses))) * _ALIKE / max(1, self.tokens)
        return (self.losses / (1 - share.clamp(max=0.5)).square()).cummin(0).values

    def loss(self, width: int) -> float:
        """Return the increase of the loss that is predicted for a width."""
        return 0.5 * self.loss_scale * float(self.expected[width])


@dataclass(frozen=True)
class SolvedBlocks:
    """Feed-forward blocks, solved for all widths, before any of them is narrowed.

    Attributes:
        model: whose blocks they are.
        ranks: what low rank on top of narrowing loses, where that is asked for.
        blocks: by the name of the layer that reads the inner features.
        measured: what narrowing each of them loses.
        own: those that this process has solved.
        owner: which process solves each of their layers.
        processes: the processes.
        left_alone: layers whose blocks cannot be narrowed, with the reasons.
        asked: whether they were to be narrowed.
    """

    model: nn.Module
    ranks: NarrowedRanks
    blocks: Mapping[str, Block] = field(default_factory=dict)
    measured: Mapping[str, BlockSummary] = field(default_factory=dict)
    own: Mapping[str, Narrowings] = field(default_factory=dict)
    owner: Mapping[str, int] = field(default_factory=dict)
    processes: Processes = ONE_PROCESS
    left_alone: Mapping[str, str] = field(default_factory=dict)
    asked: bool = False

    @property
    def narrow(self) -> frozenset[str]:
        """The layers of blocks that are narrowed already."""
        return frozenset(
            name for block in self.blocks.values() for name in block.names if self._pruned(block)
        )

    def _pruned(self, block: Block) -> bool:
        return isinstance(self.model.get_submodule(block.down), PrunedLinear)

    def features(self, down: str) -> tuple[int, int]:
        """Return how many inner features there are now, and in the architecture."""
        layer = self.model.get_submodule(down)
        now = view(layer).shape[1]
        if isinstance(layer, PrunedLinear | NarrowLowRank):
            return now, len(layer.columns)
        return now, now

    def candidates(
        self, keep_range: tuple[float, float]
    ) -> dict[str, tuple[Candidate, tuple[str, ...]]]:
        """Return the blocks as candidates, and the layers whose ranks they compete with."""
        found = {}
        for down, block in self.blocks.items():
            now, whole = self.features(down)
            layers = [view(self.model.get_submodule(name)).shape for name in block.names]
            unit = sum(inner for _, inner in layers[:-1]) + layers[-1][0]
            lowest, highest = match_bounds(keep_range, unit, whole, unit)
            if now < whole:
                lowest, highest = min(lowest, now), min(now, highest or now)
            one = self.measured[down]
            energies = torch.zeros(whole, dtype=torch.float64)
            energies[:now] = -one.expected.diff() * one.loss_scale
            given = {"energies": energies, "lowest": lowest, "highest": highest, "unit": unit}
            candidate = Candidate(down, unit, whole, most=whole, **given)  # type: ignore[arg-type]
            found[down] = candidate, () if self._pruned(block) else block.names
        return found

    def ranked_widths(self, keep_range: tuple[float, float]) -> dict[str, list[RankedWidth]]:
        """Return the widths at which the layers of blocks may have low rank too."""
        found = {}
        for down, (one, _) in self.candidates(keep_range).items():
            tried = [k for k in self.ranks.curves.get(down, ()) if one.least <= k <= one.top]
            found[down] = [self._ranked_width(down, k, keep_range) for k in tried]
        return found

    def _ranked_width(self, down: str, k: int, keep_range: tuple[float, float]) -> RankedWidth:
        one, whole = self.measured[down], self.features(down)[1]
        layers = self.ranks.candidates(down, k, whole, keep_range)
        return RankedWidth(k, float(one.expected[k]) * one.loss_scale, layers)

    def low_rank(self, widths: Mapping[str, int | None], ranks: Ranks) -> dict[str, int | None]:
        """Return those of the ranks that layers of narrowed blocks have."""
        names = [name for down in widths for name in self.blocks[down].names]
        return {name: ranks[name] for name in names if name in ranks}

    def sized(
        self, widths: Mapping[str, int | None], ranks: Ranks, keep_range: tuple[float, float]
    ) -> list[tuple[Candidate, int | None]]:
        """Return narrowed blocks, or their layers where these have ranks, and their sizes."""
        blocks, found = self.candidates(keep_range), []
        for down, k in widths.items():
            if k is not None and self.low_rank({down: k}, ranks):
                layers = self._ranked_width(down, k, keep_range).layers
                found += [(one, ranks[one.name]) for one in layers]
            else:
                found.append((blocks[down][0], k))
        return found

    def lost(self, down: str, width: int | None, ranks: Ranks) -> dict[str, float]:
        """Return the predicted loss of a narrowed block, by its layers."""
        block, k = self.blocks[down], self.features(down)[0] if width is None else width
        lost = dict.fromkeys(block.names, 0.0)
        for name, rank in self.low_rank({down: k}, ranks).items():
            lost[name] = 0.5 * self.ranks.tail(down, k, name, rank)
        lost[down] += self.measured[down].loss(k)
        return lost

    @contextmanager
    def narrowed_(
        self,
        widths: Mapping[str, int | None],
        ranks: Ranks,
        optimizers: Sequence[Optimizer],
        *,
        pivoted: bool,
    ) -> Iterator[dict[str, LayerRecord]]:
        """Narrow blocks, the same in all processes; an error in the block undoes it.

        Args:
            widths: of blocks, by the layer that reads the inner features; None leaves one dense.
            ranks: of their layers, where they have low rank too.
            optimizers: whose parameters and state follow.
            pivoted: whether low-rank layers are stored as pivoted rows.

        Yields:
            What became of their layers.
        """
        records = {x.name: x for down, k in widths.items() for x in self._records(down, k, ranks)}
        if not records:
            yield records
            return
        # where parameters are sharded, a block that was open cannot be put back
        sharded = self.processes.sharded
        with nullcontext() if sharded else all_or_nothing(self.model, records, optimizers):
            asked = {down: k for down, k in widths.items() if k is not None}
            kept = self._narrow_(asked, optimizers)
            inner = self.low_rank(asked, ranks)
            factored = {name: rank for name, rank in inner.items() if rank is not None}
            if factored:
                rows = {up: k for down, k in kept.items() for up in self.blocks[down].ups}
                given = optimizers, self.processes, self.owner
                self.ranks.factor_(factored, (rows, kept), *given, pivoted=pivoted)
            yield records

    def pairs(self, widths: Mapping[str, int | None], ranks: Ranks) -> dict[str, tuple[str, ...]]:
        """Return what reads the features of blocks that are narrowed alone, to what gives them."""
        narrow = {down: k for down, k in widths.items() if k is not None}
        return {
            down: self.blocks[down].ups for down in narrow if not self.low_rank({down: 0}, ranks)
        }

    def note(self, widths: Mapping[str, int | None], ranks: Ranks) -> str:
        """Return how many blocks are narrowed, in words, or ""; after it."""
        narrow = [k for k in widths.values() if k is not None]
        if not narrow:
            return "no feed-forward block is narrowed" if self.asked else ""
        wholes = sorted({self.features(down)[1] for down, k in widths.items() if k is not None})
        span = str(narrow[0]) if len({*narrow}) == 1 else f"{min(narrow):,} to {max(narrow):,}"
        more = sum(any(self.low_rank({down: k}, ranks).values()) for down, k in widths.items())
        return (
            f"{len(narrow)} of {len(self.blocks)} feed-forward blocks narrowed, to {span} of "
            f"{', '.join(f'{whole:,}' for whole in wholes)} inner features"
            + (f", {more} of them with low rank on top" if more else "")
        )

    def _narrow_(
        self, asked: Mapping[str, int], optimizers: Sequence[Optimizer]
    ) -> dict[str, Tensor]:
        """Narrow blocks, and return which of the features that there were are left."""
        left: dict[str, Tensor] = {}
        fewer = [down for down, k in asked.items() if k < self.features(down)[0]]
        for turn in [[down] for down in fewer] if self.processes.sharded else [fewer]:
            layers = [name for down in turn for name in self.blocks[down].names]
            with self.processes.unsharded(self.model, layers, optimizers):
                left |= self._narrow_whole_({down: asked[down] for down in turn}, optimizers)
        return left

    def _narrow_whole_(
        self, asked: Mapping[str, int], optimizers: Sequence[Optimizer]
    ) -> dict[str, Tensor]:
        """Narrow blocks whose parameters are whole."""
        left: dict[str, Tensor] = {}
        found: dict[str, tuple[Narrowed, Tensor | None]] = {}

        def solve() -> dict[str, list[int]]:
            for down in (name for name in asked if name in self.own):
                weight, metric = self.ranks.problems.of(down)
                one = self.own[down].solved(weight, metric.input, asked[down])
                found[down] = one, metric.mean
            return {down: one.kept.tolist() for down, (one, _) in found.items()}

        for part in self.processes.run_on_all(solve):
            for down, kept in part.items():
                self._put(self.blocks[down], kept, found.get(down), optimizers)
                left[down] = torch.tensor(kept)
        owner = {down: self.owner[down] for down in asked}
        broadcast_layers_(self.model, owner, optimizers, self.processes)
        return left

    def _put(
        self,
        block: Block,
        kept: list[int],
        found: tuple[Narrowed, Tensor | None] | None,
        optimizers: Sequence[Optimizer],
    ) -> None:
        down = self.model.get_submodule(block.down)
        place = view(down).parameters[0].device
        stays = torch.zeros(view(down).shape[1], dtype=torch.bool, device=place)
        stays[torch.tensor(kept, device=place)] = True
        for name in block.ups:
            put_pruned_(self.model, name, optimizers, rows=stays)
        weight = view(down).weight
        new = put_pruned_(self.model, block.down, optimizers, columns=stays)
        if found is None:
            return
        one, mean = found
        if mean is not None and new.bias is not None:
            m = double(mean)
            lost = double(weight).to(m.device) @ m - double(one.weight) @ m[one.kept]
            new.bias.add_(lost.to(new.bias))
        new.weight.copy_(one.weight)

    def _records(self, down: str, width: int | None, ranks: Ranks) -> list[LayerRecord]:
        block, one = self.blocks[down], self.measured[down]
        now, whole = self.features(down)
        left = now if width is None else width
        stood = replaced_sizes(self.model, block.names)
        lost, inner = self.lost(down, width, ranks), self.low_rank({down: width}, ranks)
        shown = sorted({round(now ** (i / (_SHOWN - 1))) for i in range(_SHOWN)})
        curve = tuple((k, float(f"{relative_error(one.losses, k):.6g}")) for k in shown)
        records = []
        for name in block.names:
            out_features, in_features = view(self.model.get_submodule(name)).shape
            last, rank = name == down, inner.get(name)
            shape = (out_features, whole) if last else (whole, in_features)
            record = LayerRecord(
                *(name, *shape, rank),
                self._error(down, name, left, rank),
                lost[name],
                one.note if last else "",
                curve=curve if last else (),
                stood=stood.get(name),
                narrow=None if width is None else (width, whole),
                parameters=None if rank is None else self.ranks.parameters(down, left, name, rank),
            )
            records.append(record)
        return records

    def _error(self, down: str, name: str, width: int, rank: int | None) -> float:
        one = self.measured[down]
        if name != down:
            return 0.0 if rank is None else self.ranks.error(down, width, name, rank)
        if rank is None:
            return relative_error(one.losses, width)
        # what the features that stay do not tell, and what their factors lose, are orthogonal
        lost = float(one.losses[width]) + self.ranks.tail(down, width, name, rank) / one.loss_scale
        return math.sqrt(lost / float(one.losses[0]))


def solve_blocks(
    model: nn.Module,
    names: Collection[str],
    blocks: Blocks | None,
    statistics: Statistics,
    settings: Settings,
    *,
    processes: Processes = ONE_PROCESS,
    owner: Mapping[str, int] | None = None,
    track: Track = untracked,
) -> SolvedBlocks:
    """Solve the blocks for all widths at once, each in one process.

    Args:
        model: the same in all processes.
        names: of the targeted layers; blocks with others are left out.
        blocks: those of the model.
        statistics: the same in all processes, or of the layers that each owns.
        settings: none is solved without ``narrow_blocks``.
        processes: the processes.
        owner: which of them has observed a layer; by default the work is shared out.
        track: yields the blocks of this process while they are solved.

    Raises:
        SettingError: if no blocks were looked for.
        LayerError: if a layer is narrower already and in none of the blocks.
        ObservationError: if a statistic that the method needs is missing.
        NotFiniteError: if a weight or a statistic holds a NaN or an infinity.

    Cost:
        That of :func:`~lrcompress.solvers.narrowing.narrowings` for each.
    """
    if not settings.narrow_blocks:
        return SolvedBlocks(model, NarrowedRanks(Problems(model, statistics, settings)))
    blocks = processes.run_on_first(lambda: blocks)
    if blocks is None:
        raise SettingError(
            "narrow_blocks: no step was looked at for feed-forward blocks; observe a step after a "
            "resume, or give blocks= as BlockTrace finds them"
        )
    chosen = {x.down: x for x in blocks.found if {*x.names} <= {*names} and _is_alike(model, x)}
    inside = {name for block in chosen.values() for name in block.names}
    outside = [name for name in names if name not in inside]
    check_kinds(model, outside, narrow=settings.narrow_blocks == LOW_RANK)
    cost = {down: float(view(model.get_submodule(down)).shape[1] ** 3) for down in chosen}
    shared = processes.assign(cost)
    whose = owner or {x: shared[down] for down, one in chosen.items() for x in one.names}

    problems = Problems(model, statistics, settings)
    own: dict[str, Narrowings] = {}

    def work(weights: dict[str, Callable[[], Tensor]]) -> dict[str, BlockSummary]:
        told = {}
        for down in track(list(weights), "solving"):
            weight, one = problems.of(down, weight=weights.pop(down)())
            with noted_retries() as retries:
                own[down] = narrowings(weight, one.output, one.input)
            note = "; ".join(filter(None, (one.note, *retries)))
            scale = 1.0 if one.loss_scale is None else one.loss_scale
            seen = int(statistics.of(down, METHODS[settings.method].kinds).tokens)
            told[down] = BlockSummary(own[down].losses, scale, note, seen)
        return told

    measured: dict[str, BlockSummary] = {}
    for turn in solving_rounds({down: whose[down] for down in chosen}, processes):
        weights = own_weights(model, turn, whose, processes)
        for part in processes.run_on_all(partial(work, weights)):
            measured |= part
    low_rank = settings.narrow_blocks == LOW_RANK
    ranks = solve_ranks(problems, chosen if low_rank else {}, own, whose, processes)
    alone = {name: f"its block is not narrowed: {why}" for name, why in blocks.left_alone.items()}
    given = model, ranks, chosen, measured, own, whose, processes, alone, True
    return SolvedBlocks(*given)


def _is_alike(model: nn.Module, block: Block) -> bool:
    """Return whether a block's layers are all dense, or all narrowed."""
    replaced = [isinstance(model.get_submodule(x), Replacement) for x in block.names]
    narrow = [isinstance(model.get_submodule(x), PrunedLinear) for x in block.names]
    return not any(replaced) or all(narrow)


@torch.no_grad()
def put_pruned_(
    model: nn.Module,
    name: str,
    optimizers: Sequence[Optimizer],
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> PrunedLinear:
    """Put what is left of a layer in its place, with its optimizer state, and return it.

    Args:
        model: changed in place.
        name: of a layer, dense or pruned already.
        optimizers: whose parameters and state follow.
        rows: ``(out,)`` bool, which of its outputs are left; None is all.
        columns: ``(in,)`` bool, which of its inputs are left; None is all.
    """
    layer = model.get_submodule(name)
    old, new = view(layer), PrunedLinear.of(layer, rows, columns)
    replace_(model, name, new)
    swap = partial(swap_parameters_, optimizers, exact=True)
    swap(old.parameters, new.factors, carry_left(rows, columns, old.transposed))
    if old.bias is not None and new.bias is not None and new.bias is not old.bias:
        swap([old.bias], [new.bias], carry_left(rows, None), names=("bias",))
    return new
