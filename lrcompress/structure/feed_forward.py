"""Feed-forward blocks of a model, found in the graph of one forward pass."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from lrcompress.errors import CheckpointError
from lrcompress.nn import PrunedLinear, Replacement
from lrcompress.statistics.views import is_linear, view

# What autograd calls operations that act on every entry alone, in the same way for all.
_NONLINEAR = frozenset(
    (
        *("Celu", "Elu", "Erf", "Exp", "GeLUFunction", "Gelu", "Hardsigmoid", "Hardswish"),
        *("Hardtanh", "LeakyRelu", "LogSigmoid", "Mish", "Relu", "Sigmoid", "Silu", "Softplus"),
        *("Tanh", "Threshold"),
    )
)
_ACTIVATIONS = _NONLINEAR | {
    *("Abs", "Add", "Clamp", "ClampMax", "ClampMin", "Div", "Mul", "Neg", "Pow", "Sub"),
}
# And those that change nothing but how entries lie, their precision, or which are dropped.
_PLUMBING = frozenset(
    (
        *("Alias", "Clone", "NativeDropout", "ReshapeAlias", "ToCopy", "UnsafeView", "View"),
        *("FusedDropout", "Squeeze", "Unsqueeze"),
    )
)
_PARAMETER, _IN_PLACE = "AccumulateGrad", "CopySlices"


@dataclass(frozen=True)
class Block:
    """A feed-forward block: ``down(act(up x))``, or ``down(act(gate x) · up x)``.

    Attributes:
        ups: the layers whose outputs are the inner features, one or two.
        down: the layer that reads them.
    """

    ups: tuple[str, ...]
    down: str

    @property
    def names(self) -> tuple[str, ...]:
        """All its layers."""
        return (*self.ups, self.down)


@dataclass(frozen=True)
class Blocks:
    """The feed-forward blocks of a model.

    Attributes:
        found: in module order of what reads the inner features.
        left_alone: name of such a layer to the reason why its block cannot be narrowed.
    """

    found: tuple[Block, ...] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the blocks in plain types."""
        found = {block.down: list(block.ups) for block in self.found}
        return {"found": found, "left_alone": dict(self.left_alone)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Blocks":
        """Return what :meth:`to_dict` returned.

        Raises:
            CheckpointError: if it did not.
        """
        try:
            found = tuple(Block(tuple(ups), down) for down, ups in data["found"].items())
            return cls(found, dict(data["left_alone"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"these are no blocks: {error!r}") from error


class BlockTrace:
    """Watches one forward pass, and finds the feed-forward blocks in its graph.

    A block is found by what is computed, not by names: what one linear layer reads is, by
    operations on every entry alone, what one other has put out or two others have, and nothing
    else in the graph of the loss reads any of it::

        trace = BlockTrace(model, names)
        with trace.forward():
            loss = ...
        blocks = trace.blocks(loss)

    Args:
        model: the module.
        names: of the layers that may be changed; blocks with others are left alone.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._model, self._names = model, frozenset(names)
        self._reads: dict[str, Node] = {}
        self._gives: dict[Node, str] = {}
        self._calls: dict[str, int] = {}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Watch the forward pass that runs inside the block."""
        self.forget()
        modules = dict(self._model.named_modules())
        with ExitStack() as stack:
            for name, layer in modules.items():
                inner = is_linear(modules[name.rpartition(".")[0]]) if name else True
                if is_linear(layer) and not inner:  # factors are layers too, but not on their own
                    hook = partial(self._saw, name)
                    stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _saw(
        self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor
    ) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self._calls[name] = self._calls.get(name, 0) + 1
        if x.grad_fn is not None:
            self._reads[name] = x.grad_fn
        node = out.grad_fn
        while node is not None:  # of a view also what it is one of: operations in place read that
            self._gives[node] = name
            node = node.next_functions[0][0] if _kind(node) in _PLUMBING else None

    def blocks(self, loss: Tensor) -> Blocks:
        """Return the blocks, once their part in the loss is known; the graph is let go.

        Args:
            loss: what the pass came to; its graph must still be there.
        """
        readers = _readers(loss)
        found, left_alone = [], {}
        for name in (name for name in self._reads if name in self._names):
            path, ups, strange = _walk([self._reads[name]], self._gives)
            if not _acts(path) and not (strange and self._between(strange[0])):
                continue
            block = Block(tuple(n for n in self._calls if n in ups), name)
            reason = _not_alone(strange[0]) if strange else self._obstacle(block)
            reason = reason or self._other_reader(block, path, readers)
            if reason is None:
                found.append(block)
            elif not strange or not _acts(path) or _NONLINEAR & set(map(_kind, path)):
                left_alone[name] = reason
        self.forget()
        return Blocks(tuple(found), left_alone)

    def forget(self) -> None:
        """Let go of the graph of a pass that came to no loss."""
        self._reads, self._gives, self._calls = {}, {}, {}

    def _between(self, node: Node) -> bool:
        """Return whether an operation reads outputs of layers alone: an unknown activation."""
        before = [x for x, _ in node.next_functions if x is not None]
        before = [x for x in before if _kind(x) != _PARAMETER]
        _, ups, strange = _walk(before, self._gives)
        return bool(ups) and not strange

    def _obstacle(self, block: Block) -> str | None:
        """Return why the layers of a block cannot be narrowed, or None."""
        layers = {name: self._model.get_submodule(name) for name in block.names}
        widths = [view(layers[name]).shape[0] for name in block.ups]
        if {*widths} != {view(layers[block.down]).shape[1]}:
            return f"the {', '.join(map(str, widths))} outputs before it are arranged anew"
        for name, layer in layers.items():
            if name not in self._names:
                return f"{name!r}, which is before it, is not among the targeted layers"
            if self._calls[name] > 1:
                return f"{name!r} is used {self._calls[name]} times in one step"
            if isinstance(layer, Replacement) and not isinstance(layer, PrunedLinear):
                return f"{name!r} is factored already"
            if self._is_tied(layer):
                return f"the weight of {name!r} is used elsewhere too"
        return self._constant(block, layers)

    def _is_tied(self, layer: nn.Module) -> bool:
        weight = view(layer).parameters[0]
        holders = [m for m in self._model.modules() if m is not layer]
        return any(p is weight for m in holders for p in m.parameters(recurse=False))

    def _constant(self, block: Block, layers: Mapping[str, nn.Module]) -> str | None:
        """Return whether a tensor beside the layers may have a value for every inner feature.

        The graph does not show what is multiplied or added if it is not trained.
        """
        paths = [name.split(".") for name in block.names]
        shared = next(
            (i for i, parts in enumerate(zip(*paths, strict=False)) if len({*parts}) > 1), 0
        )
        place = ".".join(paths[0][:shared])
        own = {id(tensor) for layer in layers.values() for tensor in _tensors(layer)}
        features = view(layers[block.down]).shape[1]
        for name, module in self._model.get_submodule(place).named_modules():
            if is_linear(module):
                continue
            for key, tensor in _named(module):
                if id(tensor) not in own and not tensor.requires_grad and features in tensor.shape:
                    return f"{'.'.join(filter(None, (place, name, key)))!r} may belong to it"
        return None

    def _other_reader(
        self, block: Block, path: set[Node], readers: Mapping[Node, set[Node]]
    ) -> str | None:
        tops = {node for node, name in self._gives.items() if name in block.ups}
        top = self._reads[block.down]
        ends = [node for node, name in self._gives.items() if name == block.down]
        own = path | _until(ends, top)
        for node in path | tops:
            for other in readers.get(node, set()) - own - tops:
                return f"its features are also read by {_kind(other)}"
        return None


def _tensors(layer: nn.Module) -> Iterable[Tensor]:
    return (tensor for _, tensor in _named(layer))


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _kind(node: Node) -> str:
    """Return what autograd calls an operation, without what all names have in common."""
    name = node.name().rpartition("::")[2]
    return name.rstrip("0123456789").removesuffix("Backward")


def _acts(path: Iterable[Node]) -> bool:
    return bool(_ACTIVATIONS & set(map(_kind, path)))


def _not_alone(node: Node) -> str:
    kind = _kind(node)
    if kind == _PARAMETER:
        return "a parameter stands between it and the layer before it"
    kind = "an operation in place" if kind == _IN_PLACE else kind
    return f"{kind}, by which its inputs are made, is not known to act on every feature alone"


def _walk(
    starts: Iterable[Node], gives: Mapping[Node, str]
) -> tuple[set[Node], set[str], list[Node]]:
    """Return the operations back to outputs of layers, those layers, and others."""
    path: set[Node] = set()
    ups: set[str] = set()
    strange: list[Node] = []
    stack = [*starts]
    while stack:
        node = stack.pop()
        if node in path:
            continue
        if node in gives:
            ups.add(gives[node])
        elif _kind(node) in _ACTIVATIONS | _PLUMBING:
            path.add(node)
            stack += [before for before, _ in node.next_functions if before is not None]
        else:
            before = node.next_functions[0][0] if node.next_functions else None
            in_place = before is not None and _kind(before) == _IN_PLACE
            strange.append(before if before is not None and in_place else node)
    return path, ups, strange


def _until(starts: Iterable[Node], end: Node) -> set[Node]:
    found: set[Node] = set()
    stack = [*starts]
    while stack:
        node = stack.pop()
        if node not in found and node is not end:
            found.add(node)
            stack += [before for before, _ in node.next_functions if before is not None]
    return found


def _readers(loss: Tensor) -> dict[Node, set[Node]]:
    """Return every operation in the graph of a loss, with those that read what it gave."""
    readers: dict[Node, set[Node]] = {}
    stack = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = {*stack}
    while stack:
        node = stack.pop()
        for before, _ in node.next_functions:
            if before is None:
                continue
            readers.setdefault(before, set()).add(node)
            if before not in seen:
                seen.add(before)
                stack.append(before)
    return readers
