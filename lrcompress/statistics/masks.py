"""Padding masks: where a batch has its own, and which tokens of a layer's input are real."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import ObservationError, SettingError, ShapeError

MASK = "attention_mask"
DECODER_MASK = "decoder_attention_mask"
LABELS = "labels"
IGNORED = -100  # the label of what is not predicted
# A key (also of a mapping within: "text.attention_mask"), an index, or a function of the batch.
MaskSource = str | int | Callable[[Any], Tensor] | None
_AXES = (2, 3)
_LAYOUTS = "mask must be (examples, length) or (examples, choices, length)"
INVERTED = "~"  # before a key: nonzero marks padding, as in torch's key_padding_mask


def check_mask(mask: object) -> None:
    """Check that a mask can be looked up in batches.

    Raises:
        SettingError: if it is no key, index, function or None.
    """
    if isinstance(mask, bool) or not (
        mask is None or isinstance(mask, str | int) or callable(mask)
    ):
        raise SettingError(
            "mask is a key of the batch ('attention_mask', 'labels', '~padding_mask' where nonzero "
            f"marks padding), an index, a function of the batch, or None; got {mask!r}"
        )


def batch_mask(
    batch: Any,
    mask: MaskSource,
    owner: str,
    *,
    check_values: bool = True,
    check_shape: bool = True,
) -> tuple[Tensor | None, str | None]:
    """Return a batch's padding mask, or the reason why an expected one is missing.

    Args:
        batch: as the training step gets it.
        mask: its key, a dotted key for a mapping within, its index in a sequence, or a function
            of the batch. ``"~key"`` is a mask whose nonzeros mark padding, as in torch's
            ``key_padding_mask``, or as what is added to attention scores, 0 and very negative;
            ``"labels"`` are those of tokens, -100 where there is none.
        owner: for the reason.
        check_values: whether to check that the mask holds zeros and ones. An accelerator is waited
            for then.
        check_shape: whether to check that it has the axes that :class:`Mask` takes.

    Returns:
        The mask, nonzero where there is a token, and None; or None and the reason.

    Raises:
        ShapeError: if it has another number of axes.
        ObservationError: if what is found is no tensor, or holds other values.
        SettingError: if ``mask`` is none of these.

    Example:
        >>> batch_mask({"labels": torch.tensor([[-100, 0, 7]])}, "labels", "observe")[0]
        tensor([[False,  True,  True]])
    """
    check_mask(mask)
    if mask is None:
        return None, None
    inverted = isinstance(mask, str) and mask.startswith(INVERTED)
    key = mask[len(INVERTED) :] if isinstance(mask, str) and inverted else mask
    try:
        found = key if callable(key) else _looked_up(batch, key)
    except LookupError:
        return None, (
            f"{owner} leaves padding out by the batch's {key!r}, which this batch does not have "
            f"({_contents(batch)}); name another with mask=, or pass mask=None if nothing is padded"
        )
    if callable(key):  # whose own errors are the user's to see
        found = key(batch)
    if not isinstance(found, Tensor):
        raise ObservationError(
            f"{owner} expected a tensor as the padding mask (mask={mask!r}), got "
            f"{type(found).__name__}; the batch has {_contents(batch)}"
        )
    if check_shape:
        _check_axes(found, mask, batch, owner)
    if isinstance(key, str) and key.split(".")[-1] == LABELS:
        found = found != IGNORED
    if check_values:
        _check_values(found, mask, batch, owner)
    return (found == 0 if inverted else found), None


def _check_axes(
    found: Tensor, mask: MaskSource, batch: Any, owner: str, way_out: str | None = None
) -> None:
    """Check that what was found has the axes of a mask.

    Raises:
        ShapeError: if it has not; with the entries of the batch that could be one.
    """
    if found.ndim in _AXES:
        return
    like = _like_masks(batch)
    way_out = way_out or (
        f"nearest: {' or '.join(like)}"
        if like
        else f"give a function such as lambda batch: {_example(batch)} != 0, or mask=None if "
        "nothing is padded"
    )
    raise ShapeError(
        f"{owner}: {_LAYOUTS}, and mask={mask!r} gives {_kind(found)}; the batch has "
        f"{_contents(batch)}; {way_out}"
    )


def _like_masks(batch: Any) -> list[str]:
    """Return in code the entries of a batch that have the axes and the values of a mask."""
    if isinstance(batch, Mapping):
        entries = list(batch.items())
    else:
        listed = isinstance(batch, Sequence) and not isinstance(batch, str)
        entries = list(enumerate(batch)) if listed else []
    return [
        f"mask={key!r}"
        for key, entry in entries
        if isinstance(entry, Tensor)
        and entry.ndim in _AXES
        and bool(((entry == 0) | (entry == 1)).all())
    ]


def _check_values(
    found: Tensor, mask: MaskSource, batch: Any, owner: str, way_out: str | None = None
) -> None:
    """Check that what was found holds zeros and ones, and is no table of token ids.

    Raises:
        ObservationError: if it does not.
    """
    if found.dtype == torch.bool:
        return
    odd = found[(found != 0) & (found != 1)]
    if not len(odd):
        return
    inverted = isinstance(mask, str) and mask.startswith(INVERTED)
    added = found.is_floating_point() and bool((found <= 0).all())
    if inverted and added:
        return
    shown = ", ".join(f"{value:g}" for value in odd[:3].tolist())
    one, zero = ("padding", "tokens") if inverted else ("tokens", "padding")
    way_out = way_out or (
        "it looks like what is added to scores, nonzero at padding: name it as mask='~key'"
        if added
        else f"name another with mask=, or a function such as lambda batch: {_example(batch)} != 0"
    )
    raise ObservationError(
        f"{owner}: a padding mask is 1 at {one} and 0 at {zero}, and mask={mask!r} gives "
        f"{_kind(found)} with {shown}; the batch has {_contents(batch)}; {way_out}"
    )


def _example(batch: Any) -> str:
    """Return in code how token ids may be taken from a batch of this kind."""
    return "batch['input_ids']" if isinstance(batch, Mapping) else "batch[0]"


def _looked_up(batch: Any, key: str | int) -> Any:
    if isinstance(batch, Mapping) and key in batch:
        return batch[key]
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        first, _, rest = str(key).partition(".")
        found = batch[int(first)] if first.lstrip("-").isdigit() else None
    else:
        first, _, rest = str(key).partition(".")
        found = batch.get(first) if isinstance(batch, Mapping) and rest else None
    if found is None:
        raise LookupError(key)
    return _looked_up(found, rest) if rest else found


def _contents(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"keys are {', '.join(map(str, batch))}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        entries = (f"mask={i}: {_kind(entry)}" for i, entry in enumerate(batch))
        return f"a {type(batch).__name__} of {', '.join(entries)}"
    return type(batch).__name__


def _kind(entry: Any) -> str:
    if isinstance(entry, Tensor):
        return f"{str(entry.dtype).removeprefix('torch.')} {tuple(entry.shape)}"
    return type(entry).__name__


def batch_decoder_mask(batch: Any, owner: str, *, check_values: bool = True) -> Tensor | None:
    """Return the padding mask of a decoder's own input, or None if the batch has none.

    That is its ``decoder_attention_mask``, or where its ``labels`` are not -100: a decoder reads
    at each position the label of the one before. ``owner`` and ``check_values`` are as for
    :func:`batch_mask`.

    Raises:
        ShapeError: if the mask has other axes than :class:`Mask` takes.
        ObservationError: if it holds other values than zeros and ones.

    Example:
        >>> batch_decoder_mask({"labels": torch.tensor([[7, 8], [9, -100]])}, "observe").tolist()
        [[True, True], [True, False]]
    """
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get(DECODER_MASK), batch.get("labels")
    if isinstance(mask, Tensor):
        given = mask, DECODER_MASK, batch, owner, "a decoder's mask goes by this name"
        _check_axes(*given)
        if check_values:
            _check_values(*given)
        return mask
    return labels != IGNORED if isinstance(labels, Tensor) and labels.ndim == 2 else None


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a layer's input, and so those of its output, lie.

    Attributes:
        real: flat indices of those that are no padding; None if none is.
        sequence_first: whether the axes are ``(length, examples, features)``.
        rows: ``(rows, length)`` of the mask where both are one axis; else None.
        groups: rows of the mask that make an example, as the choices of a question do.
    """

    real: Tensor | None = None
    sequence_first: bool = False
    rows: tuple[int, int] | None = None
    groups: int = 1

    def of(self, x: Tensor) -> Tensor:
        """Return the real tokens ``(tokens, features)`` of ``x`` ``(..., features)``."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.real is None else flat[self.real]

    def by_example(self, x: Tensor) -> Tensor:
        """Return ``x`` ``(..., features)`` as ``(examples, length, features)``, padding zero."""
        if self.real is not None:
            keep = torch.zeros(x[..., 0].numel(), dtype=torch.bool, device=x.device)
            keep[self.real] = True
            x = torch.where(keep.view(*x.shape[:-1], 1), x, 0)
        if self.rows is not None:
            x = x.reshape(*self.rows, x.shape[-1])
        elif self.sequence_first:
            x = x.transpose(0, 1)
        return x.reshape(len(x) // self.groups, -1, x.shape[-1])


class Mask:
    """A padding mask, and what it says of tensors of other layouts and lengths.

    Args:
        mask: ``(examples, length)``, nonzero where there is a token; or ``(examples, choices,
            length)``, of a model that takes every choice for a row.

    Raises:
        ShapeError: if it has another number of axes.
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.ndim not in _AXES:
            raise ShapeError(f"{_LAYOUTS}, got shape {tuple(mask.shape)}")
        self.groups = mask.shape[1] if mask.ndim == 3 else 1
        self.grid = mask.reshape(-1, mask.shape[-1]) != 0
        self._fitted: dict[object, Tokens | None] = {}

    def fit(
        self,
        x: Tensor,
        *,
        sequence_first: bool = False,
        layer: str = "layer",
        owner: str = "observe",
    ) -> Tokens:
        """Return which tokens of ``x`` are real.

        It can where the leading axes are those of the mask; in either order; both in one; with
        others between, as heads; or cut to the columns that hold all tokens. What is one for all
        examples, and what has no tokens but a row an example, is taken whole.

        Args:
            x: ``(..., features)``.
            sequence_first: whether the layer is known to read ``(length, examples, features)``.
            layer: whose input it is, for the message.
            owner: who asks, for the message.

        Raises:
            ObservationError: if the mask cannot be laid over ``x``. Tables that are read by other
                numbers than tokens, such as positions, are taken whole.
        """
        key = x.shape[:-1], x.device, sequence_first
        if key not in self._fitted:
            self._fitted[key] = self._fit(*key)
        found = self._fitted[key]
        if found is None and x.is_floating_point():
            raise ObservationError(
                f"layer {layer!r} reads {tuple(x.shape)}, and the padding mask is for "
                f"{tuple(self.grid.shape)} tokens: {owner} cannot tell which are padding. Give "
                "mask= a function of the batch that returns a mask of the shape that layers read, "
                "leave the layer out with exclude=, or pass mask=None if nothing is padded"
            )
        return found or Tokens()

    def _fit(
        self, leading: torch.Size, device: torch.device, sequence_first: bool
    ) -> Tokens | None:
        rows, length = self.grid.shape
        if len(leading) == 2:
            # where both orders fit, the known one; else examples come first
            for turned in (True, False) if sequence_first else (False, True):
                cut = self._cut(leading[0] if turned else leading[1])
                if cut is not None and leading[1 if turned else 0] == rows:
                    real = _indices(cut.mT if turned else cut, device)
                    return Tokens(real, sequence_first=turned, groups=self.groups)
        cut = self._cut(leading.numel() // rows) if leading.numel() % rows == 0 else None
        if cut is not None and (len(leading) == 1 or cut.shape[1] == length):
            return self._flat(cut, device, turned=sequence_first and len(leading) == 1)
        if len(leading) < 2 or leading.numel() == rows or (leading[0] == 1 and rows > 1):
            return Tokens()
        return self._spread(leading, device) if len(leading) > 2 else None

    def _flat(self, grid: Tensor, device: torch.device, *, turned: bool) -> Tokens:
        """Return the tokens where both axes are one, or choices have one of their own."""
        if turned:
            places = torch.arange(grid.numel(), device=grid.device).view(grid.shape[::-1])
            return Tokens(places.mT[grid].to(device))
        return Tokens(_indices(grid, device), rows=tuple(grid.shape), groups=self.groups)  # type: ignore[arg-type]

    def _spread(self, leading: torch.Size, device: torch.device) -> Tokens | None:
        """Return the tokens where axes lie between or behind those of the mask, as heads do."""
        rows, length = self.grid.shape
        places = [axis for axis in range(1, len(leading)) if leading[axis] == length]
        if leading[0] != rows or not places:
            return None
        # of several, the last: heads mostly come before tokens
        shape = [rows, *(length if axis == places[-1] else 1 for axis in range(1, len(leading)))]
        spread = self.grid.reshape(shape).expand(leading)
        return Tokens(_indices(spread, device), groups=self.groups)

    def _cut(self, length: int) -> Tensor | None:
        """Return the columns that a tensor of that length has, if it was cut as batches are.

        That is to the longest example, or to the next multiple of 8 above it; from the left where
        the padding is there.
        """
        whole = self.grid.shape[1]
        if length == whole:
            return self.grid
        held = self.grid.any(0).nonzero()
        if length > whole or not len(held):
            return None
        first, last = int(held[0]), int(held[-1])
        for longest, part in (
            (last + 1, self.grid[:, :length]),
            (whole - first, self.grid[:, whole - length :]),
        ):
            if length in (longest, -(-longest // 8) * 8):
                return part
        return None


def _indices(grid: Tensor, device: torch.device) -> Tensor:
    return grid.reshape(-1).nonzero().squeeze(1).to(device)


def sequence_first(model: nn.Module) -> tuple[str, ...]:
    """Return prefixes of the names of layers that read ``(length, examples, features)``.

    These are those of ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``, unless
    made with ``batch_first=True``.
    """
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    blocks = {name: x for name, x in model.named_modules() if isinstance(x, kinds)}
    found = (name for name, block in blocks.items() if not block.self_attn.batch_first)
    return tuple(f"{name}." if name else "" for name in found)


def joined(parts: Iterable[tuple[Tensor, Tokens]]) -> Tensor:
    """Return the tokens of one tensor after another; of a single one without a further copy."""
    found = [tokens.of(x) for x, tokens in parts]
    return torch.cat(found) if len(found) > 1 else found[0]


def by_example(
    parts: Iterable[tuple[Tensor | None, Tensor, Tokens]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and gradients as ``(examples, length, features)``, padding zero.

    Uses that are not by example, of position embeddings for instance, come apart, as if they
    were examples of their own.

    Args:
        parts: a layer's input, its gradient at the output, and where their tokens lie, each use.
    """
    together: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for x, g, tokens in parts:
        assert x is not None
        pair = tokens.by_example(x), tokens.by_example(g)
        together.setdefault(len(pair[0]), []).append(pair)
    for pairs in together.values():
        xs, gs = zip(*pairs, strict=True)
        yield torch.cat(xs, 1), torch.cat(gs, 1)
