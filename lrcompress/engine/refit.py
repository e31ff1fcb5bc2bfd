"""Refit: left factors solved anew for the inputs that the compressed model really gives.

Factors are chosen for the inputs of the dense model, and each layer of a compressed one reads what
the layers before it have made of them. Layer after layer, in the order of the forward pass, the
left factor of ``W ≈ left R`` becomes the one that minimises ``Σ ‖W (β x + (1 − β) x̂) − left R x̂‖²``
with ``x`` the layer's inputs in the dense model and ``x̂`` those that the compressed layers before
it give, refitted themselves. ``R`` is the right factor, or the choice of inner features of a
narrowed feed-forward block, whose layers before it are taken as dense until then.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.block_runs import (
    Call,
    Order,
    RealTokens,
    calls_of,
    evaluating,
    find_order,
    inputs_of,
    standing_in,
)
from lrcompress.engine.distributed_solve import broadcast_layers_
from lrcompress.engine.passes import Passes
from lrcompress.engine.progress import Track, untracked
from lrcompress.engine.settings import Settings
from lrcompress.errors import ObservationError, SettingError, naming_layer
from lrcompress.nn import LowRankLinear, NarrowLowRank, PivotedLinear, PrunedLinear
from lrcompress.nn.replacement import plain_linear
from lrcompress.solvers.left_factor import Normal
from lrcompress.statistics.views import view


@dataclass(frozen=True)
class Before:
    """Layers as they were before they were compressed.

    Attributes:
        dense: dense layers that compute the same.
        columns: which of the architecture's inputs layers had that were narrow already.
    """

    dense: Mapping[str, nn.Module]
    columns: Mapping[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, names: Iterable[str]) -> "Before":
        """Hold what layers compute now, whatever becomes of them.

        The weights are the layers' own, multiplied out where they are factored; biases are copied.
        """
        dense, columns = {}, {}
        for name in names:
            layer = model.get_submodule(name)
            old = view(layer)
            bias = None if old.bias is None else nn.Parameter(old.bias.detach().clone(), False)
            dense[name] = plain_linear(nn.Linear, old.weight, bias, trained=False).eval()
            if isinstance(layer, PrunedLinear):
                columns[name] = layer.columns
        return cls(dense, columns)


@dataclass
class _Streams:
    """What the next block of a chain is given in a batch, by the dense and by the own model."""

    dense: dict[str, Call]
    own: dict[str, Call]
    hidden: tuple[object, object] = (None, None)

    def of(self, block: str) -> tuple[Call, Call]:
        calls = self.dense[block], self.own[block]
        dense, own = (
            call if call.place is None else call.given(h)
            for call, h in zip(calls, self.hidden, strict=True)
        )
        return dense, own


@dataclass
class Refit:
    """Refits the layers of a model once they are compressed.

    Args:
        model: whose layers they are.
        layers: as they were before.
        passes: of the model.
        anchor: ``β``: how much of a layer's target comes from its inputs in the dense model; the
            rest comes from its own. 0 follows its own alone, 1 over-fits few tokens.
        refit_bias: whether biases are refitted too, where there are any.
        processes: those that do the same, on batches of their own.
        track: yields blocks while they are refitted.

    Attributes:
        left_alone: layers that were not refitted, with the reasons.
        tokens: that layers were refitted on.
    """

    model: nn.Module
    layers: Before
    passes: Passes
    anchor: float
    refit_bias: bool = True
    processes: Processes = ONE_PROCESS
    track: Track = untracked
    left_alone: dict[str, str] = field(init=False, default_factory=dict)
    tokens: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.dense = self.layers.dense
        # narrowed blocks that are still taken as dense: what reads the features, to what gives them
        self._pending: dict[str, Sequence[str]] = {}

    @classmethod
    def before(
        cls,
        model: nn.Module,
        names: Sequence[str],
        settings: Settings,
        passes: Passes | None,
        processes: Processes = ONE_PROCESS,
        track: Track = untracked,
    ) -> "Refit | None":
        """Return what will refit layers that are not yet compressed; None if it is not asked for.

        Raises:
            SettingError: if there is nothing to refit on, or parameters are sharded.
        """
        if settings.refit is None:
            return None
        check_whole(processes)
        if passes is None:
            raise SettingError("refit solves layers for what batches give, and there are none")
        layers = Before.of(model, names)
        asked = settings.refit, settings.refit_bias
        return cls(model, layers, passes, *asked, processes, track)

    def run_(self, together: Mapping[str, Sequence[str]]) -> None:
        """Refit all layers that can be followed; an error leaves some of them refitted.

        Args:
            together: the layer that reads a narrowed block's features, to those that give them.

        Raises:
            ObservationError: if there are no batches, or a mask does not fit.
            NotFiniteError: if what a layer reads holds a NaN or an infinity.

        Cost:
            A pass of the dense model for what blocks are given, one of the dense and about two of
            the compressed blocks; where blocks do not follow each other in a chain, two passes of
            the model for each of them. Of a layer ``rank·(in + rank)`` sums; what one block's
            layers read in the dense model is held for all batches, besides what a block is given.
        """
        self._pending = {**together}
        changed = [name for name in self.dense if self._is_changed(name)]
        layers = {name: self.model.get_submodule(name) for name in self.dense}
        both = [name for name, layer in layers.items() if isinstance(layer, NarrowLowRank)]
        self.left_alone |= dict.fromkeys(both, "it is of low rank in a narrowed block")
        if not changed:
            return
        with evaluating(self.model), self.passes.context():
            order = self.processes.run_on_first(lambda: self._order(changed))
            self.left_alone |= order.left_alone
            for name in order.left_alone:
                self._pending.pop(name, None)
            for number, chain in enumerate(order.chains):
                follows = number > 0 or bool(order.left_alone)
                streams = self._everywhere(partial(self._streams, chain, follows))
                for block in self.track(chain, "refitting"):
                    gave = self._refit_block_(block, order.stages[block], streams)
                    if block != chain[-1]:
                        self._go_on_(block, streams, gave)
            broadcast_layers_(self.model, dict.fromkeys(changed, 0), (), self.processes)

    @property
    def note(self) -> str:
        """What was done, in words."""
        alone = f", {len(self.left_alone)} layers left alone" if self.left_alone else ""
        return f"refitted at {self.anchor:g} of the dense inputs on {self.tokens:,} tokens{alone}"

    def _is_changed(self, name: str) -> bool:
        layer = self.model.get_submodule(name)
        able = isinstance(layer, LowRankLinear | PivotedLinear | PrunedLinear)
        return able and not isinstance(layer, NarrowLowRank)

    def _order(self, changed: Sequence[str]) -> Order:
        batch = next(iter(self.passes.batches), None)
        if batch is None:
            raise ObservationError("refit: there are no batches to refit on")
        with standing_in(self.model, self.dense):
            return find_order(self.model, changed, partial(self._run, batch))

    def _run(self, batch: Any) -> None:
        self.passes.run_alike(self.model, batch)

    def _everywhere(self, work: Callable[[], Any]) -> Any:
        """Return what this process's work gives; if it fails in one process, fail in all."""
        result: list[Any] = []
        self.processes.run_on_all(lambda: result.append(work()))
        return result[0]

    def _streams(self, chain: Sequence[str], follows: bool) -> list[_Streams]:
        """Return what blocks of a chain are given in every batch.

        Args:
            chain: the blocks.
            follows: whether layers before it are compressed.
        """
        found = []
        for batch in self.passes.batches:
            run = partial(self._run, batch)
            with standing_in(self.model, self.dense):
                dense = calls_of(self.model, chain, run)
            own = dense
            if follows:
                with self._pending_dense():
                    own = calls_of(self.model, chain, run)
            found.append(_Streams(dense, own))
        return found

    def _pending_dense(self) -> AbstractContextManager[None]:
        names = [name for down, ups in self._pending.items() for name in (*ups, down)]
        return standing_in(self.model, {name: self.dense[name] for name in names})

    def _refit_block_(
        self, block: str, stages: Sequence[Sequence[str]], streams: Sequence[_Streams]
    ) -> list[object]:
        """Refit the layers of a block, and return what it gives in the dense model, by batch."""
        wanted = [[x for x in stage if self._reader(x) is not None] for stage in stages]
        every = [name for stage in wanted for name in stage]
        with standing_in(self.model, self.dense):
            gave = self._everywhere(partial(self._dense_inputs, block, every, streams))
        for stage in filter(None, wanted):
            self._refit_stage_(block, stage, streams, [read for read, _ in gave])
        return [output for _, output in gave]

    def _go_on_(self, block: str, streams: Sequence[_Streams], gave: Sequence[object]) -> None:
        with self._pending_dense():
            for one, output in zip(streams, gave, strict=True):
                _, own = inputs_of(self.model, block, one.of(block)[1], (), whole=True)
                one.hidden = output, own

    def _dense_inputs(
        self, block: str, names: Sequence[str], streams: Sequence[_Streams]
    ) -> list[tuple[dict[str, Tensor], object]]:
        return [
            inputs_of(self.model, block, one.of(block)[0], names, whole=True) for one in streams
        ]

    def _refit_stage_(
        self,
        block: str,
        stage: Sequence[str],
        streams: Sequence[_Streams],
        read: Sequence[Mapping[str, Tensor]],
    ) -> None:
        sums = {
            name: Normal(view(self.dense[name]).weight, reader, self.anchor)
            for name in stage
            if (reader := self._reader(name)) is not None
        }

        work = partial(self._add_, block, sums, streams, read)
        for faults in self.processes.run_on_all(work):
            self.left_alone |= faults
        for name in stage:
            self._pending.pop(name, None)
        for name in (x for x in stage if x not in self.left_alone):
            for total in sums[name].sums:
                self.processes.all_reduce_(total)
            with naming_layer(name):
                self._everywhere(partial(self._set_, name, sums[name]))
            self.tokens = max(self.tokens, int(sums[name].count.sum()))

    def _add_(
        self,
        block: str,
        sums: Mapping[str, Normal],
        streams: Sequence[_Streams],
        read: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, str]:
        """Add what layers of a block read in all batches; return those that read other tokens."""
        faults: dict[str, str] = {}
        masks = map(self.passes.masks, self.passes.batches)
        for number, (one, dense, mask) in enumerate(zip(streams, read, masks, strict=True)):
            call = one.of(block)[1]
            with self._pending_dense():
                own, _ = inputs_of(self.model, block, call, sums)
            real = RealTokens(self.model, *mask)
            for name, x in own.items():
                if _reads_others(dense[name], x, call):
                    faults[name] = "it does not read the tokens that its block is given"
                    continue
                tokens = real.of(name, x, call)
                sums[name].add_(tokens.of(dense[name]), tokens.of(x), number)
        return faults

    def _reader(self, name: str) -> Tensor | None:
        """Return ``R (rank, in)``, or which inputs are left; None if nothing is refitted."""
        layer = self.model.get_submodule(name)
        if isinstance(layer, LowRankLinear):
            return layer.right.weight.detach()
        if isinstance(layer, PivotedLinear):
            return layer.right.detach()
        if not isinstance(layer, PrunedLinear):
            return None
        kept = layer.columns
        if name in self.layers.columns:
            kept = kept[self.layers.columns[name]]
        return None if bool(kept.all()) else kept.nonzero()[:, 0]

    def _set_(self, name: str, sums: Normal) -> None:
        """Give a layer its new left factor, and the bias beside it."""
        layer, dense = self.model.get_submodule(name), view(self.dense[name])
        old, new = view(layer).bias, None
        bias = dense.bias if self.refit_bias and old is not None else None
        if isinstance(layer, LowRankLinear):
            left, new = sums.solve(layer.left.weight.detach(), bias)
            layer.left.weight.copy_(left)
        elif isinstance(layer, PivotedLinear):
            left, new = sums.solve(layer.left.detach(), bias)
            layer.set_(left, layer.right)
        else:
            assert isinstance(layer, PrunedLinear)
            left, new = sums.solve(layer.weight.detach(), bias)
            layer.weight.copy_(left)
        if old is not None and new is not None:
            old.copy_(new)


def check_whole(processes: Processes) -> None:
    """Check that parameters are whole.

    Raises:
        SettingError: if each process has only a part of them.
    """
    if processes.sharded:
        raise SettingError(
            "refit runs blocks one by one on whole layers, of which each process has only a part "
            "under FSDP2; leave it out, or use strategy='ddp'"
        )


def _reads_others(dense: Tensor, own: Tensor, call: Call) -> bool:
    counts = {x.shape[:-1].numel() for x in call.tensors}
    return dense.shape != own.shape or own.shape[:-1].numel() not in counts
