"""The targeted layers as candidates for ranks: their error curves, costs and bounds."""

import math
from collections.abc import Mapping, Sequence

from torch import nn

from lrcompress.budget import Candidate, cost, match_bounds, pivoted_costs
from lrcompress.engine.distributed_solve import LayerSummary
from lrcompress.engine.factored_layers import is_pivoted
from lrcompress.engine.kronecker_shapes import by_layer
from lrcompress.engine.settings import Settings
from lrcompress.errors import SettingError
from lrcompress.nn import LowRankLinear, PivotedLinear
from lrcompress.statistics.views import view
from lrcompress.structure.parameter_counts import inner_features, whole_shape


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
        whole = math.prod(whole_shape(layer)) if inner_features(layer) else 0
        lowest, highest = match_bounds(settings.keep_range, *shape, unit or None, costs, whole)
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
                whole=whole,
            )
        )
    return result


def parameters_of(one: Candidate, rank: int | None) -> int | None:
    """Return the parameters of a layer that is no pair of factors, for the record."""
    return cost(one, rank) if (one.costs or one.whole) and rank is not None else None
