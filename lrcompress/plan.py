"""The structure of a compressed model as data: the one way to give a model its structure."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import CheckpointError, NoMatchError, ShapeError, nearest
from lrcompress.nn import LowRankLinear
from lrcompress.statistics.views import is_linear, view
from lrcompress.surgery import replace_

VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """One layer that is not as the architecture made it.

    Attributes:
        name: its path in the model.
        kind: ``"low_rank"``, or ``"dense"`` for one that goes back to a plain layer.
        sizes: ``in``, ``out`` and, for ``low_rank``, ``rank``.
    """

    name: str
    kind: str
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """An ordered list of layers and what stands in their place.

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
        """Return the structure that ``model`` has now."""
        return cls(
            tuple(
                LayerPlan(name, "low_rank", _sizes(module) | {"rank": module.rank})
                for name, module in model.named_modules()
                if isinstance(module, LowRankLinear)
            )
        )

    @classmethod
    def matching(cls, model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> "Plan":
        """Return what has to change in ``model`` before it can hold the tensors of ``state``.

        The keys and shapes say it all: ``name.left.weight`` and ``name.right.weight`` stand
        for factors, ``name.weight`` for a plain layer.
        """
        layers = []
        for name, module in model.named_modules():
            if not is_linear(module):
                continue
            left, right = (state.get(f"{prefix}{name}.{side}.weight") for side in ("left", "right"))
            factored = isinstance(module, LowRankLinear)
            if left is not None and right is not None:
                sizes = {"in": right.shape[1], "out": left.shape[0], "rank": right.shape[0]}
                if not factored or module.rank != sizes["rank"]:
                    layers.append(LayerPlan(name, "low_rank", sizes))
            elif factored and f"{prefix}{name}.weight" in state:
                layers.append(LayerPlan(name, "dense", _sizes(module)))
        return cls(tuple(layers))

    def apply_(self, model: nn.Module) -> nn.Module:
        """Give ``model`` this structure, on any device, ``meta`` included; values are not set.

        Layers that have it already are left alone. Nothing is changed if anything is wrong.

        Raises:
            NoMatchError: if a named layer is not in the model.
            ShapeError: if its sizes are not the plan's.
            LayerError: if it is of a type that cannot be factored.
            CheckpointError: if the plan gives it a kind that is not known.
        """
        modules = dict(model.named_modules())
        built = {layer.name: _build(layer, modules) for layer in self.layers}
        for name, new in built.items():
            if new is not modules[name]:
                replace_(model, name, new)
        return model

    def to_dict(self) -> dict[str, object]:
        """Return the plan in plain types."""
        layers = [asdict(layer) | {"sizes": dict(layer.sizes)} for layer in self.layers]
        return {"version": VERSION, "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "Plan":
        """Return the plan that :meth:`to_dict` described.

        Raises:
            CheckpointError: if ``data`` is no such description, or of a later version.
        """
        if data.get("version") != VERSION:
            raise CheckpointError(
                f"expected a plan of version {VERSION}, got version {data.get('version')!r}"
            )
        try:
            layers = tuple(
                LayerPlan(
                    str(layer["name"]),
                    str(layer["kind"]),
                    {str(key): int(value) for key, value in layer["sizes"].items()},
                )
                for layer in data["layers"]  # type: ignore[attr-defined]
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"this is no plan: {error!r}") from error
        return cls(layers)


def _sizes(module: nn.Module) -> dict[str, int]:
    out_features, in_features = view(module).shape
    return {"in": in_features, "out": out_features}


def _build(layer: LayerPlan, modules: Mapping[str, nn.Module]) -> nn.Module:
    if layer.name not in modules:
        raise NoMatchError(
            f"the plan names layer {layer.name!r}, which the model does not have; nearest: "
            f"{nearest(layer.name, modules)}"
        )
    old = modules[layer.name]
    sizes = _sizes(old) if is_linear(old) else {}
    view(old, layer.name)
    if any(sizes[side] != layer.sizes.get(side) for side in ("in", "out")):
        raise ShapeError(
            f"layer {layer.name!r} has sizes {sizes}, the plan gives it {dict(layer.sizes)}"
        )
    if layer.kind == "dense":
        return old.to_dense() if isinstance(old, LowRankLinear) else old
    if layer.kind != "low_rank":
        raise CheckpointError(
            f"layer {layer.name!r} is of kind {layer.kind!r}; known: low_rank, dense"
        )
    rank = layer.sizes.get("rank", 0)
    if not 1 <= rank <= min(sizes.values()):
        raise ShapeError(
            f"layer {layer.name!r} of sizes {sizes} cannot have rank {rank}; "
            f"from 1 to {min(sizes.values())} it could"
        )
    if isinstance(old, LowRankLinear) and old.rank == rank:
        return old
    return LowRankLinear.in_place_of(old, rank)


def restore_structure(model: nn.Module, checkpoint: Any) -> nn.Module:
    """Give ``model`` the structure it needs to load a checkpoint.

    Call it where Lightning cannot know: in a LightningModule's ``on_load_checkpoint``, for
    ``load_from_checkpoint``, or in ``configure_model`` under sharded strategies::

        def on_load_checkpoint(self, checkpoint):
            lrcompress.restore_structure(self, checkpoint)

    Args:
        model: changed in place; layers that fit already are left alone.
        checkpoint: a Lightning checkpoint or a state dict, as a path or as loaded.

    Returns:
        The same model.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = checkpoint.get("state_dict", checkpoint)
    return Plan.matching(model, state).apply_(model)
