"""Prune LoSparse layers by importance scores, and compact what is left."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.budget import kept_units
from lrcompress.distributed import ONE_PROCESS, Processes, local_rows
from lrcompress.importance import ROW_SCORES, Importance, component, entries
from lrcompress.nn import LowRankSparseLinear
from lrcompress.nn.low_rank_sparse import prune_layers_
from lrcompress.pruning.budget import LoSparseBudget, Quota
from lrcompress.pruning.magnitude import Computed, largest_entries
from lrcompress.report.record import Curve, LayerRecord
from lrcompress.statistics.views import view
from lrcompress.structure.surgery import carry_kept, replace_, swap_parameters_

_PARTS = ("components", "rows")
_NAMES = ("inner.weight", "left.weight")
_SHOWN = 25  # units of a layer whose scores are kept for the report


class Pruner:
    """Score the units of LoSparse layers by their gradients, and prune the least important.

    A unit that was pruned stays at zero, its optimizer state too; with ``revive`` it competes
    again at every mask. Of each layer one rank component always stays.

    Args:
        model: its layers ``names`` are split.
        names: of the layers.
        quotas: what may stay.
        shares: how units are scored.
        importance: the averages of their scores.
        means: mean inputs of layers whose bias takes up what pruning takes away.
        processes: the processes that do the same at the same time, with scores and masks of whole
            layers in each; where each holds only some rows of a parameter, rows are pruned, not
            single entries.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        quotas: Sequence[Quota],
        shares: LoSparseBudget,
        importance: Importance,
        means: Mapping[str, Tensor] | None = None,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        self.processes = processes
        self.quotas, self.shares, self.importance = list(quotas), shares, importance
        self.means = dict(means or {})
        self.masks: dict[str, Tensor] = {}  # entries that stay, where single entries are pruned
        self.ranking: dict[str, Curve] = {}  # for the report: scores when pruning began
        self.layers: dict[str, LowRankSparseLinear] = {}
        for name in names:
            layer = model.get_submodule(name)
            assert isinstance(layer, LowRankSparseLinear)
            self.layers[name] = layer

    @property
    def done(self) -> bool:
        """Whether there is nothing to prune."""
        return not self.quotas

    def trained_by(self, optimizer: Optimizer) -> bool:
        """Return whether ``optimizer`` holds the first of the layers."""
        first = next(iter(self.layers.values())).inner.weight
        return any(p is first for group in optimizer.param_groups for p in group["params"])

    @property
    def keep(self) -> float:
        """Parameters that remain now / parameters of the dense layers."""
        dense = sum(layer.out_features * layer.in_features for layer in self.layers.values())
        return self._parameters({key: self._kept(*key) for key in self._keys(_PARTS)}) / dense

    def _keys(self, parts: Iterable[str]) -> list[tuple[str, str]]:
        return [(part, name) for name in self.layers for part in parts]

    def _parameters(self, kept: Mapping[tuple[str, str], Tensor]) -> int:
        """Return the parameters that units take, after one wait for the device."""
        counts: list[Tensor] = []
        for units in kept.values():
            counts.append(units.count_nonzero())
            counts[-1] = counts[-1].to(counts[0].device)
        numbers = torch.stack(counts).tolist()
        return sum(self._price(*key) * num for key, num in zip(kept, numbers, strict=True))

    @torch.no_grad()
    def observe(self, scale: float = 1.0) -> None:
        """Add the scores of one step's gradients, as they stand in ``.grad``.

        Args:
            scale: what gradients are multiplied by to be those of the mean loss.
        """
        parts: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            inner, left = layer.inner.weight, layer.left.weight
            if inner.grad is None or left.grad is None:
                continue
            (own, mine), (slope, _) = local_rows(inner), local_rows(inner.grad)
            first = max(0, layer.rank - mine.start)  # of the rows that are not the right factor's
            rows = self._measure(own[first:], slope[first:])
            changes = component(local_rows(left)[0], local_rows(left.grad)[0])
            parts[name] = torch.cat([changes, self._placed(layer, rows, mine.start + first)])
        if not parts:
            return
        if self.processes.sharded:
            flat = torch.cat(list(parts.values()))
            self.processes.sum_rows_(flat)
            parts = dict(
                zip(parts, torch.split(flat, [len(part) for part in parts.values()]), strict=True)
            )
        components = [part[: self.layers[name].rank] for name, part in parts.items()]
        torch._foreach_abs_(components)
        torch._foreach_div_(components, [float(_unit(self.layers[name])) for name in parts])
        if scale != 1:
            torch._foreach_mul_(list(parts.values()), scale)
        self.importance.add(parts)

    def _placed(self, layer: LowRankSparseLinear, rows: Tensor, start: int) -> Tensor:
        """Return scores of rows of ``inner`` from ``start`` on, among zeros for all others'."""
        if not self.processes.sharded:
            return rows
        place = rows.new_zeros(layer.num_rows)
        place[start - layer.rank :][: len(rows)] = rows
        return place

    @property
    def _single(self) -> bool:
        """Whether single entries are pruned, not rows."""
        return self.shares.granularity == "entries"

    @property
    def _measure(self) -> Callable[[Tensor, Tensor], Tensor]:
        if self._single:
            return entries
        # beside components, which are scored as a whole, rows are too
        return ROW_SCORES["group" if self.shares.competes else self.shares.row_score]

    @torch.no_grad()
    def prune_(self, share: float, optimizers: Iterable[Optimizer] = ()) -> None:
        """Prune down to the quotas at a share of what has to go.

        Args:
            share: of what has to go in the end, what may still stay: 1 at the start, 0 at the end.
            optimizers: whose state of pruned units is set to zero.
        """
        if not self.importance.known or self.done:
            return
        self._rank_once()
        asked = {part for quota in self.quotas for part in quota.parts}
        chosen = {key: self._kept(*key) for key in self._keys(_PARTS) if key[0] not in asked}
        left = 0.0
        for quota in self.quotas:
            left += quota.at(share)
            stays = self._chosen(quota, left)
            chosen |= stays
            if quota is not self.quotas[-1]:  # what components leave over goes to rows
                left -= self._parameters(stays)
        self._apply(chosen, tuple(optimizers))

    def _rank_once(self) -> None:
        if not self.ranking:
            part = "rows" if self.shares.sparse else "components"
            self.ranking = _rankings({name: self._score(part, name) for name in self.layers})

    def _kept(self, part: str, name: str) -> Tensor:
        """Return which units of a part of a layer have not been pruned."""
        layer = self.layers[name]
        if part == "components":
            return layer.kept[: layer.rank]
        rows = layer.kept[layer.rank :]
        if not self._single:
            return rows
        return self.masks[name] if name in self.masks else rows.repeat_interleave(layer.in_features)

    def _price(self, part: str, name: str) -> int:
        """Return the parameters of a unit."""
        layer = self.layers[name]
        return _unit(layer) if part == "components" else 1 if self._single else layer.in_features

    def _score(self, part: str, name: str) -> Tensor:
        """Return the score of every unit, 0 where the loss never depended on the layer."""
        score, rank = self.importance.score(name), self.layers[name].rank
        if score is None:
            return torch.zeros(self._kept(part, name).shape, device=self.layers[name].kept.device)
        return score[:rank] if part == "components" else score[rank:]

    def _asked(self, key: tuple[str, str]) -> Tensor:
        """Return scores, infinite where a unit stays or goes in any case."""
        score = self._score(*key)
        if key[0] == "components" or not self.shares.revive:
            score = torch.where(self._kept(*key), score, -math.inf)
        return score if key[0] == "rows" else score.index_fill(0, score.argmax(), math.inf)

    def _chosen(self, quota: Quota, budget: float) -> dict[tuple[str, str], Tensor]:
        """Return which units of a quota stay, by part and layer."""
        keys = self._keys(quota.parts)
        if self._single and quota.parts == ("rows",):
            return dict(largest_entries(Computed(keys, self._asked), math.floor(budget)))
        asked = {key: self._asked(key) for key in keys}
        return kept_units(asked, {key: self._price(*key) for key in keys}, budget)

    def _apply(
        self, chosen: Mapping[tuple[str, str], Tensor], optimizers: Sequence[Optimizer]
    ) -> None:
        kept: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            rows = chosen["rows", name]
            if self._single:
                self.masks[name] = rows
                rows = rows.view(layer.num_rows, -1).any(1)
            kept[name] = torch.cat([chosen["components", name], rows])
            mean = self.means.get(name)
            if mean is not None and layer.bias is not None:
                local_rows(layer.bias)[0].add_(self._lost(name, layer, kept[name], mean))
        layers = tuple(self.layers.values())
        prune_layers_(layers, tuple(kept.values()), revive=self.shares.revive)
        for optimizer in optimizers:
            for layer, units in zip(layers, kept.values(), strict=True):
                _forget(optimizer, layer, units)
        self.hold_(optimizers)

    def _lost(self, name: str, layer: LowRankSparseLinear, kept: Tensor, mean: Tensor) -> Tensor:
        """Return the loss of output for an input ``(in,)``, in the rows that this process has."""
        inner, mine = local_rows(layer.inner.weight)
        gone = inner.masked_fill(kept[mine, None], 0)
        if name in self.masks:
            mask = self.masks[name].view(layer.num_rows, layer.in_features)
            gone[layer.rank :] = inner[layer.rank :].masked_fill(mask, 0)
        parts = gone.new_zeros(len(kept))
        parts[mine] = gone @ mean.to(gone)
        self.processes.sum_rows_(parts)
        left, here = local_rows(layer.left.weight)
        rows = parts.new_zeros(layer.out_features)
        rows[layer.index] = parts[layer.rank :]
        return left @ parts[: layer.rank] + rows[here]

    @torch.no_grad()
    def hold_(
        self, optimizers: Iterable[Optimizer] = (), names: Iterable[str] | None = None
    ) -> None:
        """Set pruned single entries to zero again after a step; pruned rows stay by themselves."""
        for name in self.masks if names is None else names:
            if name not in self.masks:
                continue
            layer = self.layers[name]
            mask = self.masks[name].view(layer.num_rows, layer.in_features)
            weight = layer.inner.weight
            for held in (weight, *_moments(optimizers, weight)):
                held[layer.rank :].mul_(mask)

    @torch.no_grad()
    def compact_(self, model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> list[LayerRecord]:
        """Replace every layer by a smaller one of its kept units, or a dense one if no larger.

        Args:
            model: that holds the layers.
            optimizers: whose parameters and state follow.

        Returns:
            What remains, layer by layer, counted from the new layers. Only those with single
            entries pruned stay in ``layers``, to be held at zero.
        """
        records, held = [], tuple(optimizers)
        for name, layer in tuple(self.layers.items()):
            with self.processes.unsharded(model, (name,), held):
                record, new = self._compacted(model, name, layer, held)
            self._follow(name, layer, new)
            records.append(record)
        self.quotas, self.importance = [], Importance()  # of units that are no more
        return records

    def _compacted(
        self,
        model: nn.Module,
        name: str,
        layer: LowRankSparseLinear,
        optimizers: Sequence[Optimizer],
    ) -> tuple[LayerRecord, nn.Module]:
        """Replace one layer; return what remains and the new layer."""
        new: nn.Module = layer.compacted()
        record = self._record(name, layer, new)
        if record.rank is None:
            new = layer.to_dense()
        replace_(model, name, new)
        old, fresh = view(layer).parameters, view(new).parameters
        named = _NAMES if isinstance(new, LowRankSparseLinear) else None
        swap_parameters_(optimizers, old, fresh, carry_kept(layer), names=named, exact=True)
        return record, new

    def _record(self, name: str, layer: LowRankSparseLinear, new: nn.Module) -> LayerRecord:
        rows = new.num_rows if isinstance(new, LowRankSparseLinear) else 0
        single = int(self.masks[name].sum()) if name in self.masks and rows else None
        sizes = (layer.out_features, layer.in_features)
        record = LayerRecord(
            name,
            *sizes,
            rank=int(new.rank),  # type: ignore[arg-type]
            error=None,
            predicted_loss=None,
            rows=rows,
            entries=single,
            importance=self.ranking.get(name, ()),
        )
        if record.after < record.before:
            return record
        return replace(record, rank=None, rows=None, entries=None)

    def _follow(self, name: str, layer: LowRankSparseLinear, new: nn.Module) -> None:
        mask = self.masks.pop(name, None)
        if mask is not None and isinstance(new, LowRankSparseLinear):
            alive = layer.kept[layer.rank :]
            self.masks[name] = mask.view(layer.num_rows, -1)[alive].flatten()
            self.layers[name] = new
        else:
            del self.layers[name]

    def state_dict(self) -> dict[str, object]:
        """Return the state that is not in the model, in plain types and tensors."""
        quotas = [{"parts": list(q.parts), "start": q.start, "final": q.final} for q in self.quotas]
        return {
            "names": list(self.layers),
            "quotas": quotas,
            "means": dict(self.means),
            "masks": dict(self.masks),
            "ranking": dict(self.ranking),
            "importance": self.importance.state_dict(),
        }

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        model: nn.Module,
        shares: LoSparseBudget,
        importance: Importance,
        processes: Processes = ONE_PROCESS,
    ) -> "Pruner":
        """Return the pruner that :meth:`state_dict` described, for a model with its layers."""
        quotas = [Quota(tuple(q["parts"]), q["start"], q["final"]) for q in state["quotas"]]
        pruner = cls(model, state["names"], quotas, shares, importance, processes=processes)
        device = next(model.parameters()).device
        pruner.means = {name: mean.to(device) for name, mean in state["means"].items()}
        pruner.masks = {name: mask.to(device) for name, mask in state["masks"].items()}
        pruner.ranking = dict(state["ranking"])
        importance.load_state_dict(state["importance"], device)
        return pruner


