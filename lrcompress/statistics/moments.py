"""Moments of layer inputs and output gradients, as mergeable sums and counts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrcompress.errors import CheckpointError, ObservationError, ShapeError, nearest
from lrcompress.linalg import (
    converted,
    finite_or_zero,
    for_gram,
    full_precision,
    packed,
    packed_shape,
    per_example_squares,
    symmetric,
)
from lrcompress.statistics.offload import Arrival, add_offloaded_gram_, settle_

INPUT_KINDS = ("input_moment", "input_abs")
OUTPUT_KINDS = ("output_moment", "weighted_moment", "input_fisher", "output_fisher")
KINDS = INPUT_KINDS + OUTPUT_KINDS  #: of linear layers; :class:`Sums` has their formulas
TABLE_KINDS = ("token_count", "token_fisher")  # of embeddings, the only ones they have
# Outputs beyond which only the diagonal of their moment is kept: in full it would be over 1 GiB.
LARGE = 16_384


def shapes(kinds: Iterable[str], in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every sum that the statistics named ``kinds`` need for one layer.

    Of symmetric sums one triangle is kept, as :func:`~lrcompress.linalg.packed_shape` says. Of
    more than :data:`LARGE` outputs, those of a head over a vocabulary, only the diagonal of the
    output moment is: 0.1 MiB for 32,000, not 2.0 GiB, and 0.5 MiB for 128,256, not 31 GiB.
    Gradients of a softmax over many words are nearly uncorrelated between them, which is what the
    diagonal assumes.

    Example:
        >>> shapes(["output_moment"], in_features=256, out_features=32_000)
        {'output_moment': (32000,)}
        >>> shapes(["input_abs"], in_features=3, out_features=2)
        {'input_sum': (3,), 'input_abs': (3,)}
        >>> shapes(["token_count"], in_features=3, out_features=2)
        {'token_count': (2,)}
    """
    every: dict[str, tuple[int, ...]] = {
        "input_moment": packed_shape(in_features),
        "input_sum": (in_features,),
        "input_abs": (in_features,),
        "output_moment": (out_features,) if out_features > LARGE else packed_shape(out_features),
        "weighted_moment": packed_shape(in_features),
        "weighted_sum": (in_features,),
        "weight": (),
        "input_fisher": (in_features,),
        "output_fisher": (out_features,),
        "token_count": (out_features,),
        "token_fisher": (out_features,),
    }
    wanted = set(kinds)
    if wanted & set(INPUT_KINDS):
        wanted.add("input_sum")
    if "weighted_moment" in wanted:
        wanted |= {"output_moment", "weighted_sum", "weight"}
    return {name: shape for name, shape in every.items() if name in wanted}


Device = torch.device | str
Added = TypeVar("Added", bound=Callable[..., None])


def _in_full_precision(method: Added) -> Added:
    """Add without the autocast that a backward pass may run in, and without TF32."""

    @wraps(method)
    def added(self: "Sums", x: Tensor, *args: Any, **kwargs: Any) -> None:
        with torch.autocast(x.device.type, enabled=False), full_precision():
            method(self, x, *args, **kwargs)

    return added  # type: ignore[return-value]


