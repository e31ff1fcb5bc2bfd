"""DSEE: train small updates of a frozen model, prune it, and merge the updates."""

import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.progress import Track, untracked
from lrcompress.errors import (
    LayerError,
    NoMatchError,
    SettingError,
    ShapeError,
    naming_layer,
    nearest,
)
from lrcompress.nn import LowRankUpdateLinear, Replacement
from lrcompress.pruning.magnitude import Computed, largest
from lrcompress.solvers.godec import godec
from lrcompress.statistics.views import is_linear, view
from lrcompress.structure.selection import select
from lrcompress.structure.surgery import replace_

# What the query and value projections of attention are called, alone or with others in one.
_QUERY_VALUE = frozenset(
    {"query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v", "query_proj", "value_proj"}
    | {"c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv"}
)


def check_update(rank: int, entries: int) -> None:
    """Check that an update has something to train.

    Raises:
        SettingError: unless both are whole numbers from 0, and one of them above.
    """
    for name, value in (("rank", rank), ("entries", entries)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SettingError(f"{name} must be a whole number from 0, got {value!r}")
    if not rank + entries:
        raise SettingError("rank and entries are both 0: an update needs one of them")


def updated_names(model: nn.Module, patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the layers that get an update.

    Args:
        model: to search.
        patterns: of layer names; None is the query and value projections of numbered blocks.

    Raises:
        NoMatchError: if a pattern matches nothing, or no layer is called like one of them.
    """
    names = select(model, patterns, argument="updates").names
    if patterns is not None:
        return names
    found = tuple(name for name in names if name.rpartition(".")[2] in _QUERY_VALUE)
    if not found:
        raise NoMatchError(
            "updates: no linear layer is called query or value, q_proj or v_proj, or alike; say "
            f"which get an update with updates=, for example: {nearest('query', names)}"
        )
    return found


def trained_names(
    model: nn.Module, patterns: Sequence[str] | None, layers: Collection[str]
) -> tuple[str, ...]:
    """Return the names of the parameters to train besides the updates, of those trained now.

    Args:
        model: to search.
        patterns: of parameter names; None is those of linear layers outside of numbered blocks,
            poolers and heads, but for tied weights.
        layers: names of those that are frozen in any case.

    Raises:
        NoMatchError: if a pattern matches no parameter.
        SettingError: if one is the weight of such a layer.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if patterns is None:
        return tuple(name for name in names if name in set(_outside(model)))
    chosen: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise NoMatchError(
                f"trained: pattern {pattern!r} matches none of the {len(names)} parameters that "
                f"are trained now; nearest names: {nearest(pattern, names)}"
            )
        chosen.update(hits)
    for name in chosen:
        layer, _, last = name.rpartition(".")
        if layer in layers and last != "bias":
            raise SettingError(
                f"trained: {name!r} is the weight of a layer that is pruned or gets an update, "
                "which stays frozen; leave it out, or choose other updates= and pruned="
            )
    return tuple(name for name in names if name in chosen)


def _outside(model: nn.Module) -> list[str]:
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return [
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if is_linear(module) and not any(part.isdigit() for part in name.split("."))
        for kind, parameter in module.named_parameters(recurse=False)
        if holders[id(parameter)] == 1
    ]


@torch.no_grad()
def attach_(
    model: nn.Module,
    updates: Collection[str],
    *,
    rank: int,
    entries: int,
    heads: Mapping[str, int] | None = None,
    seed: int = 0,
    processes: Processes = ONE_PROCESS,
    track: Track = untracked,
) -> None:
    """Attach an update to layers: low rank plus ``entries`` single ones at places GoDec chooses.

    The outputs of the model do not change. ``right`` starts uniform within ``±1/√in``, ``left`` and
    the values of entries at zero.

    Args:
        model: changed in place.
        updates: names of the layers.
        rank: of each; at most the rank that the layer can have.
        entries: of each.
        heads: number of heads of the output projections of attention that get coefficients.
        seed: of GoDec and of ``right``; no other random numbers are drawn.
        processes: the processes that do the same.
        track: yields layers while they are solved, as a progress bar does.

    Raises:
        NotFiniteError: if a weight is not finite.
    """
    heads = heads or {}
    names = [name for name in dict(model.named_modules()) if name in {*updates, *heads}]
    built: dict[str, LowRankUpdateLinear] = {}
    for number, name in enumerate(track(names, "solving")):
        layer = model.get_submodule(name)
        sizes = (rank, entries) if name in updates else (0, 0)
        with naming_layer(name):
            found = godec(view(layer).weight, *sizes, seed=seed)
        new = LowRankUpdateLinear.in_place_of(layer, *sizes, heads.get(name, 0))
        new.support.copy_(found.support)
        generator = torch.Generator().manual_seed(seed + number)
        start = torch.rand(new.right.shape, generator=generator) * 2 - 1
        new.right.copy_(start / new.in_features**0.5)
        built[name] = new
    processes.broadcast_([x for new in built.values() for x in (new.right, new.support)], 0)
    for name, new in built.items():
        replace_(model, name, new)


def check_updatable(
    model: nn.Module, pruned: Collection[str], updates: Collection[str], rank: int, entries: int
) -> None:
    """Check that layers are dense, and large enough for their updates.

    Raises:
        LayerError: if one is replaced already.
        ShapeError: if one has no such rank, or not so many entries.
    """
    for name in (*pruned, *updates):
        layer = model.get_submodule(name)
        if isinstance(layer, Replacement):
            raise LayerError(
                f"layer {name!r} is a {type(layer).__name__}; DSEE starts from plain layers: leave "
                "it out with updates=, pruned= or exclude=, or merge it first with merge_dense()"
            )
    for name in updates:
        shape = view(model.get_submodule(name)).shape
        if rank > min(shape) or entries > math.prod(shape):
            raise ShapeError(
                f"layer {name!r} of shape {shape} cannot have an update of rank {rank} and "
                f"{entries} entries; at most {min(shape)} and {math.prod(shape)}, or leave it out "
                "with updates="
            )


def freeze_(model: nn.Module, trained: Collection[str]) -> None:
    """Freeze all parameters but the named ones, and drop the gradients of the frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if name not in trained:
            parameter.grad = None


def update_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the trained parameters of all updates."""
    return tuple(
        f"{name}.{kind}"
        for name, layer in model.named_modules()
        if isinstance(layer, LowRankUpdateLinear)
        for kind in ("right", "left", "entries", "coefficients")
        if getattr(layer, kind).requires_grad
    )


@torch.no_grad()
def prune_(model: nn.Module, names: Sequence[str], keep: float, scope: str) -> None:
    """Set the smallest entries of ``W + left right + S`` to zero, where they stay.

    Plain layers are frozen, so that zeros in their weight remain; layers with an update get a
    mask.

    Args:
        model: changed in place.
        names: of the layers.
        keep: share of their entries that stay, met exactly.
        scope: over what magnitudes are compared; see :func:`largest`.
    """
    layers = {name: model.get_submodule(name) for name in names}
    sizes = Computed(names, lambda name: _magnitudes(layers[name]))
    for name, kept in largest(sizes, keep, scope):
        layer = layers[name]
        if isinstance(layer, LowRankUpdateLinear):
            layer.prune_(kept)
        else:
            view(layer).weight.masked_fill_(~kept, 0)


def _magnitudes(layer: nn.Module) -> Tensor:
    found = view(layer).weight.abs()
    if isinstance(layer, LowRankUpdateLinear) and layer.masked:
        found.masked_fill_(~layer.mask, -1)  # what is out must not come back before what is small
    return found


def merge_updates_(model: nn.Module) -> None:
    """Merge every update into its layer: a dense one of the same weight, with true zeros."""
    updated = [n for n, layer in model.named_modules() if isinstance(layer, LowRankUpdateLinear)]
    for name in updated:
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankUpdateLinear)
        replace_(model, name, layer.to_dense())
