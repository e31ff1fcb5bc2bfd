"""Loss curves: predicted loss of every method over ``keep``, without changing the model."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lrcompress.budget import allocate
from lrcompress.engine.candidates import candidates
from lrcompress.engine.distributed_solve import solve_layers
from lrcompress.engine.settings import Settings
from lrcompress.errors import SettingError
from lrcompress.objective import LOW_RANK
from lrcompress.report.keep_curves import PredictedLoss
from lrcompress.report.record import sum_or_none
from lrcompress.statistics.moments import Statistics

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


@torch.no_grad()
def loss_curves(
    model: nn.Module,
    statistics: Statistics,
    settings: Settings,
    methods: Sequence[str],
    keeps: Sequence[float] = KEEPS,
) -> list[PredictedLoss]:
    """Return the predicted loss and error of every method at every ``keep``; nothing is changed.

    Each method allocates ranks as it does by default; that of the settings, as they request.

    Args:
        model: whose layers ``settings`` choose.
        statistics: of these layers, of the kinds that the methods need.
        settings: all but the method, ``keep``, ``keep_measured`` and ``narrow_blocks``: no layer
            stays as it is because its factors are not faster, and curves are of ranks alone.
        methods: keys of :data:`lrcompress.objective.METHODS`, of low-rank ones.
        keeps: shares of the targeted layers' parameters.

    Raises:
        SettingError: if the shapes of a method's factors depend on ``keep``.
        NoMatchError: if a pattern matches no layer.
        ObservationError: if a statistic that a method needs is missing.
        NotFiniteError: if a weight or a statistic holds a NaN or an infinity.

    Cost:
        That of solving all layers once a method.
    """
    names = settings.select(model).names
    other = [method for method in methods if method not in LOW_RANK]
    if other:
        raise SettingError(
            f"a loss curve takes low-rank methods, {', '.join(LOW_RANK)}; the factors of "
            f"{other[0]!r} have other shapes at every keep"
        )
    found = []
    for method in methods:
        refit, shrink = settings.refit_bias, settings.shrink
        least = dict.fromkeys(names, 1)  # no factors are asked for
        measured = solve_layers(
            model, names, statistics, method, refit_bias=refit, shrink=shrink, most=least
        ).measured
        # what layers gain on this machine is measured at a point, of the method's own ranks
        ranks_alone = replace(settings, shapes={}, keep_measured=False, narrow_blocks=False)
        own = ranks_alone.of_method(method)
        asked = candidates(model, names, own, measured)
        for keep in keeps:
            try:
                ranks = allocate(asked, keep, own.spread, own.align)
            except SettingError:  # less than the least ranks take
                found.append(PredictedLoss(method, keep, None, None))
                continue
            errors = [measured[name].error(rank) for name, rank in ranks.items()]
            predicted = sum_or_none(measured[name].loss(rank) for name, rank in ranks.items())
            found.append(PredictedLoss(method, keep, sum(errors) / len(errors), predicted))
    return found
