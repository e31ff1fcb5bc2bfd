"""Rank allocation by measured latency: layers that factors do not make faster stay."""

import math
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
Make = Callable[..., nn.Module]
# Calls between two waits for an accelerator.
_CALLS = 20


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
    out_features, in_features = old.shape
    sizes = in_features, out_features
    kind = PivotedLinear if pivoted else LowRankLinear
    made: dict[str, Make] = {"new": partial(kind, *sizes, rank), "now": partial(nn.Linear, *sizes)}
    if isinstance(layer, LowRankLinear | PivotedLinear):
        made["now"] = partial(type(layer), *sizes, layer.rank)
    taken = seconds_of(made, layer, (tokens, in_features), context, rounds)
    return ratio(taken["new"], taken["now"])


@torch.no_grad()
def seconds_of(
    made: Mapping[str, Make],
    like: nn.Module,
    shape: tuple[int, int],
    context: Context,
    rounds: int,
    turn: float = 0.0,
) -> dict[str, list[float]]:
    """Return the seconds of new layers in every round, in which all take turns.

    They have the dtype, the device and a bias as a layer like ``like``, and are applied within
    ``context``, without gradients. Random numbers that others draw are the same with it and
    without.

    Args:
        made: makes each of them, given ``bias``.
        like: a linear layer.
        shape: of what they read: tokens and features.
        context: that the model runs in, such as autocast.
        rounds: in each of which all take a turn.
        turn: seconds that a turn takes at least, on a CPU; 0 is one call.
    """
    old = view(like)
    weight, bias = old.parameters[-1], old.bias is not None
    kind = weight.device.type
    with torch.random.fork_rng([] if kind == "cpu" else [weight.device], device_type=kind):
        x = torch.randn(shape).to(weight)
        layers = {
            name: make(bias=bias).to(weight.device, weight.dtype) for name, make in made.items()
        }

    def call(layer: nn.Module) -> None:
        torch.clear_autocast_cache()
        layer(x)

    with context():
        work = {name: partial(call, layer) for name, layer in layers.items()}
        calls = 1 if kind == "cpu" else _CALLS
        if turn and kind == "cpu":
            once = min(first for (first,) in interleaved(work, 1).values())
            calls = math.ceil(turn / max(1e-6, once))
        return interleaved(work, rounds, calls)