@dataclass
class Sums:
    """Named sums and the counts that go with them: in float32, but for whole numbers, in int64.

    Attributes:
        values: ``input_moment`` ``Σ x xᵀ`` and ``output_moment`` ``Σ g gᵀ`` (upper triangles
            only, of very many outputs the diagonal only), ``input_sum`` ``Σ x``, ``input_abs``
            ``Σ |x|``, ``input_fisher`` and ``output_fisher``: ``Σ (∂L/∂W)²`` over examples,
            summed over the other axis; ``weighted_moment`` ``Σ ‖g‖² x xᵀ`` with ``weighted_sum``
            ``Σ ‖g‖² x`` and ``weight`` ``Σ ‖g‖²``. Of a table ``token_count``, how often each
            row was read, and ``token_fisher`` ``Σ ‖g‖²`` over the tokens that read it.
        tokens: ``()`` int64, tokens behind the sums.
        examples: ``()`` int64, examples behind the sums.
        skipped: ``()`` int64, steps left out because they were not finite.
        arriving: what is on its way to sums in host memory, until :meth:`Statistics.settle_`.
    """

    values: dict[str, Tensor]
    tokens: Tensor
    examples: Tensor
    skipped: Tensor
    arriving: list[Arrival] = field(default_factory=list, kw_only=True)

    @classmethod
    def zeros(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        device: Device | None = None,
        offload: Device | None = None,
    ) -> "Sums":
        """Return zero sums and counts, the symmetric ones on ``offload``."""
        count = torch.zeros(3, dtype=torch.int64, device=device)
        places = (device, offload or device)
        values = {
            name: torch.zeros(shape, dtype=_dtype(name), device=places[len(shape) > 1])
            for name, shape in shapes.items()
        }
        return cls(values, *count.clone().unbind())

    @_in_full_precision
    def add_inputs_(self, x: Tensor) -> None:
        """Add the tokens ``(tokens, in)`` that a layer read.

        Raises:
            ShapeError: if ``x`` has another number of features.
        """
        features = self.values["input_sum"].shape[0]
        if x.ndim != 2 or x.shape[1] != features:
            raise ShapeError(f"expected tokens of shape (_, {features}), got {tuple(x.shape)}")
        finite, x = finite_or_zero(for_gram(x.detach()))
        if "input_moment" in self.values:
            self._add_gram("input_moment", x)
        if "input_abs" in self.values:
            self.values["input_abs"] += _over_tokens(x.abs())
        self.values["input_sum"] += _over_tokens(x)
        self._count(finite, x.shape[0], 0)

    @_in_full_precision
    def add_gradients_(self, g: Tensor, examples: int, scale: float = 1.0) -> None:
        """Add one step's gradients at the output to ``output_moment``.

        A step with a gradient that is not finite is counted as skipped and adds nothing.

        Args:
            g: ``(tokens, out)``; times ``scale`` the gradients of the summed loss.
            examples: how many examples the tokens are from.
            scale: see ``g``.
        """
        finite, g = finite_or_zero(for_gram(g))
        total = self.values["output_moment"]
        if total.ndim == 1:
            total += (scale * g.float()).square_().sum(0)
        else:
            self._add_gram("output_moment", g, scale)
        self._count(finite, g.shape[0], examples)

    @_in_full_precision
    def add_weighted_(self, x: Tensor, g: Tensor, scale: float = 1.0) -> None:
        """Add one step's inputs, each token weighted by its squared gradient ``‖g‖²``.

        A step that is not finite adds nothing.

        Args:
            x: ``(tokens, in)`` what the layer read.
            g: ``(tokens, out)``; times ``scale`` the gradients of the summed loss there.
            scale: see ``g``.
        """
        norm = scale * g.float().norm(dim=1, keepdim=True)
        finite, scaled = finite_or_zero(x.float() * norm)
        norm = torch.where(finite, norm, 0.0)
        self._add_gram("weighted_moment", scaled)
        self.values["weighted_sum"] += (norm.mT @ scaled).squeeze(0)
        self.values["weight"] += norm.square().sum()

    @_in_full_precision
    def add_fisher_(
        self, x: Tensor, g: Tensor, scale: float = 1.0, *, examples: int | None = None
    ) -> None:
        """Add one step's per-example squared weight gradients, summed over either axis.

        With ``J_b = Σ_t g_bt x_btᵀ`` the gradient of example ``b``'s loss, adds
        ``Σ_b Σ_i J_b[i, :]²`` to ``input_fisher`` and ``Σ_b Σ_j J_b[:, j]²`` to
        ``output_fisher``. A step that is not finite is counted as skipped and adds nothing.

        Args:
            x: ``(examples, length, in)`` what the layer read, finite at padding.
            g: ``(examples, length, out)``, zero at padding; times ``scale`` the gradients of the
                summed loss.
            scale: see ``g``.
            examples: how many to count; by default the leading size.

        Cost:
            ``2·examples·length²·(in + out)`` operations per sum while ``length`` is below
            ``in·out/(in + out)``, else ``2·examples·length·in·out``; no ``(out, in)`` gradient
            is stored for more than one example.
        """
        x, g = x.float(), g.float() * scale
        finite = g.sum().isfinite() & x.sum().isfinite()
        x, g = torch.where(finite, x, 0.0), torch.where(finite, g, 0.0)
        # Σ_j J[i, j]² is Σ_i of the transposed gradient: one function serves both axes
        for name, pair in (("input_fisher", (x, g)), ("output_fisher", (g, x))):
            if name in self.values:
                self.values[name] += per_example_squares(*pair)
        if "output_moment" not in self.values:
            counted = g.shape[0] if examples is None else examples
            self._count(finite, g.shape[0] * g.shape[1], counted)

    def add_rows_(self, rows: Tensor) -> None:
        """Count the rows that were read from a table, given by their numbers ``(tokens, 1)``."""
        count = self.values["token_count"]
        count += torch.bincount(rows.reshape(-1), minlength=len(count))
        self._count(torch.ones((), dtype=torch.bool, device=rows.device), rows.shape[0], 0)

    @_in_full_precision
    def add_row_gradients_(
        self, rows: Tensor, g: Tensor, examples: int, scale: float = 1.0
    ) -> None:
        """Add one step's squared gradients to the rows that were read.

        A step with a gradient that is not finite is counted as skipped and adds nothing.

        Args:
            rows: ``(tokens, 1)`` their numbers.
            g: ``(tokens, width)``; times ``scale`` the gradients of the summed loss.
            examples: how many examples the tokens are from.
            scale: see ``g``.
        """
        finite, g = finite_or_zero(g.to(torch.float32))
        squares = (scale * g.norm(dim=1)).square()
        self.values["token_fisher"].index_add_(0, rows.reshape(-1), squares)
        self._count(finite, g.shape[0], examples)

    def _count(self, finite: Tensor, tokens: int, examples: int) -> None:
        self.tokens += finite * tokens
        self.examples += finite * examples
        self.skipped += ~finite

    def _add_gram(self, name: str, x: Tensor, scale: float = 1.0) -> None:
        add_offloaded_gram_(self.values[name], x, scale, self.arriving)

    def beside_(self, device: Device) -> None:
        """Move what is not offloaded to the device of the layer, after it came from a file."""
        if self.tokens.device != device:
            self.values |= {k: v.to(device) for k, v in self.values.items() if v.ndim < 2}
            self.tokens, self.examples, self.skipped = (x.to(device) for x in self._counts())

    def merge_(self, other: "Sums") -> None:
        """Add everything ``other`` has seen."""
        for name, value in self.values.items():
            value += other.values[name].to(value)
        for mine, theirs in zip(self._counts(), other._counts(), strict=True):
            mine += theirs.to(mine)

    def moment(
        self, name: str, dtype: torch.dtype | None = None, device: Device | None = None
    ) -> Tensor:
        """Return one sum, by default as it is held; a symmetric one with both triangles."""
        value = self.values[name].to(device)
        return symmetric(value, dtype) if value.ndim == 2 else converted(value, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of memory the sums take."""
        return sum(value.nbytes for value in self.values.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums and counts as one flat dict of tensors, copied to the CPU."""
        return {name: value.to("cpu", copy=True) for name, value in self.named_tensors().items()}

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the sums and counts themselves, by the names of :meth:`state_dict`."""
        counts = {"tokens": self.tokens, "examples": self.examples, "skipped": self.skipped}
        return self.values | counts

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], device: Device | None) -> "Sums":
        """Return the sums that :meth:`state_dict` described, on ``device``."""
        held = {name: _packed(value).to(device, copy=True) for name, value in state.items()}
        counts = [held.pop(name) for name in ("tokens", "examples", "skipped")]
        return cls(held, *counts)

    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens, self.examples, self.skipped


def _packed(value: Tensor) -> Tensor:
    """Return a sum as it is held; before version 0.2 symmetric ones were squares."""
    return packed(value) if value.ndim == 2 and len(value) > 1 else value


def _dtype(name: str) -> torch.dtype:
    return torch.int64 if name == "token_count" else torch.float32


def _over_tokens(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float32)  # low-precision sums stall


@dataclass
class Statistics:
    """Statistics of every observed layer: sums over its inputs and its output gradients.

    Layers that read the same tensor (query, key, value) share one input moment: ``source``
    names the layer whose entry in ``inputs`` serves them all.

    Attributes:
        inputs: sums over what was read, one per distinct tensor.
        outputs: sums over gradients at the output, one per layer.
        source: layer name to the key in ``inputs``.
        steps: training steps observed.
        skipped: steps whose loss was not finite; nothing of them was added.
        tokens: tokens observed, padding excluded.
    """

    inputs: dict[str, Sums] = field(default_factory=dict)
    outputs: dict[str, Sums] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    skipped: int = 0
    tokens: int = 0

    def of(self, name: str, kinds: Iterable[str]) -> Sums:
        """Return one layer's sums, input and output side together, not copied.

        Args:
            name: an observed layer.
            kinds: the statistics that must be there.

        Raises:
            ObservationError: if the layer was never seen, or one of ``kinds`` is missing.
        """
        kinds = tuple(kinds)
        read = self.inputs.get(self.source.get(name, name))
        gave = self.outputs.get(name)
        parts = [sums for sums in (read, gave) if sums is not None]
        values = {key: value for sums in parts for key, value in sums.values.items()}
        missing = [kind for kind in kinds if kind not in values]
        if missing:
            watched = sorted(set(self.source) | set(self.outputs))
            raise ObservationError(
                f"layer {name!r} needs {', '.join(missing)}, which was not observed; "
                f"observed layers nearest to it: {nearest(name, watched) or 'none'}"
            )
        tokens = parts[0].tokens if parts else torch.zeros((), dtype=torch.int64)
        examples = gave.examples if gave is not None else torch.zeros_like(tokens)
        seen = {"input": read, "output": gave}
        for side, sums in seen.items():
            needed = any(kind in (sums.values if sums else ()) for kind in kinds)
            if needed and sums is not None and not (sums.tokens + sums.examples).item():
                raise ObservationError(
                    f"layer {name!r} was never seen at its {side} in {self.steps} observed "
                    "steps; leave it out with exclude=, or observe steps that use it"
                )
        return Sums(values, tokens, examples, torch.zeros_like(tokens))

    @property
    def nbytes(self) -> int:
        """Bytes of memory the sums take."""
        return sum(sums.nbytes for sums in (*self.inputs.values(), *self.outputs.values()))

    @property
    def num_skipped(self) -> int:
        """Steps of which some layer, or all, had to be left out as not finite."""
        layers = [sums.skipped.item() for sums in (*self.inputs.values(), *self.outputs.values())]
        return self.skipped + int(max(layers, default=0))

    def figures(self) -> dict[str, int]:
        """Return how many steps and tokens were observed, for a report."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "skipped": self.num_skipped,
            "bytes": self.nbytes,
        }

    def merge_(self, other: "Statistics") -> None:
        """Add everything ``other`` has seen: another process, run or share of the data.

        Raises:
            ObservationError: if the two watched different layers, shared them differently, or
                hold different kinds; nothing is added then.
        """
        read, theirs = (x.source or {name: name for name in x.outputs} for x in (self, other))
        if read and theirs and read != theirs:
            name = min(set(read.items()) ^ set(theirs.items()))[0]
            raise ObservationError(
                f"statistics of different layers cannot be merged: {name!r} reads the tensor of "
                f"{read.get(name)!r} here and of {theirs.get(name)!r} there"
            )
        for held, added in ((self.inputs, other.inputs), (self.outputs, other.outputs)):
            for name in held.keys() & added.keys():
                kinds = held[name].values.keys() ^ added[name].values.keys()
                if kinds:
                    raise ObservationError(
                        f"statistics of layer {name!r} cannot be merged: "
                        f"{', '.join(sorted(kinds))} was observed in one of them only"
                    )
        self.source |= other.source
        for held, added in ((self.inputs, other.inputs), (self.outputs, other.outputs)):
            for name, sums in added.items():
                if name in held:
                    held[name].merge_(sums)
                else:
                    held[name] = Sums.from_state(sums.state_dict(), sums.tokens.device)
        self.steps += other.steps
        self.skipped += other.skipped
        self.tokens += other.tokens

    def settle_(self) -> None:
        """Add what is on its way to sums in host memory; waits once for each of the devices."""
        settle_([sums.arriving for sums in (*self.inputs.values(), *self.outputs.values())])

    def clear_(self) -> None:
        """Reset to nothing observed."""
        for held in (self.inputs, self.outputs, self.source):
            held.clear()
        self.steps = self.skipped = self.tokens = 0

    def state_dict(self) -> dict[str, object]:
        """Return all sums and counts in plain types and tensors."""
        return {
            "inputs": {name: sums.state_dict() for name, sums in self.inputs.items()},
            "outputs": {name: sums.state_dict() for name, sums in self.outputs.items()},
            "source": dict(self.source),
            "counts": [self.steps, self.skipped, self.tokens],
        }

    def load_state_dict(self, state: Mapping[str, object], device: Device) -> None:
        """Restore what :meth:`state_dict` returned, on ``device``.

        Raises:
            CheckpointError: if ``state`` is not such a description.
        """
        try:
            inputs, outputs = (
                {name: Sums.from_state(sums, device) for name, sums in state[side].items()}  # type: ignore[attr-defined]
                for side in ("inputs", "outputs")
            )
            source = dict(state["source"])  # type: ignore[call-overload]
            steps, skipped, tokens = map(int, state["counts"])  # type: ignore[call-overload]
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"no statistics can be read from this state: {error!r}"
            ) from error
        self.inputs, self.outputs, self.source = inputs, outputs, source
        self.steps, self.skipped, self.tokens = steps, skipped, tokens
