"""Distillation losses: logits, hidden states, and relations between tokens (MiniLM)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.distill.functional import (
    relation_kl_divergence,
    relative_squared_error,
    soft_kl_divergence,
)
from lrcompress.errors import LayerError, NoMatchError, SettingError, ShapeError, nearest
from lrcompress.schedules import Piecewise

LOGITS = ".logits"  # their key among features; no submodule can have this name
Features = Mapping[str, Tensor]
Weight = float | dict[float | str, Any]


class DistillationLoss(ABC):
    """Base class of distillation losses: one weighted term that compares student and teacher.

    A subclass names the submodules whose outputs it compares (:meth:`layers`) and computes the
    term from them (:meth:`__call__`).

    Args:
        weight: what the term is multiplied by, not negative: a number, or a schedule as a
            mapping from points to numbers, ``{0: 0.0, 0.5: 1.0}``, linear between them; a pair
            in place of a number is a jump, ``{"epoch:3": [1.0, 0.0]}``. Where it is 0, the
            term costs nothing.

    Attributes:
        weight: the schedule, which the term is multiplied by in each step.
        name: the term is logged as ``distill_<name>``.
        needs_mask: whether a batch without its padding mask is an error.

    Raises:
        SettingError: if the weight is neither a finite number from 0 nor a schedule of them.
    """

    name: str
    needs_mask = True

    def __init__(self, weight: Weight) -> None:
        self.weight = Piecewise.parse(weight, f"weight of {type(self).__name__}")

    @abstractmethod
    def layers(self, model: nn.Module, prefix: str = "") -> tuple[str, ...]:
        """Return the names of the submodules of ``model`` whose outputs are compared.

        ``LOGITS`` among them stands for the logits.

        Args:
            model: the student, or the part of the teacher that is called.
            prefix: put in front of every name, before patterns are matched.

        Returns:
            The names, each with the prefix.

        Raises:
            NoMatchError: if there are none.
        """

    @abstractmethod
    def __call__(self, student: Features, teacher: Features, mask: Tensor | None) -> Tensor:
        """Return the loss, a scalar, not yet multiplied by its weight.

        Args:
            student: outputs by the name of the submodule, logits under ``LOGITS``.
            teacher: the same of the teacher, without a graph.
            mask: ``(batch, tokens)`` of the batch, zero where it is padding; None if nothing
                is padded.

        Raises:
            ShapeError: if student and teacher, or features and mask, do not fit together.
        """

    def check(self, student: nn.Module, teacher: nn.Module, prefix: str = "") -> None:
        """Check once that student and teacher fit, before the first step in which the term counts.

        Args:
            student: the whole student.
            teacher: the part of the teacher that is called.
            prefix: what that part is called in the student.

        Raises:
            ShapeError: if :meth:`layers` finds other layers in the teacher than in the student.
            NoMatchError: if :meth:`layers` finds none in one of them.
        """
        mine, theirs = self.layers(student), self.layers(teacher, prefix)
        if mine != theirs:
            raise ShapeError(
                f"{type(self).__name__} compares each layer with the same one of the teacher, "
                f"but the student has {_counted(mine)} and the teacher {_counted(theirs)}; "
                "take a teacher of the same depth, or choose layers that both have"
            )


class Logits(DistillationLoss):
    """Distillation of logits: ``T²·KL(softmax(teacher / T) ‖ softmax(student / T))``.

    The mean over examples; where there are logits for every token, over the real tokens. With a
    single logit, as in regression, it is the mean squared error.

    Args:
        weight: a number or a schedule.
        temperature: ``T``, above 0; the higher, the more unlikely classes count.

    Raises:
        SettingError: if the weight or the temperature is outside what it may be.
        ShapeError: from a call, if student and teacher have logits of different shapes.

    Shapes:
        logits ``(batch, classes)`` or ``(batch, tokens, classes)``; of question answering, start
        and end, ``(batch, 2, tokens)``. The loss is ``()``, in float32.

    Source:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", 2015,
        arXiv 1503.02531.

    Example:
        >>> student = {LOGITS: torch.zeros(1, 2)}
        >>> teacher = {LOGITS: torch.tensor([[9.0, 1.0]]).log()}  # at T = 2: 3/4 and 1/4
        >>> loss = Logits(temperature=2.0)(student, teacher, None)
        >>> round(float(loss), 4)  # 4·(3/4·ln(3/2) + 1/4·ln(1/2))
        0.5232
    """

    name = "logits"
    needs_mask = False

    def __init__(self, weight: Weight = 0.5, temperature: float = 2.0) -> None:
        super().__init__(weight)
        if not 0 < temperature < float("inf"):
            raise SettingError(f"temperature must be above 0, such as 2.0, got {temperature!r}")
        self.temperature = temperature

    def layers(self, model: nn.Module, prefix: str = "") -> tuple[str, ...]:  # noqa: ARG002
        return (LOGITS,)

    def __call__(self, student: Features, teacher: Features, mask: Tensor | None) -> Tensor:
        mine, theirs = student[LOGITS], teacher[LOGITS]
        if mine.shape != theirs.shape:
            raise ShapeError(
                f"the student's logits are {tuple(mine.shape)}, the teacher's "
                f"{tuple(theirs.shape)}: take a teacher with the same number of labels"
            )
        return soft_kl_divergence(mine, theirs, self.temperature, mask)


class HiddenStates(DistillationLoss):
    """Distillation of hidden states: the mean over layers of ``‖H_s − H_t‖² / ‖H_t‖²``.

    Every layer is compared with the same one of the teacher, as it can be where layers were
    factored in place. The norms are over all real positions of a batch; padding is left out.
    Dividing by the teacher's size gives every layer the same weight, and makes the loss
    independent of the scale of its features.

    Args:
        weight: a number or a schedule.
        layers: patterns of the submodules whose outputs are compared, such as
            ``*.encoder.layer.*``; by default the elements of the outermost module lists: the
            blocks of a transformer.

    Raises:
        SettingError: if the weight is neither a finite number from 0 nor a schedule of them.
        NoMatchError: in the first step, if a pattern matches no submodule, or if there are no
            numbered blocks.
        ShapeError: in a step, if the teacher has other layers or another width, or if the mask
            does not fit.

    Shapes:
        each layer's output ``(batch, tokens, width)``, or any shape if nothing is padded; of
        several outputs the first tensor. The loss is ``()``, in float32.

    Source:
        M. Ben Noach, Y. Goldberg, "Compressing pre-trained language models by matrix
        decomposition", AACL 2020: distilling features after a decomposition.

    Example:
        >>> student = {"blocks.0": torch.full((1, 2, 3), 3.0)}
        >>> teacher = {"blocks.0": torch.full((1, 2, 3), 2.0)}
        >>> float(HiddenStates()(student, teacher, None))  # (3 − 2)² / 2²
        0.25
    """

    name = "hidden_states"

    def __init__(self, weight: Weight = 1.0, layers: list[str] | None = None) -> None:
        super().__init__(weight)
        self.patterns = [layers] if isinstance(layers, str) else layers

    def layers(self, model: nn.Module, prefix: str = "") -> tuple[str, ...]:
        if self.patterns is None:
            found = tuple(f"{prefix}{name}" for name in _blocks(model))
            if not found:
                names = [f"{prefix}{name}" for name, _ in model.named_children()]
                raise NoMatchError(
                    f"HiddenStates finds no numbered blocks in {type(model).__name__}; choose "
                    f"submodules with layers=, for example {nearest('', names) or 'none there'}"
                )
            return found
        names = [f"{prefix}{name}" for name, _ in model.named_modules() if name]
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise NoMatchError(
                    f"HiddenStates: layers={pattern!r} matches none of the {len(names)} "
                    f"submodules; nearest: {nearest(pattern, names)}"
                )
        return tuple(n for n in names if any(fnmatchcase(n, p) for p in self.patterns))

    def __call__(self, student: Features, teacher: Features, mask: Tensor | None) -> Tensor:
        return torch.stack([self._gap(name, student, teacher, mask) for name in student]).mean()

    @staticmethod
    def _gap(name: str, student: Features, teacher: Features, mask: Tensor | None) -> Tensor:
        mine, theirs = student[name], teacher[name]
        if mine.shape != theirs.shape:
            raise ShapeError(
                f"layer {name!r} gives {tuple(mine.shape)} in the student and "
                f"{tuple(theirs.shape)} in the teacher: take a teacher of the same width"
            )
        return relative_squared_error(mine, theirs, mask)


# Names of the query, key and value projections side by side; or of all three in one.
PROJECTIONS: tuple[tuple[str, ...], ...] = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("c_attn",),
)
KINDS = {
    "query_key": ("query", "key"),
    "query": ("query", "query"),
    "key": ("key", "key"),
    "value": ("value", "value"),
}


class Relations(DistillationLoss):
    """MiniLM's loss on one attention layer: ``KL(softmax(Q_t K_tᵀ/√d) ‖ softmax(Q_s K_sᵀ/√d))``.

    The mean over heads and real positions, and the sum over kinds: of queries with keys, of
    values with values. ``d`` is the width of a head. Nothing depends on the width, so the
    teacher may have another, with as many heads.

    Args:
        weight: a number or a schedule.
        layer: which attention layer, counted as in a list: -1 is the last.
        kinds: of ``query_key``, ``value``, ``query``, ``key``.
        heads: how many; by default what the model's config says.
        projections: the names of the query, key and value submodules side by side in an
            attention layer, or the name of one that gives all three, where they are not known.

    Raises:
        SettingError: if an argument is outside what it may be; in the first step, if no config
            says how many heads there are.
        NoMatchError: in the first step, if there are no such projections, or no such layer.
        ShapeError: in a step, if the teacher has other layers or other numbers of heads, or if
            the heads or the mask do not fit.

    Shapes:
        each projection ``(batch, tokens, heads·d)``, or all three side by side as
        ``(batch, tokens, 3·heads·d)``. The loss is ``()``, in float32.

    Cost:
        ``O(batch·heads·tokens²)`` memory for every kind, as attention without a fused kernel.

    Source:
        W. Wang et al., "MiniLM: deep self-attention distillation for task-agnostic compression
        of pre-trained transformers", NeurIPS 2020, arXiv 2002.10957.

    Example:
        >>> features = {name: torch.ones(1, 4, 8) for name in ("q_proj", "k_proj", "v_proj")}
        >>> float(Relations(heads=2)(features, features, None))
        0.0
    """

    name = "relations"

    def __init__(
        self,
        weight: Weight = 1.0,
        layer: int = -1,
        kinds: tuple[str, ...] | list[str] = ("query_key", "value"),
        heads: int | None = None,
        projections: list[str] | None = None,
    ) -> None:
        super().__init__(weight)
        for kind in kinds:
            if kind not in KINDS:
                raise SettingError(f"unknown kind {kind!r}; nearest: {nearest(kind, KINDS)}")
        if not kinds:
            raise SettingError(f"kinds is empty; give some of {', '.join(KINDS)}")
        if heads is not None and heads < 1:
            raise SettingError(f"heads must be at least 1, got {heads!r}")
        if projections is not None and len(projections) not in (1, 3):
            raise SettingError(
                f"projections are three names, or one of all three, got {projections!r}"
            )
        self.layer, self.kinds, self.heads = layer, tuple(kinds), heads
        self._found = heads
        self.known = PROJECTIONS if projections is None else (tuple(projections),)

    def layers(self, model: nn.Module, prefix: str = "") -> tuple[str, ...]:
        found = list(self._attention(model))
        if not found:
            known = "; ".join("|".join(names) for names in self.known)
            raise NoMatchError(
                f"Relations finds no query, key and value projections in {type(model).__name__} "
                f"(it looks for {known}); name them with projections="
            )
        if not -len(found) <= self.layer < len(found):
            raise NoMatchError(
                f"Relations: layer={self.layer} of {len(found)} attention layers; "
                f"they go from 0 to {len(found) - 1}, -1 is the last"
            )
        return tuple(f"{prefix}{name}" for name in found[self.layer])

    def _attention(self, model: nn.Module) -> Iterator[tuple[str, ...]]:
        """Yield the names of the projections of every attention layer."""
        for name, module in model.named_modules():
            children = dict(module.named_children())
            for names in self.known:
                if children.keys() >= set(names):
                    yield tuple(f"{name}.{one}" if name else one for one in names)

    def check(self, student: nn.Module, teacher: nn.Module, prefix: str = "") -> None:
        super().check(student, teacher, prefix)
        if self.heads is not None:
            return
        mine, theirs = (_heads(model) for model in (student, teacher))
        if mine is None:
            raise SettingError(
                f"Relations finds no number of heads in a config of {type(student).__name__}; "
                "give it as heads="
            )
        if mine != theirs:
            raise ShapeError(
                f"Relations compares head by head: the student has {mine}, the teacher "
                f"{theirs or 'no config that says'}; give heads= that divide both widths"
            )
        self._found = mine

    def __call__(self, student: Features, teacher: Features, mask: Tensor | None) -> Tensor:
        mine, theirs = self._parts(student), self._parts(teacher)
        heads = self._found
        assert heads is not None, "check comes first"
        terms = []
        for kind in self.kinds:
            one, other = KINDS[kind]
            counts = self._counts(mine, one, other, heads)
            if counts != self._counts(theirs, one, other, heads):
                raise ShapeError(
                    f"Relations: keys and values have other numbers of heads in the teacher, "
                    f"{self._counts(theirs, one, other, heads)} in place of {counts}"
                )
            pairs = [(part[one], part[other]) for part in (mine, theirs)]
            terms.append(relation_kl_divergence(pairs[0], pairs[1], counts, mask))
        return torch.stack(terms).sum()

    @staticmethod
    def _parts(features: Features) -> dict[str, Tensor]:
        outputs = list(features.values())
        parts = outputs if len(outputs) == 3 else outputs[0].chunk(3, dim=-1)
        return dict(zip(("query", "key", "value"), parts, strict=True))

    @staticmethod
    def _counts(parts: Mapping[str, Tensor], one: str, other: str, heads: int) -> tuple[int, int]:
        """Return the heads of two parts; keys and values may have fewer than queries.

        Raises:
            ShapeError: if the features cannot be shared out among so many heads.
        """
        width = parts["query"].shape[-1]
        if width % heads:
            raise ShapeError(f"Relations: {width} features cannot be {heads} heads; give heads=")
        size = width // heads
        return parts[one].shape[-1] // size, parts[other].shape[-1] // size


def _blocks(model: nn.Module) -> Iterator[str]:
    """Yield the elements of the outermost module lists, those without parameters left out."""
    outer = ""
    for name, module in model.named_modules():
        if (outer and name.startswith(outer)) or not isinstance(module, nn.ModuleList):
            continue
        outer = f"{name}."
        for index, block in enumerate(module):
            if next(block.parameters(), None) is not None:
                yield f"{outer}{index}"


def _heads(model: nn.Module) -> int | None:
    """Return what the first config in the model says about heads."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for key in ("num_attention_heads", "num_heads", "n_heads", "n_head"):
            heads = getattr(config, key, None)
            if isinstance(heads, int):
                return heads
    return None


def _counted(names: Sequence[str]) -> str:
    if not names:
        return "none"
    if len(names) == 1:
        return f"1 layer, {names[0]}"
    return f"{len(names)} layers, {names[0]} to {names[-1]}"


def first_tensor(output: object, name: str) -> Tensor:
    """Return the output of a submodule, or the first tensor where it gives several.

    Raises:
        LayerError: if there is no tensor.
    """
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output
    if isinstance(parts, tuple | list) or isinstance(output, Mapping):
        for part in parts:  # type: ignore[attr-defined]
            if isinstance(part, Tensor):
                return part
    raise LayerError(
        f"layer {name!r} gives a {type(output).__name__} without a tensor; choose others"
    )