def _rankings(scores: Mapping[str, Tensor]) -> dict[str, Curve]:
    """Return the ranking curve of each layer: ``(units scored at least so high, score)`` pairs."""
    steps = {name: max(1, min(_SHOWN, len(one)) - 1) for name, one in scores.items()}
    shown: list[Tensor] = []
    for name, one in scores.items():
        places = torch.arange(steps[name] + 1, device=one.device) * (len(one) - 1) // steps[name]
        shown.append(one.sort(descending=True).values[places])
        shown[-1] = shown[-1].to(shown[0].device)
    values = iter(torch.cat(shown).tolist())  # one wait for all
    return {
        name: tuple(
            {
                i * (len(one) - 1) // steps[name] + 1: float(f"{next(values):.6g}")
                for i in range(steps[name] + 1)
            }.items()
        )
        for name, one in scores.items()
    }


def _unit(layer: LowRankSparseLinear) -> int:
    return layer.out_features + layer.in_features


def _moments(optimizers: Iterable[Optimizer], parameter: Tensor) -> list[Tensor]:
    """Return the optimizers' state that has an entry for every entry of a parameter."""
    return [
        value
        for optimizer in optimizers
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]


def _forget(optimizer: Optimizer, layer: LowRankSparseLinear, kept: Tensor) -> None:
    for value in _moments([optimizer], layer.inner.weight):
        own, mine = local_rows(value)
        own.masked_fill_(~kept[mine, None], 0)
    for value in _moments([optimizer], layer.left.weight):
        local_rows(value)[0].masked_fill_(~kept[: layer.rank], 0)
