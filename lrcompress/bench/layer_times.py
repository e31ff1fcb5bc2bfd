"""Measured time of layers as the price that a budget shares out, in place of parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

from torch import nn

from lrcompress.bench.latency_ranks import Context, Make, seconds_of
from lrcompress.budget import Candidate
from lrcompress.nn import LowRankLinear, PivotedLinear
from lrcompress.statistics.views import view

_PLACES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)  # of the greatest size, measured
_ROUNDS = 5
_TURN = 2e-3  # seconds that a turn takes at least, on a CPU
UNIT = 1e-9  # seconds that prices are whole multiples of


@dataclass
class LayerTimes:
    """Times of linear layers at any rank and width, measured at some and interpolated between.

    Layers of the sizes, dtype and device of those of a model are made anew and called in turns,
    without gradients; equal ones are measured once.

    Args:
        model: whose layers they are.
        rows: how many vectors each of them reads in a pass; others read as many as most do.
        context: that the model runs in, such as autocast.

    Attributes:
        known: seconds at the sizes that were measured, by what was.
    """

    model: nn.Module
    rows: Mapping[str, int]
    context: Context
    known: dict[tuple[object, ...], dict[int, float]] = field(default_factory=dict)

    def priced(self, one: Candidate, align: int) -> Candidate:
        """Return a layer as a candidate whose costs are times, in nanoseconds.

        Args:
            one: whose costs are parameters; with a rank or a keep of its own it keeps that rank.
            align: what ranks are multiples of, as far as they are.
        """
        sizes, whole = (one.out_features, one.in_features), 0.0
        most = min(*sizes) if one.costs else min(*sizes, one.useful + 1)
        plain = self._plain(one.name, *sizes)
        if one.whole:  # features of the architecture's that are gone were on one side
            whole = plain * one.whole / (sizes[0] * sizes[1])
        seconds = self._at(one.name, sizes, most, align, pivoted=bool(one.costs))
        return _with_prices(one, seconds, most, plain, whole)

    def priced_block(
        self, one: Candidate, layers: Sequence[tuple[str, int]], features: int, align: int
    ) -> Candidate:
        """Return a feed-forward block as a candidate whose costs are times, in nanoseconds.

        Args:
            one: whose ranks are widths.
            layers: of the block, the one that reads the inner features last, and the size of the
                other side of each.
            features: inner features that there are now.
            align: what widths are multiples of.
        """
        seconds: dict[int, float] = {}
        for number, (name, other) in enumerate(layers):
            last = number == len(layers) - 1
            for width in _places(one.most, align):
                sizes = (other, width) if last else (width, other)
                seconds[width] = seconds.get(width, 0.0) + self._plain(name, *sizes)
        whole = seconds[one.most]
        now = _interpolated(seconds, one.most)[features] if features < one.most else whole
        return _with_prices(one, seconds, one.most, now, whole if features < one.most else 0.0)

    def _plain(self, name: str, out_features: int, in_features: int) -> float:
        key = ("plain", out_features, in_features, *self._kind(name))
        if key not in self.known:
            self.known[key] = self._measure(
                name, in_features, {0: partial(nn.Linear, in_features, out_features)}
            )
        return self.known[key][0]

    def _at(
        self, name: str, sizes: tuple[int, int], most: int, align: int, *, pivoted: bool
    ) -> dict[int, float]:
        out_features, in_features = sizes
        key = (pivoted, most, align, *sizes, *self._kind(name))
        if key not in self.known:
            kind = PivotedLinear if pivoted else LowRankLinear
            made = {r: partial(kind, in_features, out_features, r) for r in _places(most, align)}
            self.known[key] = self._measure(name, in_features, made)
        return self.known[key]

    def _kind(self, name: str) -> tuple[object, ...]:
        found = view(self.model.get_submodule(name))
        weight = found.parameters[-1]
        return found.bias is not None, weight.dtype, weight.device, self._rows(name)

    def _rows(self, name: str) -> int:
        usual = sorted(self.rows.values())
        return self.rows.get(name) or (usual[len(usual) // 2] if usual else 1)

    def _measure(self, name: str, in_features: int, made: Mapping[int, Make]) -> dict[int, float]:
        """Return the seconds of layers, by key; the median over rounds in which all take turns."""
        layer, shape = self.model.get_submodule(name), (self._rows(name), in_features)
        named = {str(key): make for key, make in made.items()}
        taken = seconds_of(named, layer, shape, self.context, _ROUNDS, _TURN)
        return {key: median(taken[str(key)]) for key in made}


def _places(most: int, align: int) -> list[int]:
    """Return the sizes that are measured, up to the greatest.

    Example:
        >>> _places(200, 8)
        [8, 24, 48, 72, 96, 144, 200]
    """
    rounded = [int(most * place) // align * align for place in _PLACES[:-1]]
    return sorted({max(1, size) for size in rounded} | {most})


def _interpolated(seconds: Mapping[int, float], most: int) -> list[float]:
    """Return the seconds of every size from 0 on, along lines between those that are known.

    Example:
        >>> _interpolated({2: 3.0, 4: 5.0}, 5)
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    """
    known = sorted(seconds.items())
    found = []
    for size in range(most + 1):
        after = next((i for i, (at, _) in enumerate(known) if at >= size), len(known) - 1)
        (a, below), (b, above) = known[max(0, after - 1)], known[max(after, min(1, len(known) - 1))]
        slope = (above - below) / (b - a) if b > a else 0.0
        found.append(below + slope * (size - a))
    return found


def _with_prices(
    one: Candidate, seconds: Mapping[int, float], most: int, plain: float, whole: float
) -> Candidate:
    """Return a candidate with prices: rising, whole numbers, 0 of what is not there."""
    costs = [0]
    for value in _interpolated(seconds, most)[1:]:
        costs.append(max(costs[-1] + 1, round(value / UNIT)))
    prices = {"price": max(1, round(plain / UNIT)), "whole": round(whole / UNIT)}
    return replace(one, costs=tuple(costs), unit=1, **prices)  # type: ignore[arg-type]
