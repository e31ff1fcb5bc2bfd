"""Forward and gradient hooks that accumulate statistics of layers during chosen steps.

Hooks are attached for one step and always removed. A step that is not observed runs exactly as
it would without this package, ``torch.compile`` included; an observed one runs eagerly.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import ObservationError
from lrcompress.statistics.eager import EAGER
from lrcompress.statistics.masks import (
    Mask,
    MaskSource,
    Tokens,
    by_example,
    joined,
    sequence_first,
)
from lrcompress.statistics.moments import INPUT_KINDS, TABLE_KINDS, Statistics, Sums, shapes
from lrcompress.statistics.padding_check import PaddingCheck
from lrcompress.statistics.views import is_embedding, view

_FISHER = frozenset({"input_fisher", "output_fisher"})
_WITH_INPUTS = _FISHER | {"weighted_moment", "token_fisher"}
_OF_INPUTS = frozenset((*INPUT_KINDS, "input_sum", "token_count"))
_Identity = tuple[object, ...]
_Read = tuple[_Identity, Tensor, Tokens]
_Part = tuple[Tensor | None, Tensor, Tokens]  # input, gradient, and where tokens lie in both
_ENCODED = "encoder_hidden_states"  # what transformers calls that argument of every decoder


@dataclass
class _Pass:
    """One forward and backward pass of one observed step."""

    mask: Mask | None
    decoder_mask: Mask | None
    missing: str | None  # why there is no mask, where one was expected
    trial: bool  # nothing is added
    outputs: list[Tensor] | None  # if they are asked for
    encoded: Tensor | None = None  # what a decoder was given of its encoder, once it runs
    decoding: set[str] = field(default_factory=set)  # layers that read what a decoder made
    # The tensors that a layer reads in turn -> the first layer that does. They are held, or their
    # memory could be another's.
    read: dict[_Identity, tuple[str, list[_Read]]] = field(default_factory=dict)
    pending: dict[str, list[_Read]] = field(default_factory=dict)  # inputs not yet added
    calls: dict[str, int] = field(default_factory=dict)
    forward: set[str] = field(default_factory=set)  # called before any backward pass
    parts: dict[str, list[_Part]] = field(default_factory=dict)
    tokens: int = 0  # of the layer that read most
    counted: int = 0  # of these, in the statistics already
    committed: bool = False
    armed: bool = True
    scale: float = 1.0
    terms: int | None = None  # of the loss


class Recorder:
    """Accumulates statistics of named layers over chosen steps.

    A step is observed by running it inside :meth:`step`, and calling :meth:`commit` once its
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
        offload: where symmetric sums live, ``"cpu"`` for instance; None leaves them beside the
            layer, as others are. They are on the host twice until a step ends, which waits once.
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
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for layer, module in self.layers.items():
            out_features, in_features = view(module, layer, table=True).shape
            table = is_embedding(module)
            own = [kind for kind in self.kinds if (kind in TABLE_KINDS) == table]
            self.shapes[layer] = shapes(own, in_features, out_features)
        self._decoders = list(_decoders(model))
        self._sequence_first = sequence_first(model)
        self._padding = PaddingCheck()
        self._pass: _Pass | None = None

    @property
    def nbytes(self) -> int:
        """Bytes the sums will take at most, if no two layers read the same tensor."""
        return sum(map(self.bytes_of, self.layers))

    def bytes_of(self, name: str) -> int:
        """Return the bytes that the sums of one layer will take at most."""
        every = self.shapes[name].items()  # counts are whole numbers of 8 bytes
        return sum((8 if key == "token_count" else 4) * math.prod(s) for key, s in every)

    @property
    def observing(self) -> bool:
        """Whether a step is being observed now."""
        return self._pass is not None

    @contextmanager
    def step(
        self,
        mask: Tensor | None = None,
        *,
        decoder_mask: Tensor | None = None,
        missing: str | None = None,
        source: MaskSource = None,
        trial: bool = False,
        keep_outputs: bool = False,
    ) -> Iterator[None]:
        """Observe what runs inside the block, and only that.

        Inputs are held in memory until :meth:`commit`, also under activation checkpointing, so
        that a step whose loss is not finite leaves no trace.

        Args:
            mask: ``(examples, length)`` or ``(examples, choices, length)``, nonzero where there is
                a token; see :class:`~lrcompress.statistics.masks.Mask` for the inputs it fits.
                None if nothing is padded.
            decoder_mask: the same for a decoder's own input, to which ``mask`` does not apply.
                A decoder is called with ``encoder_hidden_states=``, which have that of ``mask``.
            missing: without a mask, the error to raise when a layer reads sequences.
            source: what the mask was found by, for messages.
            trial: add nothing, and raise what observing such a step would.
            keep_outputs: for :attr:`outputs`; under checkpointing nothing else holds them.

        Raises:
            ShapeError: if a mask has another number of axes.
            ObservationError: if a layer is called twice without ``shared``, shares its input with
                other layers than in earlier steps, or lacks the mask that ``missing`` is for; if
                a mask does not fit what a layer reads, or has padding and tokens the wrong way.
        """
        own, decoders = (None if one is None else Mask(one) for one in (mask, decoder_mask))
        self._pass = _Pass(own, decoders, missing, trial, [] if keep_outputs else None)
        with ExitStack() as stack:
            stack.callback(self._forget)
            stack.enter_context(EAGER.held())
            for name, layer in self.layers.items():
                hook = partial(self._saw, name)
                handle = layer.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            for decoder in self._decoders:
                handle = decoder.register_forward_pre_hook(self._entered, with_kwargs=True)
                stack.callback(handle.remove)
            yield
            if self._pass.pending and not self._pass.committed:
                self.commit()
            self._add_gradients(*self._pass.parts)
            self._padding.check(self.owner, source)

    def commit(
        self,
        scale: float = 1.0,
        *,
        terms: int | None = None,
        finite: bool = True,
        armed: bool = True,
    ) -> None:
        """Add what the forward pass read; backward passes from here on add their gradients.

        Args:
            scale: makes gradients those of the summed loss: terms per batch / loss scaling.
            terms: of the loss, examples or predicted tokens, each of which counts as an example;
                by default the leading size of the outputs.
            finite: whether the loss is; if not, the step is counted as skipped, not added.
            armed: False to ignore backward passes until :meth:`arm`.
        """
        current = self._pass
        assert current is not None, "commit outside of step"
        if not finite and not current.trial:
            self.statistics.skipped += 1
        elif not current.trial:
            firsts = [name for name, xs in current.pending.items() if self._is_first(name, xs)]
            self.statistics.steps += 1
            self._count_tokens()
            for name in firsts:
                self._add_inputs(name, [read[1:] for read in current.pending[name]])
        current.pending, current.read, current.encoded = {}, {}, None
        current.committed, current.scale, current.armed = True, scale, armed and finite
        current.terms = terms

    def again(self) -> None:
        """Add the gradients of one more backward pass, of terms that are counted already."""
        assert self._pass is not None, "again outside of step"
        self._add_gradients(*self._pass.parts)
        self._pass.terms = 0

    def arm(self, armed: bool = True) -> None:
        """Add gradients from here on, or ignore them."""
        assert self._pass is not None, "arm outside of step"
        self._pass.armed = armed

    def drop(self) -> None:
        """Discard what is not added yet of this step, which was interrupted."""
        self._padding.drop()
        if self._pass is not None:
            self._pass.pending, self._pass.parts = {}, {}

    @property
    def outputs(self) -> list[Tensor]:
        """The layers' outputs in this pass, for ``torch.autograd.grad`` in place of ``.grad``."""
        kept = None if self._pass is None else self._pass.outputs
        assert kept is not None, "outputs are kept within step(keep_outputs=True)"
        return kept

    def _forget(self) -> None:
        assert self._pass is not None
        self._pass.outputs = None  # whose hooks hold the pass, and this: a cycle
        self._pass = None
        self.statistics.settle_()

    def _saw(
        self,
        name: str,
        _layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
    ) -> None:
        current = self._pass
        x = args[0] if args else next(iter(kwargs.values()))
        self._follow_decoder(name, x)
        if current is None or not (torch.is_grad_enabled() or self.forward_only):
            return  # a teacher's or a metric's own pass
        if not x.is_floating_point():  # rows of a table, by number
            x = x.unsqueeze(-1)
        tokens = self._tokens(name, x)
        if not _in_backward():
            if current.committed:  # a second forward pass in the same step: manual optimization
                self._add_gradients(*current.parts)
                current.committed, current.calls = False, {}
                current.outputs = None if current.outputs is None else []
                current.tokens = current.counted = 0
            current.forward.add(name)
        if not (_in_backward() and name in current.forward):  # not a checkpoint's second run
            self._count_call(name)
            self._take_inputs(name, x.detach(), tokens)
        wanted = bool(self.shapes[name].keys() - _OF_INPUTS) and not current.trial
        if output.requires_grad and (wanted or self._padding.wants(tokens)):
            if wanted and current.outputs is not None and not _in_backward():
                current.outputs.append(output)
            kept = x.detach() if _WITH_INPUTS & self.shapes[name].keys() else None
            hook = partial(self._took_gradient, current, name, kept, tokens)
            output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _follow_decoder(self, name: str, x: Tensor) -> None:
        """Note whether a layer reads what a decoder has made, or what it was given."""
        # in a backward pass reentrant checkpointing asks, and no decoder is entered
        if self._pass is not None and self._pass.encoded is not None and not _in_backward():
            encoded, decoding = self._pass.encoded, self._pass.decoding
            own = (x.data_ptr(), x.shape) != (encoded.data_ptr(), encoded.shape)
            (decoding.add if own else decoding.discard)(name)

    def _tokens(self, name: str, x: Tensor) -> Tokens:
        """Return where the tokens of a layer's input and output lie."""
        current, turned = self._pass, name.startswith(self._sequence_first)
        assert current is not None
        mask = current.decoder_mask if name in current.decoding else current.mask
        if mask is None:
            return Tokens(sequence_first=turned and x.ndim > 2)
        return mask.fit(x, sequence_first=turned, layer=name, owner=self.owner)

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

    def _take_inputs(self, name: str, x: Tensor, tokens: Tokens) -> None:
        current = self._pass
        assert current is not None
        if x.ndim > 2 and current.mask is None and current.missing:
            raise ObservationError(current.missing)
        real = x[..., 0] if tokens.real is None else tokens.real
        current.tokens = max(current.tokens, real.numel())
        if current.committed and current.armed:
            self._count_tokens()
        if current.trial or not self.shapes[name].keys() & _OF_INPUTS:
            return
        # tables of other sizes may read the same rows
        table = name if "token_count" in self.shapes[name] else None
        read = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version, table), x, tokens
        if not _in_backward():
            current.pending.setdefault(name, []).append(read)
        elif self._is_first(name, [read]) and current.armed:
            # reentrant checkpointing: the step is committed already
            self._add_inputs(name, [(x, tokens)])

    def _is_first(self, name: str, reads: list[_Read]) -> bool:
        """Return whether no layer before it has read just these tensors: it adds for all.

        Raises:
            ObservationError: if another layer has added for it in an earlier step, and now reads
                something else.
        """
        assert self._pass is not None
        every = tuple(identity for identity, _, _ in reads)
        first, _ = self._pass.read.setdefault(every, (name, reads))
        known = self.statistics.source.setdefault(name, first)
        if known not in (first, name):
            raise ObservationError(
                f"layer {name!r} reads the tensor of {known!r} in one step or call and that of "
                f"{first!r} in another; leave it out with exclude="
            )
        return known == name

    def _count_tokens(self) -> None:
        assert self._pass is not None
        self.statistics.tokens += self._pass.tokens - self._pass.counted
        self._pass.counted = self._pass.tokens

    def _add_inputs(self, name: str, reads: list[tuple[Tensor, Tokens]]) -> None:
        tokens = joined(reads)
        sums = self._sums(self.statistics.inputs, name, tokens)
        (sums.add_rows_ if "token_count" in sums.values else sums.add_inputs_)(tokens)

    def _entered(self, _decoder: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        if self._pass is not None and not _in_backward():
            self._pass.encoded = kwargs.get(_ENCODED)

    @torch.no_grad()
    def _took_gradient(
        self, current: _Pass, name: str, x: Tensor | None, tokens: Tokens, g: Tensor
    ) -> None:
        if current is not self._pass:
            return
        if not current.committed:
            self.commit()
        if not current.armed:
            return
        self._padding.add(tokens, g)
        if current.trial or not self.shapes[name].keys() - _OF_INPUTS:
            return
        parts = current.parts.setdefault(name, [])
        parts.append((x, g, tokens))
        if len(parts) == current.calls[name]:
            self._add_gradients(name)

    def _add_gradients(self, *names: str) -> None:
        """Add what has arrived; a use whose output the loss does not depend on never arrives."""
        assert self._pass is not None
        for name in names:
            parts = self._pass.parts.pop(name)
            g = max((g for _, g, _ in parts), key=len)  # a use of position embeddings is one row
            sums = self._sums(self.statistics.outputs, name, g)
            scale, terms = self._pass.scale, self._pass.terms
            terms = len(g) if terms is None else terms
            gave = [(g, tokens) for _, g, tokens in parts]
            read = [(x, tokens) for x, _, tokens in parts if x is not None]
            if "output_moment" in sums.values:
                gradients = joined(gave)
                sums.add_gradients_(gradients, terms, scale)
                if "weighted_moment" in sums.values:
                    sums.add_weighted_(joined(read), gradients, scale)
            if "token_fisher" in sums.values:
                sums.add_row_gradients_(joined(read), joined(gave), terms, scale)
            if _FISHER & sums.values.keys():
                for x, of_examples in by_example(parts):
                    sums.add_fisher_(x, of_examples, scale, examples=terms)
                    terms = 0

    def _sums(self, held: dict[str, Sums], name: str, like: Tensor) -> Sums:
        """Return a layer's sums of inputs or of outputs, zeros at the first look."""
        if name not in held:
            inputs = held is self.statistics.inputs
            kept = {k: s for k, s in self.shapes[name].items() if (k in _OF_INPUTS) == inputs}
            held[name] = Sums.zeros(kept, like.device, self.offload)
        held[name].beside_(like.device)
        return held[name]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _decoders(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that may be given what an encoder has made."""
    if _ENCODED in signature(module.forward).parameters:
        yield module
        return
    for child in module.children():
        yield from _decoders(child)
