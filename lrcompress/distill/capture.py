"""Forward hooks that capture calls and outputs of a training step, and are always removed."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrcompress.distill.losses import first_tensor
from lrcompress.errors import NoMatchError, ObservationError, nearest


@dataclass(frozen=True)
class Call:
    """A call of a submodule, to be repeated on the teacher.

    Attributes:
        name: of the submodule, empty for the module itself.
        args: its positional arguments, as they came in.
        kwargs: its keyword arguments.
        output: what it returned.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def logits(self) -> Tensor | None:
        """The output if it is a tensor, or its ``.logits``, or its start and end logits."""
        found = self.output if isinstance(self.output, Tensor) else _logits_of(self.output)
        return found if isinstance(found, Tensor) and found.ndim else None


def _logits_of(output: object) -> object:
    """Return ``.logits``, or start and end logits as one tensor, ``(batch, 2, positions)``."""
    ends = [getattr(output, name, None) for name in ("start_logits", "end_logits")]
    if all(isinstance(end, Tensor) for end in ends):
        return torch.stack(cast("list[Tensor]", ends), 1)
    return getattr(output, "logits", None)


class CallCapture:
    """Captures the one call of a training step that returns the logits.

    Args:
        call: the submodule whose call is meant, empty for the module itself; None takes the
            outermost one whose output is a tensor other than a scalar, or has ``.logits``.
        logits: the submodule that returns the logits, if it is another one; the call is then
            the outermost one around it.
    """

    def __init__(self, call: str | None = None, logits: str | None = None) -> None:
        self.call, self.logits = call, logits
        self._found = call
        self._open: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
        self._calls: list[tuple[int, Call]] = []
        self._clock = 0

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Capture calls while the block runs.

        Raises:
            NoMatchError: if ``call`` names no submodule.
        """
        self._open, self._calls, self._clock = [], [], 0
        modules = {self._found: _named(model, self._found, "call")} if self._found else None
        if self._found is None:
            modules = dict(_outside_compiled(model, ""))
        elif modules is None:
            modules = {"": model}
        with ExitStack() as stack:
            for name, module in modules.items():
                _listen(stack, module, partial(self._after, name), self._before)
            yield

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._clock += 1
        self._open.append((self._clock, tuple(map(_held, args)), _held(kwargs)))

    def _after(self, name: str, _module: nn.Module, _args: object, output: object) -> None:
        start, args, kwargs = self._open.pop()
        call = Call(name, args, kwargs, output)
        if self._gives_logits(call):
            self._calls = [(at, inner) for at, inner in self._calls if at < start]
            self._calls.append((start, call))

    def _gives_logits(self, call: Call) -> bool:
        if self._found is not None:
            return True
        if self.logits is not None:
            return f"{self.logits}.".startswith(f"{call.name}." if call.name else "")
        return call.logits is not None

    def take(self) -> Call:
        """Return the call of the step.

        Raises:
            ObservationError: if there was none, or more than one that could be meant.
        """
        calls = [call for _, call in self._calls]
        self._calls = []
        named = [call for call in calls if isinstance(_logits_of(call.output), Tensor)]
        if len(calls) > 1 and len(named) == 1 and self._found is None:
            calls = named
        if len(calls) != 1:
            raise ObservationError(self._complaint([call.name for call in calls]))
        self._found = calls[0].name
        return calls[0]

    def _complaint(self, names: list[str]) -> str:
        if self._found is not None:
            what = f"submodule {self._found!r}" if self._found else "the module itself"
            return (
                f"distillation repeats one call of {what} in each training_step, which called it "
                f"{len(names) or 'no'} times; name another submodule with call="
            )
        if not names:
            return (
                "distillation repeats the call that gives the logits, and training_step called "
                "no submodule whose output is a tensor or has .logits; name one with call= and, "
                "where its output is something else, the logits' own submodule with logits="
            )
        shown = ", ".join(repr(name) for name in dict.fromkeys(names))
        return (
            f"distillation repeats the one call that gives the logits, and training_step made "
            f"{len(names)} that could: of {shown}; name one with call="
        )


class OutputCapture:
    """Captures the outputs of submodules in one call.

    Args:
        model: the module that is called.
        names: of its submodules, each with the prefix in front.
        prefix: what the model itself is called in them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], prefix: str = "") -> None:
        self.model, self.prefix = model, prefix
        self._heard: dict[str, list[Any]] = {name: [] for name in names}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Capture outputs while the block runs.

        Raises:
            NoMatchError: if there is no such submodule.
        """
        with ExitStack() as stack:
            for name, calls in self._heard.items():
                module = _named(self.model, name.removeprefix(self.prefix), "layer")
                _listen(stack, module, partial(_hear, calls))
            yield

    def take(self) -> dict[str, Tensor]:
        """Return the outputs by name.

        Raises:
            ObservationError: if a submodule was not called exactly once.
            LayerError: if a submodule returned no tensor.
        """
        for name, calls in self._heard.items():
            if len(calls) != 1:
                raise ObservationError(
                    f"layer {name!r} was called {len(calls) or 'no'} times in the step, once was "
                    "expected; choose others with layers=, and where torch.compile made one "
                    "graph of them, compile each block instead of the whole"
                )
        return {name: first_tensor(calls[0], name) for name, calls in self._heard.items()}


def _listen(
    stack: ExitStack,
    module: nn.Module,
    after: Callable[[nn.Module, Any, Any], None],
    before: Callable[[nn.Module, Any, Any], None] | None = None,
) -> None:
    """Call ``before`` and ``after`` around each call of a module until the stack closes."""
    compiled = module._compiled_call_impl
    if compiled is None:
        if before is not None:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after).remove)
        return

    def call(*args: Any, **kwargs: Any) -> Any:  # hooks would become part of the graph
        if before is not None:
            before(module, args, kwargs)
        output = compiled(*args, **kwargs)
        after(module, args, output)
        return output

    module._compiled_call_impl = call
    stack.callback(setattr, module, "_compiled_call_impl", compiled)


def _hear(calls: list[Any], _module: nn.Module, _args: object, output: object) -> None:
    calls.append(output)


def _held(value: Any) -> Any:
    """Return a shallow copy of a container, since a model may change the one it is given."""
    return copy.copy(value) if isinstance(value, MutableMapping | list) else value


def _named(model: nn.Module, name: str, argument: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        raise NoMatchError(
            f"{argument}={name!r} names no submodule of {type(model).__name__}; "
            f"nearest: {nearest(name, names)}"
        ) from None


def _outside_compiled(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and what is in it, but nothing of what torch.compile made one graph of."""
    yield name, module
    # by name, for importing torch._dynamo takes seconds
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        return
    for child, inner in module.named_children():
        yield from _outside_compiled(inner, f"{name}.{child}" if name else child)
