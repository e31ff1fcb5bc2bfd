"""Rank allocation by measured latency: layers that factors do not make faster stay."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from lrcompress.bench.timing import interleaved, ratio
from lrcompress.budget import Candidate, allocate, kept_share
from lrcompress.errors import SettingError
from lrcompress.nn import LowRankLinear, PivotedLinear
from lrcompress.statistics.views import view

# Makes a context that a forward pass runs in, such as that of autocast.
Context = Callable[[], AbstractContextManager[object]]
# Calls between two waits for an accelerator.
CALLS = 20


@dataclass(frozen=True)
class RankChoice:
    """The rank of every layer, and why some layers stay as they are.

    Attributes:
        ranks: as of :func:`~lrcompress.budget.allocate`.
        notes: layer name to why it stays as it is.
        missed: what became of ``keep``, if it is not met; else "".
    """

    ranks: dict[str, int | None]
    notes: dict[str, str] = field(default_factory=dict)
    missed: str = ""


def allocate_by_latency(
    model: nn.Module,
    asked: Sequence[Candidate],
    keep: float | None,
    allocation: str,
    align: int,
    tokens: int,
    context: Context = nullcontext,
) -> RankChoice:
    """Allocate ranks, and leave layers as they are whose factors are not faster on this machine.

    Each layer is measured at the rank it would get. Those that are not faster stay, and take
    their parameters from the budget of the others: ranks are allocated and measured again until
    all factored layers are faster. If the layers that stay take more than ``keep`` allows, the
    others get the ranks of the first allocation, and ``keep`` is missed. Layers with a rank or
    keep of their own are not measured.

    Args:
        model: whose layers they are.
        asked: the layers.
        keep: of :func:`~lrcompress.budget.allocate`, as are ``allocation`` and ``align``.
        allocation: see ``keep``.
        align: see ``keep``.
        tokens: that a layer reads at once.
        context: that the model runs in, such as autocast; layers are measured in it.

    Raises:
        SettingError: if ``keep`` cannot be met even before layers are measured.

    Cost:
        Some 12 forward passes of every size of layer, at every rank that is tried; on an
        accelerator 220.
    """
    first = ranks = allocate(asked, keep, allocation, align)
    free = [one for one in asked if one.rank is None and one.keep is None]
    times: dict[tuple[object, ...], float] = {}
    notes: dict[str, str] = {}
    while new := _not_faster(model, free, ranks, tokens, times, context):
        notes |= new
        free = [one for one in free if one.name not in notes]
        held = [_candidate_as_is(one, model) if one.name in notes else one for one in asked]
        try:
            ranks = allocate(held, keep, allocation, align)
        except SettingError:
            ranks = first | allocate([one for one in held if one.name in notes], None)
            break
    kept, missed = kept_share(asked, ranks), ""
    if keep is not None and notes and kept > keep + 1e-9:
        missed = (
            f"keep={keep:g} is missed, {kept:.3f} remains: {len(notes)} of {len(asked)} layers "
            "are not faster with factors and stay as they are"
        )
    return RankChoice(ranks, notes, missed)


def _not_faster(
    model: nn.Module,
    free: Sequence[Candidate],
    ranks: Mapping[str, int | None],
    tokens: int,
    times: dict[tuple[object, ...], float],
    context: Context,
) -> dict[str, str]:
    """Return the layers that their ranks do not make faster, and why; fill up ``times``."""
    found = {}
    for one in free:
        rank, layer = ranks[one.name], model.get_submodule(one.name)
        if rank is None:
            continue
        pivoted = bool(one.costs)
        now = type(layer).__name__, getattr(layer, "rank", None)
        key = (one.out_features, one.in_features, *now, rank, pivoted)
        if key not in times:
            times[key] = relative_time(layer, rank, tokens, context, pivoted=pivoted)
        if times[key] >= 1:
            found[one.name] = (
                f"stays as it is: a rank of {rank} takes {times[key]:.2f} × its time at {tokens} "
                "tokens"
            )
    return found


def _candidate_as_is(one: Candidate, model: nn.Module) -> Candidate:
    """Return a layer as a candidate for the rank, or the density, that it has."""
    layer = model.get_submodule(one.name)
    if isinstance(layer, LowRankLinear | PivotedLinear):
        return replace(one, rank=layer.rank)
    return replace(one, keep=1.0)


@torch.no_grad()
def relative_time(
    layer: nn.Module,
    rank: int,
    tokens: int,
    context: Context = nullcontext,
    rounds: int = 11,
    *,
    pivoted: bool = False,
) -> float:
    """Return the latency of factors of a rank / that of a layer like ``layer``.

    Both are new, of its sizes, dtype and device, and applied to ``(tokens, in)`` in turns within
    ``context``, without gradients; the median over rounds. Autocast converts the weights in every
    call, as it does in every step. Random numbers that others draw are the same with
    it and without. With ``pivoted``, the factors are pivoted rows.
    """
    old = view(layer)
    weight = old.parameters[-1]
    out_features, in_features = old.shape
    bias, kind = old.bias is not None, weight.device.type
    with torch.random.fork_rng([] if kind == "cpu" else [weight.device], device_type=kind):
        x = torch.randn(tokens, in_features)
        made = PivotedLinear if pivoted else LowRankLinear
        new: nn.Module = made(in_features, out_features, rank, bias=bias)
        now: nn.Module = nn.Linear(in_features, out_features, bias=bias)
        if isinstance(layer, LowRankLinear | PivotedLinear):
            now = type(layer)(in_features, out_features, layer.rank, bias=bias)
        x = x.to(weight)
        new, now = (one.to(weight.device, weight.dtype) for one in (new, now))

    def call(layer: nn.Module) -> None:
        torch.clear_autocast_cache()
        layer(x)

    with context():
        work = {"now": partial(call, now), "new": partial(call, new)}
        taken = interleaved(work, rounds, 1 if kind == "cpu" else CALLS)
    return ratio(taken["new"], taken["now"])
