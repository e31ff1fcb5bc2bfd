"""Plan: the structure of a compressed model as data, and how a model gets that structure."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrcompress.errors import CheckpointError, LayerError, NoMatchError, ShapeError, nearest
from lrcompress.nn import (
    KINDS,
    FactoredEmbedding,
    LowRankEmbedding,
    LowRankLinear,
    NarrowLowRank,
    PrunedLinear,
    Replacement,
)
from lrcompress.statistics.views import is_embedding, is_linear, view
from lrcompress.structure.checkpoint import consolidate_command, read_checkpoint
from lrcompress.structure.surgery import replace_
from lrcompress.structure.tied_weights import (
    plain_layers,
    same_storage,
    tie_factors_,
    tied_layers,
    update_tied_weights_keys_,
)

VERSION = 1
DENSE = "dense"  # the kind of a layer that is as in the architecture
_SIDES = ("in", "out")


@dataclass(frozen=True)
class LayerPlan:
    """One replaced layer: its name, kind and sizes.

    Attributes:
        name: its path in the model.
        kind: a key of :data:`lrcompress.nn.KINDS`, or ``"dense"`` for one that becomes a dense
            layer again.
        sizes: ``in`` and ``out`` of the dense weight, and the kind's own, such as ``rank``.
        tied: the layer whose factors it shares, as an output head those of an embedding; or "".
    """

    name: str
    kind: str
    sizes: Mapping[str, int]
    tied: str = ""


@dataclass(frozen=True)
class Plan:
    """The structure of a compressed model: an ordered list of layers, and what replaces them.

    It holds names, kinds and sizes, no values. ``len`` and iteration are over the layers.

    Attributes:
        layers: those that are not as in the architecture, in module order.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> plan = Plan((LayerPlan("0", "low_rank", {"in": 8, "out": 8, "rank": 2}),))
        >>> model[0].__class__.__name__, plan.apply_(model)[0].__class__.__name__
        ('Linear', 'LowRankLinear')
        >>> Plan.of(model) == Plan.from_dict(plan.to_dict()) == plan
        True
    """

    layers: tuple[LayerPlan, ...] = ()

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    @classmethod
    def of(cls, model: nn.Module) -> "Plan":
        """Return the plan of the layers that are replaced in ``model`` now, in module order."""
        return cls(tuple(_current_layers(model, lambda module: isinstance(module, Replacement))))

    @classmethod
    def matching(cls, model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> "Plan":
        """Return the layers of ``model`` to change before it can load the tensors of ``state``.

        Keys and shapes are all that is read: ``name.left.weight`` beside ``name.right.weight``
        are low-rank factors, other kinds have other keys, and ``name.weight`` is a dense layer.
        Layers are tied if their factors lie in the same memory.

        Args:
            model: not changed.
            state: a state dict.
            prefix: of the keys of ``model`` in ``state``, such as ``"student."``.

        Raises:
            CheckpointError: if a factor is no tensor, or has not the axes of its kind.
        """
        every = _current_layers(model, lambda module: is_linear(module) or is_embedding(module))
        modules = dict(model.named_modules())
        stored = [_stored_layer(modules[x.name], x, state, f"{prefix}{x.name}.") for x in every]
        factors = {x.name: KINDS[x.kind].sizing_tensors for x in stored if x.kind != DENSE}
        tied = same_storage(state, factors, prefix)
        wanted = [replace(x, tied=tied.get(x.name, "")) for x in stored]
        return cls(tuple(x for x, now in zip(wanted, every, strict=True) if x != now))

    def apply_(self, model: nn.Module) -> nn.Module:
        """Give ``model`` this structure in place, on any device, ``meta`` included.

        The values of new layers are not set: load a state dict after it. Layers that fit already
        are left alone. Nothing is changed if anything is wrong.

        Args:
            model: changed in place.

        Returns:
            The same model.

        Raises:
            NoMatchError: if a named layer is not in the model.
            ShapeError: if its sizes are not the plan's, or not possible for the kind.
            LayerError: if it is of a type that the kind cannot replace, or has no dense form and
                should become dense.
            CheckpointError: if the plan gives it a kind that is not known, or ties it to a layer
                that it cannot share factors with.
        """
        modules = dict(model.named_modules())
        built = {layer.name: _build(layer, modules) for layer in self.layers}
        _check_ties(self.layers, modules | built)
        old = [modules[layer.name] for layer in self.layers if layer.kind == DENSE]
        plain = plain_layers(module for module in old if isinstance(module, Replacement))
        for name, new in built.items():
            new = plain.get(new, new)  # type: ignore[call-overload]
            if new is not modules[name]:
                replace_(model, name, new)
        for layer in self.layers:
            if layer.tied:
                tie_factors_(model.get_submodule(layer.name), model.get_submodule(layer.tied))
        update_tied_weights_keys_(model)
        return model

    def to_dict(self) -> dict[str, object]:
        """Return the plan in plain types, as JSON takes them.

        Returns:
            ``version``, and ``layers`` with ``name``, ``kind``, ``sizes`` and, if tied, ``tied``.
        """
        layers = [asdict(layer) | {"sizes": dict(layer.sizes)} for layer in self.layers]
        listed = [{k: v for k, v in layer.items() if k != "tied" or v} for layer in layers]
        return {"version": VERSION, "layers": listed}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "Plan":
        """Return the plan that :meth:`to_dict` described.

        Raises:
            CheckpointError: if ``data`` is no such description, or of another version.
        """
        if data.get("version") != VERSION:
            raise CheckpointError(
                f"expected a plan of version {VERSION}, got version {data.get('version')!r}"
            )
        listed = data.get("layers")
        if not isinstance(listed, list | tuple):
            raise CheckpointError(f"this is no plan: expected a list of layers, got {listed!r}")
        layers = tuple(_read_layer(entry, i) for i, entry in enumerate(listed))
        counts = Counter(layer.name for layer in layers)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise CheckpointError(f"this is no plan: it names layer {twice[0]!r} more than once")
        return cls(layers)


def _read_layer(entry: object, place: int) -> LayerPlan:
    """Return the layer that an entry of a plan describes.

    Raises:
        CheckpointError: if it describes none.
    """
    found = entry if isinstance(entry, Mapping) else {}
    name, kind, sizes, tied = (found.get(key) for key in ("name", "kind", "sizes", "tied"))
    whole = isinstance(sizes, Mapping) and all(
        isinstance(size, str) and type(number) is int for size, number in sizes.items()
    )
    if not (whole and all(isinstance(text, str) for text in (name, kind, tied or ""))):
        raise CheckpointError(
            f"this is no plan: expected name, kind and sizes of layer {place}, such as "
            f"{{'name': 'a.b', 'kind': 'low_rank', 'sizes': {{'in': 8, 'out': 6, 'rank': 2}}}}, "
            f"got {entry!r}"
        )
    return LayerPlan(name, kind, dict(sizes), tied or "")  # type: ignore[arg-type]


def _layer_plan(name: str, module: nn.Module) -> LayerPlan:
    if isinstance(module, Replacement):
        return LayerPlan(name, module.kind, module.sizes)
    out_features, in_features = view(module, f"layer {name!r}", table=True).shape
    return LayerPlan(name, DENSE, {"in": in_features, "out": out_features})


def _current_layers(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[LayerPlan]:
    found = {name: module for name, module in model.named_modules() if wanted(module)}
    tied = tied_layers(found)
    return [replace(_layer_plan(n, m), tied=tied.get(n, "")) for n, m in found.items()]


def _check_ties(layers: Iterable[LayerPlan], modules: Mapping[str, nn.Module]) -> None:
    """Check that layers which the plan ties can share factors.

    Raises:
        CheckpointError: if they cannot.
    """
    for layer in layers:
        if not layer.tied:
            continue
        sides = [modules.get(name) for name in (layer.name, layer.tied)]
        kinds = {type(side) for side in sides}
        alike = len(kinds) == 1 and isinstance(sides[0], FactoredEmbedding)
        if not (alike or kinds <= {LowRankLinear, LowRankEmbedding}):
            raise CheckpointError(
                f"layer {layer.name!r} of kind {layer.kind!r} cannot share the factors of "
                f"{layer.tied!r}: embeddings of one kind can, and low-rank output heads"
            )
        sizes = [dict(side.sizes) for side in sides if isinstance(side, Replacement)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"layer {layer.name!r} of sizes {sizes[0]} cannot share the factors of "
                f"{layer.tied!r}, which has {sizes[1]}"
            )


def _stored_layer(
    module: nn.Module, now: LayerPlan, state: Mapping[str, Tensor], prefix: str
) -> LayerPlan:
    """Return the layer as ``state`` holds it, or as it is where ``state`` does not.

    Raises:
        CheckpointError: if its factors are not of their form.
    """
    # one that has all the tensors of another kind, and more, is none of that kind
    for kind in sorted(KINDS.values(), key=lambda kind: -len(kind.sizing_tensors)):
        found = {
            part: state[prefix + part] for part in kind.sizing_tensors if prefix + part in state
        }
        if len(found) < len(kind.sizing_tensors) or not kind.can_replace(module):
            continue
        for part, axes in kind.sizing_tensors.items():
            if not isinstance(found[part], Tensor) or found[part].ndim != axes:
                got = tuple(getattr(found[part], "shape", ()))
                raise CheckpointError(
                    f"{prefix}{part} must be a tensor with {axes} axes, got shape {got}"
                )
        shapes = {part: tuple(value.shape) for part, value in found.items()}
        return LayerPlan(now.name, kind.kind, kind.sizes_from_shapes(shapes))
    if f"{prefix}weight" in state:
        return LayerPlan(now.name, DENSE, {side: now.sizes[side] for side in _SIDES})
    return now


def _build(layer: LayerPlan, modules: Mapping[str, nn.Module]) -> nn.Module:
    if layer.name not in modules:
        raise NoMatchError(
            f"the plan names layer {layer.name!r}, which the model does not have; nearest: "
            f"{nearest(layer.name, modules)}"
        )
    old = modules[layer.name]
    now = _layer_plan(layer.name, old)
    sides = {side: now.sizes[side] for side in _SIDES}
    if any(sides[side] != layer.sizes.get(side) for side in _SIDES):
        raise ShapeError(
            f"layer {layer.name!r} has sizes {sides}, the plan gives it {dict(layer.sizes)}"
        )
    if now == replace(layer, tied="") or layer.kind == DENSE:
        return old
    return _built(layer, old, sides)


def _built(layer: LayerPlan, old: nn.Module, sides: Mapping[str, int]) -> nn.Module:
    if layer.kind not in KINDS:
        raise CheckpointError(
            f"layer {layer.name!r} is of kind {layer.kind!r}; known: {', '.join((*KINDS, DENSE))}"
        )
    kind = KINDS[layer.kind]
    if not kind.can_replace(old):
        raise LayerError(
            f"layer {layer.name!r} is a {type(old).__name__}, which cannot become {layer.kind!r}"
        )
    limits = kind.size_limits(sides)
    for size, (least, most) in limits.items():
        if not least <= layer.sizes.get(size, -1) <= most:
            raise ShapeError(
                f"layer {layer.name!r} of sizes {dict(sides)} cannot have {size} "
                f"{layer.sizes.get(size)}; from {least} to {most} it could"
            )
    if isinstance(old, PrunedLinear | NarrowLowRank):  # other kinds would become as narrow
        old = old.to_dense()
    return kind.in_place_of(old, **{size: layer.sizes[size] for size in limits})


def restore_structure(model: nn.Module, checkpoint: Any) -> nn.Module:
    """Give ``model`` the structure that it needs to load a checkpoint; values are not loaded.

    Call it where no callback does: in a LightningModule's ``on_load_checkpoint``, for
    ``load_from_checkpoint``, or in ``configure_model`` under sharded strategies, before anything
    is sharded::

        def on_load_checkpoint(self, checkpoint):
            lrcompress.restore_structure(self, checkpoint)

    Args:
        model: changed in place; layers that fit already are left alone.
        checkpoint: a Lightning checkpoint or a state dict, as a path or as loaded; or the folder
            of a distributed checkpoint. A file is checked before it is read, and no code in it
            runs.

    Returns:
        The same model.

    Raises:
        CheckpointError: if the file or its ``state_dict`` is none, a folder holds no plan, or
            stored factors are not of their form.
        ShapeError: if a stored layer has other sizes than the one in ``model``.
        LayerError: if a layer is of a type that cannot be replaced.
        NoMatchError: if the plan in a folder names a layer that is not in ``model``.

    Example:
        >>> trained = nn.Sequential(LowRankLinear(6, 4, rank=2))
        >>> model = restore_structure(nn.Sequential(nn.Linear(6, 4)), trained.state_dict())
        >>> model.load_state_dict(trained.state_dict())
        <All keys matched successfully>
    """
    if not isinstance(checkpoint, Mapping):
        if Path(checkpoint).is_dir():
            return _plan_in(Path(checkpoint)).apply_(model)
        checkpoint = read_checkpoint(checkpoint, mapped=True)
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"state_dict must be a mapping, got {type(state).__name__}")
    return Plan.matching(model, state).apply_(model)


def _plan_in(folder: Path) -> Plan:
    """Return the plan that a callback saved with a distributed checkpoint.

    Raises:
        CheckpointError: if there is none.
    """
    path = folder / "meta.pt"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no distributed checkpoint: it has no {path.name}")
    states = read_checkpoint(path).get("callbacks", {})
    for state in states.values():
        if isinstance(state, Mapping) and "param_names" in state and "plan" in state:
            return Plan.from_dict(state["plan"])
    raise CheckpointError(
        f"{path} holds no plan, since no callback of lrcompress was saved with it; make one file "
        f"of the folder: {consolidate_command(folder)}"
    )
