"""Tied weights: layers that share their factors, as an embedding and an output head do."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lrcompress.nn import Replacement

_TIED, _OWN = "all_tied_weights_keys", "_tied_weights_keys"  # of a model of transformers


def tied_layers(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the layers that share their factors with an earlier one: name to its name."""
    holders: dict[tuple[int, ...], str] = {}
    found = {}
    for name, layer in layers.items():
        if isinstance(layer, Replacement):
            first = holders.setdefault(tuple(map(id, layer.factors)), name)
            if first != name:
                found[name] = first
    return found


def same_storage(
    state: Mapping[str, Any], factors: Mapping[str, Iterable[str]], prefix: str
) -> dict[str, str]:
    """Return the stored layers whose factors share memory with an earlier one: name to its name.

    Equal values are no tie: what was saved untied stays so.
    """
    holders: dict[tuple[object, ...], str] = {}
    found = {}
    for name, parts in factors.items():
        stored: list[Any] = [state.get(f"{prefix}{name}.{part}") for part in sorted(parts)]
        plain = [x for x in stored if type(x) in (Tensor, nn.Parameter) and x.data_ptr()]
        if len(plain) < len(stored):
            continue
        key = tuple((x.data_ptr(), x.shape) for x in plain)
        first = holders.setdefault(key, name)
        if first != name:
            found[name] = first
    return found


def tie_factors_(layer: nn.Module, source: nn.Module) -> None:
    """Make a layer share the factors of another one of the same sizes."""
    for part in _factors(source):
        holder, _, key = part.rpartition(".")
        setattr(layer.get_submodule(holder), key, source.get_parameter(part))


def plain_layers(layers: Iterable[Replacement]) -> dict[Replacement, nn.Module]:
    """Return a dense layer for each; those that shared their factors share a weight."""
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    made = {}
    for layer in layers:
        plain = layer.to_dense()
        own: Any = plain.weight
        shared = weights.setdefault(tuple(map(id, layer.factors)), own)
        if shared is not own:
            plain.weight = shared
        made[layer] = plain
    return made


def update_tied_weights_keys_(model: nn.Module) -> None:
    """Update the lists of tied weights of the ``transformers`` models in ``model``.

    They hold a mapping of names, by which weights are tied again and left out of files. The names
    of a table that was factored become those of its factors if these are shared; else they are
    removed.
    """
    every = [x for x in model.modules() if isinstance(getattr(x, _TIED, None), dict)]
    again = [vars(part).pop(_OWN, None) is not None for part in every]
    for part, restated in zip(every, again, strict=True):
        held: Any = part
        if restated:  # begin from the class's own
            held.all_tied_weights_keys = held.get_expanded_tied_weights_keys(all_submodels=True)
        tied = held.all_tied_weights_keys
        now = {t: s for pair in tied.items() for t, s in _still_tied(part, *pair)}
        if now != tied:
            held.all_tied_weights_keys = held._tied_weights_keys = now


def _still_tied(model: nn.Module, target: str, source: str) -> list[tuple[str, str]]:
    ours = [_current_names(model, key) for key in (target, source)]
    if ours == [[target], [source]]:
        return [(target, source)]
    pairs = zip(*ours, strict=True) if len(ours[0]) == len(ours[1]) else ()
    found = [(t, s, model.get_parameter(t), model.get_parameter(s)) for t, s in pairs]
    # a model without memory has not been tied yet, but for factors
    unset = [t for t, _, one, _ in found if one.is_meta and t.endswith("bias")]
    return [(t, s) for t, s, one, other in found if one is other or t in unset]


def _current_names(model: nn.Module, key: str) -> list[str]:
    path, _, last = key.rpartition(".")
    layer = model.get_submodule(path)
    if not isinstance(layer, Replacement):
        return [key]
    if last == "weight":
        return [f"{path}.{part}" for part in _factors(layer)]
    return [f"{path}.left.bias"] if "left.bias" in dict(layer.named_parameters()) else []


def _factors(layer: nn.Module) -> list[str]:
    """Return the names of a layer's factors, the same for all that may share them."""
    return sorted(name for name, _ in layer.named_parameters() if name != "left.bias")
