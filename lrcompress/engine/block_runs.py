"""Blocks of a model run one by one: in which order, what each of them is given, and once more.

Everything is found by running the model with hooks. Blocks follow each other in a chain where each
is given the very tensor that the one before returned; there the model itself need not run again. A
layer that is a block by itself is a chain by itself.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from lrcompress.errors import ObservationError
from lrcompress.statistics.masks import Mask, Tokens, sequence_first

Run = Callable[[], object]
_Args = tuple[Any, ...]
_Kwargs = Mapping[str, Any]
_CACHE = "transformers.cache_utils.Cache"  # grows with every call; None computes the same
_SAME = 1e-3  # relative difference up to which a block that runs again has given the same


class _Enough(BaseException):
    """Ends a pass of the model where no more of it is needed; not for any ``except Exception``."""


@dataclass(frozen=True)
class Call:
    """What a block is given in one pass.

    Attributes:
        args: positional arguments.
        kwargs: those by name; caches of keys and values are left out.
        place: of the tensor that the block before returned, a number or a name; None if it is
            given none.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], before: object = None) -> "Call":
        """Return the call with these arguments, of which ``before`` came from the block before."""
        args = tuple(None if _is_cache(x) else x for x in args)
        kwargs = {key: None if _is_cache(x) else x for key, x in kwargs.items()}
        every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        place = next((k for k, x in every if x is before and isinstance(x, Tensor)), None)
        return cls(args, kwargs, place)

    def given(self, hidden: object) -> "Call":
        """Return the same call with another tensor in its place."""
        if isinstance(self.place, int):
            args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
            return replace(self, args=args)
        return replace(self, kwargs={**self.kwargs, str(self.place): hidden})

    @property
    def tensors(self) -> list[Tensor]:
        """The floating-point tensors among the arguments."""
        found = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]
        return [x for x in found if x.is_floating_point()]

    def on(self, block: nn.Module) -> object:
        """Return what the block returns, the first part if there are several."""
        return _first(block(*self.args, **self.kwargs))


def _is_cache(value: object) -> bool:
    return any(f"{k.__module__}.{k.__name__}" == _CACHE for k in type(value).__mro__)


def _first(output: object) -> object:
    return output[0] if isinstance(output, tuple | list) and output else output


@dataclass(frozen=True)
class Order:
    """The blocks that hold layers, as one pass has run them.

    Attributes:
        chains: the blocks in order, in chains.
        stages: block to its layers in order, those that read the same tensor together.
        left_alone: layers that cannot be followed, with the reasons.
    """

    chains: Sequence[Sequence[str]]
    stages: Mapping[str, Sequence[Sequence[str]]]
    left_alone: Mapping[str, str]


