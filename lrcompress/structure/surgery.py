"""Replace layers in a model and its optimizers, with the optimizer state carried over."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer

from lrcompress.errors import LayerError, NoMatchError, nearest
from lrcompress.linalg import double, full_precision, least_squares
from lrcompress.nn import (
    LowRankLinear,
    LowRankSparseLinear,
    PivotedLinear,
    PrunedLinear,
    Replacement,
)
from lrcompress.statistics.views import view
from lrcompress.structure.low_bit_state import as_before, plain
from lrcompress.structure.schedule_free import position_at, without_positions

# Optimizer state that is linear in past gradients, and state that is quadratic in them.
_LINEAR = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
_SQUARED = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
_PAIRS = (("exp_avg", "exp_avg_sq"), ("grad_avg", "square_avg"))  # averages of g and of g²
# Kinds of layers that are not factored further, in words.
_MADE_BY = {
    "low_rank": "is low rank already",
    "pivoted": "is low rank already, in pivoted rows",
    "narrow_low_rank": "is low rank already, in a narrowed block",
    "narrow_pivoted": "is low rank already, in pivoted rows of a narrowed block",
    "kronecker": "is a sum of Kronecker products already",
    "low_rank_sparse": "is low rank plus sparse rows, which LoSparse made",
    "updated": "is frozen with an update, which DSEE made and merges at the end",
    "narrow": "has lost heads, which DSEE removed, or features, since its block was narrowed",
}


def check_kinds(
    model: nn.Module, names: Iterable[str], *, dense: bool = False, narrow: bool = False
) -> None:
    """Check that layers are of a kind that can be factored.

    Args:
        model: whose layers they are.
        names: of the layers.
        dense: whether they have to be dense.
        narrow: whether they may have lost features.

    Raises:
        LayerError: if one is neither dense nor low-rank, or is factored at all where it has to be
            dense.
    """
    for name in names:
        layer = model.get_submodule(name)
        takes = "dense" if dense else "dense or low-rank"
        able = isinstance(layer, LowRankLinear | PivotedLinear)
        able |= narrow and isinstance(layer, PrunedLinear)
        if isinstance(layer, Replacement) and (dense or not able):
            raise LayerError(
                f"layer {name!r} {_MADE_BY.get(layer.kind, f'is a {type(layer).__name__}')}; this "
                f"starts from {takes} layers: leave it out with exclude=, or make it dense with "
                "merge_dense first"
            )


def replace_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the layer called ``name`` by ``new``, wherever the same layer is used.

    Hooks of the layer's forward and backward pass go along, and their handles still remove them.
    What else was hung on a dense layer or its weight does not: a warning names it.

    Raises:
        NoMatchError: if there is no such layer.
    """
    try:
        old = model.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in model.named_modules()]
        raise NoMatchError(f"no layer {name!r}; nearest names: {nearest(name, known)}") from None
    lost = _left_behind(old) if isinstance(new, Replacement) else []
    if lost:
        warnings.warn(f"layer {name!r} is replaced, and {', '.join(lost)} with it", stacklevel=2)
    _share_hooks(old, new)
    for parent in list(model.modules()):
        # named_children would list a layer held twice by one parent only once
        for child in [child for child, module in parent._modules.items() if module is old]:
            setattr(parent, child, new)


# By which a module keeps its hooks; those of state dicts know parameters that are gone.
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks"),
)


