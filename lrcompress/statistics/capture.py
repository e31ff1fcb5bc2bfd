"""Watch layers during chosen training steps, with hooks that always come off.

Hooks are attached for one step at a time. A step that is not observed runs exactly as it
would without this package, ``torch.compile`` included; an observed one runs eagerly.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import ObservationError, ShapeError
from lrcompress.statistics.moments import (
    INPUT_KINDS,
    TABLE_KINDS,
    Statistics,
    Sums,
    shapes,
)
from lrcompress.statistics.views import is_table, view

_FISHER = frozenset({"input_fisher", "output_fisher"})
_WITH_INPUTS = _FISHER | {"weighted_moment", "token_fisher"}
_OF_INPUTS = frozenset((*INPUT_KINDS, "input_sum", "token_count"))


@dataclass
class _Pass:
    """One forward and backward pass of one observed step."""

    mask: Tensor | None  # flat indices of the real tokens of a (examples, length) batch
    grid: torch.Size | None  # (examples, length)
    missing: str | None  # why there is no mask, where one was expected
    # A tensor's identity -> its first reader. The tensor is held, or its memory could be another's.
    read: dict[tuple[object, ...], tuple[str, Tensor]] = field(default_factory=dict)
    pending: dict[str, list[Tensor]] = field(default_factory=dict)  # inputs not yet added
    calls: dict[str, int] = field(default_factory=dict)
    forward: set[str] = field(default_factory=set)  # called before any backward pass
    parts: dict[str, list[tuple[Tensor | None, Tensor]]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    tokens: int = 0  # of the layer that read most
    counted: int = 0  # of these, in the statistics already
    committed: bool = False
    armed: bool = True
    scale: float = 1.0


class Recorder:
    """Accumulates statistics of named layers over the steps it is told to watch.

    A step is watched by running it inside :meth:`step`, and calling :meth:`commit` once its
    loss is known and before its backward pass::

        with recorder.step(mask=batch["attention_mask"]):
            loss = model(**batch).loss
            recorder.commit(scale=len(batch["labels"]))
            loss.backward()

    Args:
        model: the module that holds the layers.
        names: of the layers to watch.
        kinds: which statistics, of :data:`lrcompress.statistics.moments.KINDS`, and of its
            ``TABLE_KINDS`` for those among the layers that are tables.
        statistics: to go on from; a new one if None.
        offload: where the sums live, ``"cpu"`` for instance; None leaves them beside the layer.
        shared: allow a layer to be called several times a step; its uses are added up.
        forward_only: watch passes without gradients too. Only for statistics of inputs.
        name: how the owner calls itself in error messages.

    Raises:
        LayerError: if a named layer has no normal form.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        kinds: Iterable[str],
        *,
        statistics: Statistics | None = None,
        offload: str | None = None,
        shared: bool = False,
        forward_only: bool = False,
        name: str = "observe",
    ) -> None:
        self.kinds = tuple(kinds)
        self.layers = {layer: model.get_submodule(layer) for layer in names}
        self.statistics = statistics if statistics is not None else Statistics()
        self.offload, self.shared, self.forward_only = offload, shared, forward_only
        self.owner = name
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for layer, module in self.layers.items():
            out_features, in_features = view(module, layer, table=True).shape
            table = is_table(module)
            own = [kind for kind in self.kinds if (kind in TABLE_KINDS) == table]
            self._shapes[layer] = shapes(own, in_features, out_features)
        self._pass: _Pass | None = None

    @property
    def nbytes(self) -> int:
        """Bytes the sums will take at most, if no two layers read the same tensor."""
        every = (shape for named in self._shapes.values() for shape in named.values())
        tables = (
            named["token_count"][0] for named in self._shapes.values() if "token_count" in named
        )
        # counts are whole numbers of 8 bytes
        return 4 * (sum(torch.Size(shape).numel() for shape in every) + sum(tables))

    @property
    def watching(self) -> bool:
        """Whether a step is being watched now."""
        return self._pass is not None

    @contextmanager
    def step(self, mask: Tensor | None = None, *, missing: str | None = None) -> Iterator[None]:
        """Watch what runs inside the block, and only that.

        Inputs are held until :meth:`commit`, so that a step whose loss is not finite leaves no
        trace; under activation checkpointing an observed step therefore needs their memory.

        Args:
            mask: ``(examples, length)``, nonzero where there is a token; inputs of that leading
                shape lose their padding, others are taken whole. None if nothing is padded.
            missing: without a mask, the error to raise when a layer reads sequences.

        Raises:
            ShapeError: if ``mask`` is not two-dimensional.
        """
        if mask is not None and mask.ndim != 2:
            raise ShapeError(f"mask must be (examples, length), got shape {tuple(mask.shape)}")
        flat = mask.reshape(-1).nonzero().squeeze(1) if mask is not None else None
        self._pass = _Pass(flat, mask.shape if mask is not None else None, missing)
        with ExitStack() as stack:
            stack.callback(self._forget)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for name, layer in self.layers.items():
                hook = partial(self._saw, name)
                handle = layer.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield
            if self._pass.pending and not self._pass.committed:
                self.commit()
            self._add_gradients(*self._pass.parts)

    def commit(self, scale: float = 1.0, *, finite: bool = True, armed: bool = True) -> None:
        """Add what the forward pass read; backward passes from here on add their gradients.

        Args:
            scale: what turns a gradient as it will arrive into the gradient of the summed
                loss: examples per batch for a mean loss, divided by any loss scaling.
            finite: whether the loss is; if not, the step is counted as skipped, not added.
            armed: False to let backward passes go by until :meth:`arm`.
        """
        current = self._pass
        assert current is not None, "commit outside of step"
        if not finite:
            self.statistics.skipped += 1
        else:
            self._check_shared(current)
            self.statistics.steps += 1
            self._count_tokens()
            for name, xs in current.pending.items():
                self._add_inputs(name, xs)
        current.pending, current.read = {}, {}
        current.committed, current.scale, current.armed = True, scale, armed and finite

    def arm(self, armed: bool = True) -> None:
        """Let gradients count, or go by, from here on."""
        assert self._pass is not None, "arm outside of step"
        self._pass.armed = armed

    @property
    def outputs(self) -> list[Tensor]:
        """The watched layers' outputs of this pass, to ask for gradients without ``.grad``."""
        assert self._pass is not None, "outputs outside of step"
        return self._pass.outputs

    def _forget(self) -> None:
        assert self._pass is not None
        self._pass.outputs.clear()  # whose hooks hold the pass, and this: a cycle
        self._pass = None

    def _saw(
        self,
        name: str,
        _layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
    ) -> None:
        current = self._pass
        if current is None or not (torch.is_grad_enabled() or self.forward_only):
            return  # a teacher's or a metric's own pass
        x = args[0] if args else next(iter(kwargs.values()))
        if not x.is_floating_point():  # rows of a table, by number
            x = x.unsqueeze(-1)
        if not _in_backward():
            if current.committed:  # a second forward pass in the same step: manual optimization
                self._add_gradients(*current.parts)
                current.committed, current.calls, current.outputs = False, {}, []
                current.tokens = current.counted = 0
            current.forward.add(name)
        if not (_in_backward() and name in current.forward):  # not a checkpoint's second run
            self._count_call(name)
            self._take_inputs(name, x.detach())
        if self._shapes[name].keys() - _OF_INPUTS and output.requires_grad:
            if not _in_backward():
                current.outputs.append(output)
            kept = x.detach() if _WITH_INPUTS & self._shapes[name].keys() else None
            hook = partial(self._took_gradient, current, name, kept)
            output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _count_call(self, name: str) -> None:
        assert self._pass is not None
        calls = self._pass.calls
        calls[name] = calls.get(name, 0) + 1
        if calls[name] == 1 or (self.shared and not _in_backward()):
            return
        way_out = "leave it out with exclude=, or pass " + (
            "use_reentrant=False to activation checkpointing, which hides its uses otherwise"
            if self.shared
            else "shared=True to factor it once for all its uses"
        )
        raise ObservationError(
            f"layer {name!r} was called twice in one step: {self.owner} expects one call; {way_out}"
        )

    def _take_inputs(self, name: str, x: Tensor) -> None:
        current = self._pass
        assert current is not None
        if x.ndim > 2 and current.mask is None and current.missing:
            raise ObservationError(current.missing)
        mask = current.mask if self._is_masked(x) else None
        current.tokens = max(current.tokens, (x[..., 0] if mask is None else mask).numel())
        if current.committed and current.armed:
            self._count_tokens()
        if not self._shapes[name].keys() & _OF_INPUTS:
            return
        # tables of other sizes may read the same rows
        table = name if "token_count" in self._shapes[name] else None
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version, table)
        first, _ = current.read.setdefault(key, (name, x))
        known = self.statistics.source.setdefault(name, first)
        if known != first:
            raise self._shared_otherwise(name, known, first)
        if first != name:
            return
        if not _in_backward():
            current.pending.setdefault(name, []).append(x)
        elif current.armed:  # reentrant checkpointing: the step is committed already
            self._add_inputs(name, [x])

    def _count_tokens(self) -> None:
        assert self._pass is not None
        self.statistics.tokens += self._pass.tokens - self._pass.counted
        self._pass.counted = self._pass.tokens

    def _check_shared(self, current: _Pass) -> None:
        for name, first in self.statistics.source.items():
            calls = (current.calls.get(name, 0), current.calls.get(first, 0))
            if calls[0] and calls[0] != calls[1]:  # a use of the first that this one has no part in
                raise self._shared_otherwise(name, first, name)

    def _shared_otherwise(self, name: str, one: str, other: str) -> ObservationError:
        return ObservationError(
            f"layer {name!r} reads the tensor of {one!r} in one step or call and that of "
            f"{other!r} in another; leave it out with exclude="
        )

    def _add_inputs(self, name: str, xs: list[Tensor]) -> None:
        tokens = self._joined(xs)
        sums = self.statistics.inputs.get(name)
        if sums is None:
            kept = {k: v for k, v in self._shapes[name].items() if k in _OF_INPUTS}
            sums = Sums.zeros(kept, self._device(tokens))
            self.statistics.inputs[name] = sums
        if "token_count" in sums.values:
            sums.add_rows_(tokens)
        else:
            sums.add_inputs_(tokens)

    def _tokens(self, x: Tensor) -> Tensor:
        assert self._pass is not None
        flat = x.reshape(-1, x.shape[-1])
        return flat[self._pass.mask] if self._is_masked(x) else flat

    def _joined(self, parts: Iterable[Tensor]) -> Tensor:
        """Give the tokens of one tensor after another; of a single one without a further copy."""
        tokens = [self._tokens(part) for part in parts]
        return torch.cat(tokens) if len(tokens) > 1 else tokens[0]

    def _is_masked(self, x: Tensor) -> bool:
        assert self._pass is not None
        return self._pass.mask is not None and x.shape[:-1] == self._pass.grid

    @torch.no_grad()
    def _took_gradient(self, current: _Pass, name: str, x: Tensor | None, g: Tensor) -> None:
        if current is not self._pass:
            return
        if not current.committed:
            self.commit()
        if not current.armed:
            return
        parts = current.parts.setdefault(name, [])
        parts.append((x, g))
        if len(parts) == current.calls[name]:
            self._add_gradients(name)

    def _add_gradients(self, *names: str) -> None:
        """Add what has arrived; a use whose output the loss does not depend on never arrives."""
        assert self._pass is not None
        for name in names:
            parts = self._pass.parts.pop(name)
            _, g = parts[0]
            sums = self.statistics.outputs.get(name)
            if sums is None:
                kept = {k: v for k, v in self._shapes[name].items() if k not in _OF_INPUTS}
                sums = Sums.zeros(kept, self._device(g))
                self.statistics.outputs[name] = sums
            scale = self._pass.scale
            if "output_moment" in sums.values:
                tokens = self._joined(g for _, g in parts)
                sums.add_gradients_(tokens, g.shape[0], scale)
                if "weighted_moment" in sums.values:
                    read = self._joined(x for x, _ in parts if x is not None)
                    sums.add_weighted_(read, tokens, scale)
            if "token_fisher" in sums.values:
                rows = self._joined(x for x, _ in parts if x is not None)
                sums.add_row_gradients_(rows, self._joined(g for _, g in parts), g.shape[0], scale)
            if _FISHER & sums.values.keys():
                sums.add_fisher_(*self._by_example(parts), scale)

    def _by_example(self, parts: list[tuple[Tensor | None, Tensor]]) -> tuple[Tensor, Tensor]:
        """Give inputs and gradients as ``(examples, length, features)``, padding zero."""
        assert self._pass is not None
        xs, gs = [], []
        for x, g in parts:
            assert x is not None
            if self._is_masked(g):
                keep = torch.zeros(g.shape[:-1].numel(), dtype=torch.bool, device=g.device)
                keep[self._pass.mask] = True
                keep = keep.view(*g.shape[:-1], 1)
                x, g = torch.where(keep, x, 0), torch.where(keep, g, 0)
            xs.append(x.reshape(x.shape[0], -1, x.shape[-1]))
            gs.append(g.reshape(g.shape[0], -1, g.shape[-1]))
        return torch.cat(xs, 1), torch.cat(gs, 1)

    def _device(self, like: Tensor) -> torch.device:
        return torch.device(self.offload) if self.offload else like.device


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
