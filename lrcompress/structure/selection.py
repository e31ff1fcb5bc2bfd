"""Select the layers to factor by name pattern, with a reason for each that is left alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lrcompress.errors import LayerError, NoMatchError, nearest
from lrcompress.statistics.views import is_linear, stacked_matrices, view
from lrcompress.structure.wrapped import MERGE, adapted_names, is_adapted, quantised, unread_layers


@dataclass(frozen=True)
class Selection:
    """The layers that patterns selected.

    Attributes:
        names: of the layers to factor, in module order.
        left_alone: name to the reason, for layers that a pattern reached but that stay; experts
            among them, whose matrices are no layers.
    """

    names: tuple[str, ...]
    left_alone: dict[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """Which layers stay and why, each reason once; or "".

        Example:
            >>> reasons = {"0.a": "it is tied", "1.a": "it is tied", "2.a": "it is tied"}
            >>> Selection((), reasons).note
            '3 layers stay as they are, 0.a, 1.a, …: it is tied'
        """
        named: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            named.setdefault(reason, []).append(name)
        told = []
        for reason, names in named.items():
            many = (
                f"{len(names)} layers stay as they are" if names[1:] else "1 layer stays as it is"
            )
            told.append(f"{many}, {', '.join(names[:2])}{', …' * (len(names) > 2)}: {reason}")
        return "; ".join(told)


def select(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    shared: bool = False,
    argument: str = "targets",
) -> Selection:
    """Return the linear layers to factor, selected by name patterns.

    Args:
        model: the module to search.
        targets: shell patterns over layer names (``*.attention.*``). None chooses the linear
            layers of repeated blocks, those with a number in their path: attention and
            feed-forward layers, not poolers and heads.
        exclude: patterns of layers to leave out.
        shared: also take layers that are used in several places, and weights that another
            module holds too; the latter are untied by factoring.
        argument: what the user calls ``targets``, for the message.

    Raises:
        NoMatchError: if a pattern matches no linear layer, or nothing is left to factor.
        LayerError: if a layer named in full cannot be factored, or one that was chosen has
            adapters.
    """
    targets = [targets] if isinstance(targets, str) else targets
    everything = dict(model.named_modules(remove_duplicate=True))
    linear = {
        name: module
        for name, module in everything.items()
        # the factors of a factored layer are linear layers too, but not for themselves
        if name and is_linear(module) and not is_linear(everything[name.rpartition(".")[0]])
    }
    stacks = stacked_matrices(model) | unread_layers(model)
    every = ["*.[0-9]*.*"] if targets is None else targets
    beside = {n: why for n, why in stacks.items() if any(fnmatchcase(n, one) for one in every)}
    if targets is None:
        wanted = [name for name in linear if any(part.isdigit() for part in name.split("."))]
        if not wanted and beside:
            raise LayerError(
                "layer {!r} cannot be factored: {}".format(*next(iter(beside.items())))
            )
        if not wanted:
            raise NoMatchError(
                f"none of the {len(linear)} linear layers stands in a numbered block; choose some "
                f"with targets=, for example: {nearest('', linear) or 'none there'}"
            )
    else:
        _check_named(targets, everything, linear, stacks)
        wanted = _matching(argument, targets, linear)
    excluded = set(_matching("exclude", exclude, linear))
    wrapped = adapted_names(model)
    adapted = [name for name in wanted if name not in excluded and is_adapted(name, wrapped)]
    if adapted:
        raise LayerError(
            f"layer {adapted[0]!r} is wrapped by an adapter; {MERGE}, or leave it out with exclude="
        )
    reasons = _obstacles(model, linear, shared)
    blocked = {n: reasons[n] for n in wanted if n in reasons and n not in excluded}
    named = [name for name in targets or () if name in blocked]
    if named:
        raise LayerError(f"layer {named[0]!r} cannot be factored: {blocked[named[0]]}")
    names = tuple(name for name in wanted if name not in blocked and name not in excluded)
    if not names:
        some = next(iter(blocked.items()), None)
        why = f"; {some[0]!r} was left alone: {some[1]}" if some else ""
        raise NoMatchError(f"no layer is left to factor of {len(wanted)} that were chosen{why}")
    once = {n: why for n, why in beside.items() if n.rpartition(".")[0] not in beside}
    return Selection(names, blocked | once)


def _check_named(
    targets: Sequence[str],
    everything: dict[str, nn.Module],
    linear: dict[str, nn.Module],
    stacks: Mapping[str, str],
) -> None:
    for pattern in targets:
        stays = [name for name in stacks if fnmatchcase(name, pattern)]
        if stays and not any(fnmatchcase(name, pattern) for name in linear):
            raise LayerError(f"layer {stays[0]!r} cannot be factored: {stacks[stays[0]]}")
        if pattern in everything:
            view(everything[pattern], f"layer {pattern!r}")


def _matching(argument: str, patterns: Sequence[str], linear: dict[str, nn.Module]) -> list[str]:
    if isinstance(patterns, str):
        patterns = [patterns]
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in linear if fnmatchcase(name, pattern)]
        if not hits:
            wider = f"*{pattern}*"
            within = sum(fnmatchcase(name, wider) for name in linear)
            hint = f"; patterns match whole names: {wider!r} matches {within}" if within else ""
            raise NoMatchError(
                f"{argument}: pattern {pattern!r} matches none of the {len(linear)} linear layers; "
                f"nearest names: {nearest(pattern, linear)}{hint}"
            )
        found.update(hits)
    return [name for name in linear if name in found]


def _obstacles(model: nn.Module, linear: dict[str, nn.Module], shared: bool) -> dict[str, str]:
    places: dict[int, list[str]] = {}
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    reasons = {}
    for name, module in linear.items():
        others = [place for place in places[id(module)] if place != name]
        weights = view(module).parameters
        own = tuple(f"{place}." for place in places[id(module)])
        tied = [
            other for other in holders.get(id(weights[0]), []) if not f"{other}.".startswith(own)
        ]
        reason = _unsuited(model, name, weights)
        if reason is None and others and not shared:
            reason = f"it is also used as {others[0]!r}; pass shared=True to factor both"
        if reason is None and tied and not shared:
            reason = f"its weight is tied to {tied[0]!r}; pass shared=True to untie it"
        if reason is not None:
            reasons[name] = reason
    return reasons


def _unsuited(model: nn.Module, name: str, weights: Sequence[Tensor]) -> str | None:
    bits = quantised(weights)
    if bits is not None:
        return f"its weight is {bits}"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it, as its in_proj_weight"
    return None