def _share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let both modules keep their hooks in the same mappings, to which handles refer."""
    if old is new or not any(getattr(old, kept) for kept in _HOOKS):
        return
    for kept in _HOOKS:
        getattr(old, kept).update(getattr(new, kept))
        setattr(new, kept, getattr(old, kept))
    new._is_full_backward_hook = old._is_full_backward_hook


def _left_behind(layer: nn.Module) -> list[str]:
    """Return what others have hung on a dense layer that no layer in its place can have."""
    if isinstance(layer, Replacement):
        return []
    held, kind = vars(layer), type(layer)
    own = {"training", *getattr(kind, "__constants__", ()), *signature(kind.__init__).parameters}
    added = [key for key in held if key not in own and not key.startswith("_")]
    found = [f"its attribute {key!r}" for key in added]
    hooks = [*held["_state_dict_hooks"].values(), *held["_load_state_dict_pre_hooks"].values()]
    origins = [str(getattr(hook, "__module__", None)) for hook in hooks]
    if any(not origin.startswith("torch.distributed.") for origin in origins):  # not FSDP2's
        found.append("hooks of its state dict")
    weight = view(layer, table=True).parameters[0]
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        found.append("hooks of its weight's gradient")
    return found


Carry = Callable[[Sequence[Tensor], bool], list[Tensor]]
Successors = Mapping[int, Sequence[tuple[Tensor, str]]]


def carry_dense(left: Tensor, right: Tensor, transposed: bool) -> Carry:
    """Return a function that turns optimizer state of a dense weight into that of its factors.

    Gradients of the factors are ``∂L/∂right = leftᵀ ∂L/∂W`` and ``∂L/∂left = ∂L/∂W rightᵀ``, so
    a first moment carries over exactly: ``m_right = leftᵀ m_W``, ``m_left = m_W rightᵀ``. A second
    moment is carried as if the entries of ``∂L/∂W`` were independent:
    ``v_right = (left²)ᵀ v_W``, ``v_left = v_W (right²)ᵀ``.

    Args:
        left: ``(out, rank)``.
        right: ``(rank, in)``.
        transposed: whether the state is stored ``(in, out)``, as the weight was.

    Returns:
        ``carry([state of the weight], squared) -> [state of right, state of left]``.
    """

    def carry(state: Sequence[Tensor], squared: bool) -> list[Tensor]:
        (whole,) = state
        whole = whole.mT if transposed else whole
        a, b = (left.square(), right.square()) if squared else (left, right)
        return [a.mT.to(whole) @ whole, whole @ b.mT.to(whole)]

    return carry


def carry_factors(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Carry:
    """Return a function that turns optimizer state of factors into that of lower-rank factors.

    A truncation stays in the spans of the factors it started from: ``left' = left T`` and
    ``right' = S right``. Hence ``m_right' = Tᵀ m_right`` and ``m_left' = m_left Sᵀ`` exactly, and
    with squared ``T`` and ``S`` an approximation for second moments.

    Args:
        old: ``(left, right)`` before, ``(out, rank)`` and ``(rank, in)``.
        new: ``(left, right)`` after.

    Returns:
        ``carry([state of right, state of left], squared) -> the same of the new factors``.
    """
    (left, right), (left_new, right_new) = (tuple(map(double, pair)) for pair in (old, new))
    t = least_squares(left, left_new)
    s = least_squares(right.mT, right_new.mT).mT

    def carry(state: Sequence[Tensor], squared: bool) -> list[Tensor]:
        of_right, of_left = state
        a, b = (t.square(), s.square()) if squared else (t, s)
        return [
            (a.mT @ double(of_right)).to(of_right),
            (double(of_left) @ b.mT).to(of_left),
        ]

    return carry


def carry_sparse(left: Tensor, right: Tensor, transposed: bool, *, rows: bool = True) -> Carry:
    """Return a function that turns optimizer state of a dense weight into that of a split one.

    With ``W = left right + S`` the gradient of ``S`` is ``∂L/∂W``, so its state is the weight's
    own, both moments exactly; that of the factors is as in :func:`carry_dense`.

    Args:
        left: ``(out, rank)``.
        right: ``(rank, in)``.
        transposed: whether the state is stored ``(in, out)``, as the weight was.
        rows: whether there is an ``S``, a row for every output.

    Returns:
        ``carry([state of the weight], squared) -> [state of right and S stacked, of left]``.
    """
    factors = carry_dense(left, right, transposed)

    def carry(state: Sequence[Tensor], squared: bool) -> list[Tensor]:
        of_right, of_left = factors(state, squared)
        whole = state[0].mT if transposed else state[0]
        return [torch.cat([of_right, whole]) if rows else of_right, of_left]

    return carry


def carry_kept(layer: LowRankSparseLinear) -> Carry:
    """Return a function that turns optimizer state of a pruned layer into that of a compacted one.

    Every entry goes with the entry of the parameter it belongs to, so nothing is approximate.

    Args:
        layer: as it was compacted; later changes to it do not matter.

    Returns:
        ``carry([state of inner, state of left], squared) -> the same of the new layer``, whose
        first is ``right`` where no row is left.
    """
    kept, rank = layer.kept.clone(), layer.rank

    def carry(state: Sequence[Tensor], _squared: bool) -> list[Tensor]:
        of_inner, of_left = state
        return [of_inner[kept], of_left[:, kept[:rank]]]

    return carry


def carry_left(rows: Tensor | None, columns: Tensor | None, transposed: bool = False) -> Carry:
    """Return a function that turns optimizer state of a weight into that of some of its entries.

    Every entry goes with the entry of the parameter it belongs to. Where the layer's other inputs
    were removed and its weight solved anew, the gradient is ``g x_Sᵀ``, those columns of the
    gradient before, so nothing is approximate.

    Args:
        rows: ``(out,)`` bool, which of its outputs are left; None is all.
        columns: ``(in,)`` bool, which of its inputs are left; None is all.
        transposed: whether the state is stored ``(in, out)``, as the weight was.

    Returns:
        ``carry([state of the weight or bias], squared) -> [the same of what is left]``.
    """

    def carry(state: Sequence[Tensor], _squared: bool) -> list[Tensor]:
        (whole,) = state
        whole = whole.mT if transposed else whole
        whole = whole if rows is None else whole[rows]
        return [whole if columns is None else whole[:, columns]]

    return carry


def carry_later(new: Sequence[Tensor]) -> Carry:
    """Return a function that gives zeros of the shapes of ``new``, to be filled in later.

    Where layers are distributed over processes, only the process that solved a layer computes its
    optimizer state; the others receive it.
    """

    def carry(state: Sequence[Tensor], _squared: bool) -> list[Tensor]:
        return [torch.zeros_like(parameter, dtype=state[0].dtype) for parameter in new]

    return carry


@torch.no_grad()
@full_precision()
def swap_parameters_(
    optimizers: Iterable[Optimizer],
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    carry: Carry | None,
    *,
    names: Sequence[str] | None = None,
    staying: bool = False,
    exact: bool = False,
    exact_from: int | None = None,
) -> None:
    """Replace parameters in every optimizer's groups, with their state carried over.

    The optimizer object, its groups and their options stay, so schedulers go on. State that is
    not known to be linear or quadratic in gradients, and state that ``carry`` does not give the
    shapes of ``new``, is dropped: the parameters start afresh.

    Args:
        optimizers: that may hold the parameters.
        old: parameters that leave the model: a weight, or an inner and a left factor.
        new: what takes their place, a weight or two factors likewise.
        carry: turns state of ``old`` into state of ``new``; None drops it.
        names: of ``new`` within their layer, for groups that name their parameters; by default
            ``weight`` for one, and ``right.weight`` and ``left.weight`` for two; ``first`` and
            ``second`` for Kronecker factors, ``right`` and ``rest`` for pivoted rows.
        staying: leave ``old`` in its groups too, for a tied weight that others still use.
        exact: whether ``carry`` is exact for second moments too. Where it is not, they are raised
            to the squares of the first ones at least, for an average of squares is no less than
            the square of the average: centered RMSprop would take the root of a negative number
            otherwise, and Adam a step of several times its rate.
        exact_from: the row of the first of ``new`` from which on it is, as that of sparse rows.
    """
    if names is None:
        names = ("right.weight", "left.weight") if len(new) > 1 else ("weight",)
    coming = list(zip(new, names, strict=True))
    successors = {id(p): coming[i : i + 1] for i, p in enumerate(old)} if len(old) > 1 else {}
    successors = successors or {id(old[0]): coming}
    for optimizer in optimizers:
        _swap_in_groups(optimizer.param_groups, successors, staying)
        held, placed = without_positions(optimizer, [optimizer.state.get(p, {}) for p in old])
        if not staying:
            for p in old:
                optimizer.state.pop(p, None)
        for parameter, state in zip(new, _carried(held, old, new, carry), strict=True):
            if state and not exact:
                end = exact_from if parameter is new[0] else None
                _raise_second_moments_(state, _options(optimizer, parameter), slice(end))
            state = as_before(optimizer, parameter, state, held[0], _LINEAR)
            state |= position_at(parameter) if placed else {}
            if state:
                optimizer.state[parameter] = state
        start_state_(optimizer, new)


@torch.no_grad()
def start_state_(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Give parameters without state what the optimizer's step expects of those that come later.

    Fused SGD takes momentum buffers of all parameters of a group or of none: zeros, where others
    have some. Adagrad makes its state when it is built, and in some versions never again.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for parameter in parameters:
        group = groups.get(id(parameter))
        if group is None or optimizer.state.get(parameter):
            continue
        if type(optimizer) is Adagrad:
            made = Adagrad([parameter], **{key: group[key] for key in optimizer.defaults})
            optimizer.state[parameter] = made.state[parameter]
        elif isinstance(optimizer, SGD) and group["fused"]:
            held = (optimizer.state.get(p, {}) for p in group["params"])
            if any(state.get("momentum_buffer") is not None for state in held):
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def unknown_state(optimizer: Optimizer, old: Iterable[Tensor]) -> list[str]:
    """Return the keys of state for which :func:`swap_parameters_` drops all state of ``old``."""
    states = ((p, without_positions(optimizer, [optimizer.state.get(p, {})])[0][0]) for p in old)
    held = ((p, key, x) for p, state in states for key, x in state.items())
    return list(dict.fromkeys(key for p, key, x in held if not _is_understood(p, key, x)))


def _is_understood(parameter: Tensor, key: str, value: object) -> bool:
    if not isinstance(value, Tensor):
        return not isinstance(value, list | dict | tuple)
    return value.numel() == 1 or (key in _LINEAR | _SQUARED and value.shape == parameter.shape)


def _options(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    """Return the options of the group that holds a parameter, empty if none does."""
    groups = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    return next(groups, {})


def _raise_second_moments_(state: dict[str, Any], options: Mapping[str, Any], rows: slice) -> None:
    """Make second moments at least the squares of first ones, both without their bias."""
    for first, second in _PAIRS:
        if first not in state or second not in state:
            continue
        least, step = state[first][rows].square(), float(state.get("step", 0))
        if "betas" in options and step > 0:
            one, two = (1 - float(beta) ** step for beta in options["betas"])
            least *= two / one**2
        for raised in (second, f"max_{second}"):
            if raised in state:
                part = state[raised][rows]
                part.copy_(torch.maximum(part, least.to(part)))


def _swap_in_groups(
    groups: Sequence[dict[str, Any]], successors: Successors, staying: bool
) -> None:
    renamed: dict[str, str] = {}
    for group in groups:
        renamed |= _swap_in_group(group, successors, staying)
    for group in groups:
        if "param_names" in group:
            group["param_names"][:] = [renamed.get(name, name) for name in group["param_names"]]


def _swap_in_group(group: dict[str, Any], successors: Successors, staying: bool) -> dict[str, str]:
    """Swap in one group, and return the new name of each bias by its old one."""
    params: list[Tensor] = []
    names: list[str] = []
    renamed: dict[str, str] = {}
    given = group.get("param_names") or [""] * len(group["params"])
    for parameter, name in zip(group["params"], given, strict=True):
        if staying or id(parameter) not in successors:
            params.append(parameter)
            names.append(name)
        if id(parameter) in successors:
            path, of_layer = name.split("."), len(successors) > 1 and name.endswith(".weight")
            base = "".join(f"{part}." for part in path[: -2 if of_layer else -1])
            params += [successor for successor, _ in successors[id(parameter)]]
            names += [base + named for _, named in successors[id(parameter)]]
            # a layer that is a factor has the bias, parameters have it beside them
            on_left = any(
                named == "left.weight" for some in successors.values() for _, named in some
            )
            before, after = ("left.bias" if left else "bias" for left in (of_layer, on_left))
            renamed[base + before] = base + after
    group["params"][:] = params
    if "param_names" in group:
        group["param_names"][:] = names
    return renamed


def _carried(
    states: Sequence[Mapping[str, object]],
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    carry: Carry | None,
) -> list[dict[str, object]]:
    result: list[dict[str, object]] = [{} for _ in new]
    for key in states[0] if carry else ():
        values = [plain(state.get(key)) for state in states]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if key in _LINEAR | _SQUARED and [t.shape for t in tensors] == [p.shape for p in old]:
            assert carry is not None
            moved = carry(tensors, key in _SQUARED)
            if [t.shape for t in moved] != [p.shape for p in new]:
                return [{} for _ in new]
            for entry, value in zip(result, moved, strict=True):
                entry[key] = value.contiguous()
        elif all(t.numel() == 1 for t in tensors) and not any(
            isinstance(value, list | dict | tuple) for value in values
        ):
            for entry in result:
                entry[key] = tensors[0].clone() if tensors else values[0]
        else:
            return [{} for _ in new]
    return result