def numbered_block(name: str) -> str:
    """Return the numbered block that a layer stands in, or its own name.

    Example:
        >>> numbered_block("model.layers.3.mlp.up"), numbered_block("head")
        ('model.layers.3', 'head')
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


def find_order(model: nn.Module, names: Sequence[str], run: Run) -> Order:
    """Run the model once, and return in which order its blocks and layers are called.

    A layer whose numbered block cannot be followed is a block by itself.

    Args:
        model: in the state in which blocks will run, without gradients.
        names: of the layers.
        run: runs the model on a batch.
    """
    block_of = {name: numbered_block(name) for name in names}
    look = _Look(model, block_of).of(run)
    single = [n for n in names if block_of[n] != n and look.fault(block_of[n], "block")]
    if single:
        block_of |= {name: name for name in single}
        look = _Look(model, block_of).of(run)
    return _ordered(block_of, look)


def _ordered(block_of: Mapping[str, str], look: "_Look") -> Order:
    faults = {n: look.fault(n, "input") or look.fault(b, "block") for n, b in block_of.items()}
    alone = {name: why for name, why in faults.items() if why}
    followed = {block for name, block in block_of.items() if name not in alone}
    chains: list[list[str]] = []
    for block in (x for x in look.order if x in followed):
        before = chains[-1][-1] if chains else block
        # a layer by itself may read features that are narrowed elsewhere
        if look.follows.get(block) == before and not {block, before} & block_of.keys():
            chains[-1].append(block)
        else:
            chains.append([block])
    stages = {}
    for block in followed:
        read: dict[int, list[str]] = {}
        for name, tensor in look.reads.get(block, []):
            if name not in alone:
                read.setdefault(tensor, []).append(name)
        stages[block] = [*read.values()]
    return Order(chains, stages, alone)


class _Look:
    """What a pass of a model shows of its blocks and layers.

    Args:
        model: whose layers they are.
        block_of: layer to the block that it stands in, which may be itself.
    """

    def __init__(self, model: nn.Module, block_of: Mapping[str, str]) -> None:
        self._model, self._block_of = model, block_of
        self.calls: Counter[str] = Counter()  # of layers and blocks
        self.order: list[str] = []  # of blocks
        self.follows: dict[str, str] = {}  # block to the one whose output it is given
        self.reads: dict[str, list[tuple[str, int]]] = {}  # by block
        self.faults: dict[str, str] = {}  # of layers and blocks
        self._last: tuple[str, object] = ("", None)
        self._running: list[str] = []
        self._again = False
        # held until a block ends, for no other tensor to get the number of one that is gone
        self._held: list[tuple[str, Tensor, int]] = []

    def of(self, run: Run) -> Self:
        """Look at a pass."""
        with ExitStack() as stack:
            for block in dict.fromkeys(self._block_of.values()):
                module = self._model.get_submodule(block)
                enters, leaves = partial(self._enters, block), partial(self._leaves, block)
                for handle in (
                    module.register_forward_pre_hook(enters, with_kwargs=True),
                    module.register_forward_hook(leaves, with_kwargs=True),
                ):
                    stack.callback(handle.remove)
            _hook_inputs(stack, self._model, self._block_of, self._reads)
            run()
        return self

    def fault(self, name: str, what: str) -> str | None:
        """Return why a layer or a block cannot be followed, or None."""
        times = self.calls[name]
        if times != 1:
            return f"it is called {times} times" if times else "it is not called"
        return f"its {what} {self.faults[name]}" if name in self.faults else None

    def _enters(self, name: str, _block: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        if not self._again:
            self.calls[name] += 1
            self.order.append(name)
            self._running.append(name)
            before, output = self._last
            if Call.of(args, kwargs, output).place is not None:
                self.follows[name] = before

    def _leaves(
        self, name: str, block: nn.Module, args: _Args, kwargs: _Kwargs, output: object
    ) -> None:
        if self._again:
            return
        self._running.remove(name)
        self._last = name, _first(output)
        self._again = True
        if not _gives_again(Call.of(args, kwargs), block, _first(output)):
            self.faults[name] = "gives something else when it runs once more"
        self._again = False
        changed = [layer for layer, x, version in self._held if x._version != version]
        self.faults |= dict.fromkeys(changed, "is changed in place after it was read")
        self._held.clear()

    def _reads(self, name: str, x: Tensor) -> None:
        block = self._block_of[name]
        if self._again:
            return
        if block != name:
            self.calls[name] += 1
        if block not in self._running:
            self.faults[name] = "is read while its block does not run"
        self._held.append((name, x, x._version))
        self.reads.setdefault(block, []).append((name, id(x)))


def _hook_inputs(
    stack: ExitStack, model: nn.Module, names: Iterable[str], saw: Callable[[str, Tensor], None]
) -> None:
    """Call a function with what layers read, until the stack ends."""

    def hook(name: str, _layer: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        saw(name, args[0] if args else next(iter(kwargs.values())))

    for name in names:
        layer = model.get_submodule(name)
        handle = layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True)
        stack.callback(handle.remove)


def _gives_again(call: Call, block: nn.Module, output: object) -> bool:
    if not isinstance(output, Tensor):
        return False
    found = call.on(block)
    if not isinstance(found, Tensor) or found.shape != output.shape:
        return False
    return bool((found - output).float().norm() <= _SAME * output.float().norm())


def calls_of(model: nn.Module, blocks: Sequence[str], run: Run) -> dict[str, Call]:
    """Run the model until the last of some blocks is called, and return what each is given.

    The tensor that a block is given by the one before is not held.

    Args:
        model: in the state in which blocks will run.
        blocks: of a chain, in order.
        run: runs the model on a batch.
    """
    found: dict[str, Call] = {}
    output: list[object] = [None]

    def enters(name: str, _block: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        call = Call.of(args, kwargs, output[0])
        found[name] = call if call.place is None else call.given(None)
        if name == blocks[-1]:
            raise _Enough

    def leaves(_block: nn.Module, _args: _Args, result: object) -> None:
        output[0] = _first(result)

    with ExitStack() as stack:
        for name in blocks:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(partial(enters, name), with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(leaves).remove)
        _until_enough(run)
    return found


def inputs_of(
    model: nn.Module, block: str, call: Call, names: Iterable[str], *, whole: bool = False
) -> tuple[dict[str, Tensor], object]:
    """Run a block, and return what some of its layers read, and what it returns.

    Args:
        model: whose block it is.
        block: its name.
        call: what it is given.
        names: of the layers.
        whole: whether to run it to its end; otherwise until the last of them is called, and
            None is returned for its output.
    """
    found: dict[str, Tensor] = {}
    wanted = [*names]
    result: list[object] = [None]

    def saw(name: str, x: Tensor) -> None:
        found[name] = x
        if not whole and len(found) == len(wanted):
            raise _Enough

    def run() -> None:
        result[0] = call.on(model.get_submodule(block))

    with ExitStack() as stack:
        _hook_inputs(stack, model, wanted, saw)
        _until_enough(run)
    return found, result[0]


def _until_enough(run: Run) -> None:
    with suppress(_Enough):
        run()


@contextmanager
def standing_in(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the places of layers while the block runs, wherever they are used."""
    stand = {id(model.get_submodule(name)): new for name, new in layers.items()}
    places = [
        (parent, child, old, stand[id(old)])
        for parent in model.modules()
        for child, old in parent._modules.items()
        if id(old) in stand
    ]
    try:
        for parent, child, _, new in places:
            parent._modules[child] = new
        yield
    finally:
        for parent, child, old, _ in places:
            parent._modules[child] = old


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, without gradients and eagerly; its modes come back."""
    modes = {module: module.training for module in model.modules()}
    stance = torch.compiler.set_stance("force_eager")
    try:
        model.eval()
        with torch.no_grad(), stance:
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class RealTokens:
    """Which tokens of what layers read are real, by the masks of a batch.

    Args:
        model: whose layers they are.
        mask: of the batch, as :class:`~lrcompress.statistics.masks.Mask` takes it, or None.
        decoder_mask: the same of a decoder's own input.
        missing: without a mask, the error to raise where a layer reads sequences.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Tensor | None,
        decoder_mask: Tensor | None = None,
        missing: str | None = None,
    ) -> None:
        self._turned, self._missing = sequence_first(model), missing
        self._own, self._decoder = (None if m is None else Mask(m) for m in (mask, decoder_mask))

    def of(self, name: str, x: Tensor, call: Call) -> Tokens:
        """Return the real tokens of what a layer reads in a block that was given ``call``.

        Raises:
            ObservationError: if the mask does not fit, or is missing.
        """
        # what else comes as (examples, length, features) is of an encoder
        given = [y for y in call.tensors[1:] if y.ndim == 3]
        encoded = any(x.data_ptr() == y.data_ptr() and x.shape == y.shape for y in given)
        mask = self._decoder if given and not encoded else self._own
        turned = name.startswith(self._turned)
        if mask is None:
            if self._missing and x.ndim > 2 and self._own is None:
                raise ObservationError(self._missing)
            return Tokens(sequence_first=turned and x.ndim > 2)
        return mask.fit(x, sequence_first=turned, layer=name, owner="refit")
