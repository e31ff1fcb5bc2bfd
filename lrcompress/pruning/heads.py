"""Prune attention heads: find the projections, choose the heads, and remove them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrcompress.errors import LayerError
from lrcompress.nn import LowRankUpdateLinear, PrunedLinear
from lrcompress.pruning.magnitude import largest
from lrcompress.statistics.views import is_linear, view
from lrcompress.structure.surgery import replace_


@dataclass(frozen=True)
class _Parts:
    """The paths of the projections in an attention module, and of its head size."""

    query: str
    key: str
    value: str
    output: str
    head_size: str


# By qualified name. In all of them the forward pass takes the number of heads from the width of
# query, key and value. That is not so in GPT-2, which cuts one product by the width of the config.
_BERT = _Parts("self.query", "self.key", "self.value", "output.dense", "self.attention_head_size")
_KNOWN = {
    f"transformers.models.{file}.modeling_{file}.{name}Attention": _BERT
    for file, name in (
        ("bert", "Bert"),
        ("roberta", "Roberta"),
        ("xlm_roberta", "XLMRoberta"),
        ("camembert", "Camembert"),
        ("electra", "Electra"),
    )
} | {
    "transformers.models.distilbert.modeling_distilbert.DistilBertSelfAttention": _Parts(
        "q_lin", "k_lin", "v_lin", "out_lin", "attention_head_size"
    )
}


@dataclass(frozen=True)
class Attention:
    """The names of the projections of one attention module, and its heads.

    Attributes:
        inputs: query, key and value; their outputs are shared out evenly by the heads.
        output: the projection that reads what the heads give.
        heads: how many there are.
        head_size: features of each.
    """

    inputs: tuple[str, str, str]
    output: str
    heads: int
    head_size: int

    @property
    def names(self) -> tuple[str, ...]:
        """All its projections."""
        return (*self.inputs, self.output)

    def features(self, kept: Tensor) -> Tensor:
        """Return which features ``(heads · head_size,)`` belong to the heads in ``kept``."""
        return kept.repeat_interleave(self.head_size)


def attentions(model: nn.Module, chosen: Collection[str]) -> list[Attention]:
    """Return the attention modules whose heads can be removed and whose output is ``chosen``.

    Args:
        model: to search.
        chosen: names of linear layers.

    Raises:
        LayerError: if there is none, naming what is there; or if one lacks heads already.
    """
    found = []
    for name, module in model.named_modules():
        parts = _KNOWN.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if parts is None:
            continue
        path = f"{name}." if name else ""
        inputs = (path + parts.query, path + parts.key, path + parts.value)
        if path + parts.output in chosen and set(inputs) <= set(chosen):
            found.append(_attention(model, inputs, path + parts.output, path + parts.head_size))
    if not found:
        kinds = {type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__}
        known = ", ".join(sorted(path.rpartition(".")[2] for path in _KNOWN))
        raise LayerError(
            f"structure='heads' removes heads of {known}; with all projections among the pruned "
            f"layers, found none, but {', '.join(sorted(kinds)) or 'no attention'}; use "
            "structure='entries', or other pruned="
        )
    return found


def _attention(model: nn.Module, inputs: tuple[str, str, str], output: str, size: str) -> Attention:
    for name in (*inputs, output):
        layer = model.get_submodule(name)
        if not is_linear(layer) or isinstance(layer, PrunedLinear):
            raise LayerError(
                f"layer {name!r} is a {type(layer).__name__}: its heads cannot be removed; leave "
                "it out with pruned= or exclude="
            )
    holder, _, attribute = size.rpartition(".")
    head_size = int(getattr(model.get_submodule(holder), attribute))
    width = view(model.get_submodule(inputs[0])).shape[0]
    return Attention(inputs, output, width // head_size, head_size)


@torch.no_grad()
def kept_heads(
    model: nn.Module, found: Collection[Attention], keep: float, scope: str
) -> dict[str, Tensor]:
    """Return which heads stay: those of the largest ``|coefficient|``, at least one each.

    Args:
        model: its output projections have coefficients.
        found: its attention modules.
        keep: share of the heads that stay; more do where that is less than one each.
        scope: over what coefficients are compared; see :func:`largest`.

    Returns:
        Name of the output projection to ``(heads,)`` bool.
    """
    scores = {}
    for one in found:
        score = _coefficients(model, one).abs()
        scores[one.output] = score.index_fill(0, score.argmax(), torch.inf)
    least = len(found) / sum(one.heads for one in found)
    if scope == "layer":
        least = max(1 / one.heads for one in found)
    return dict(largest(scores, max(keep, least), scope))


@torch.no_grad()
def penalise_(
    model: nn.Module, found: Collection[Attention], optimizer: Optimizer, weight: float
) -> None:
    """Add the gradient of the L1 penalty ``weight · Σ|c|`` to coefficients of ``optimizer``."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for one in found:
        layer = model.get_submodule(one.output)
        assert isinstance(layer, LowRankUpdateLinear)
        own = layer.coefficients
        if own.grad is not None and id(own) in held:
            own.grad.add_(own.sign(), alpha=weight)


@torch.no_grad()
def silence_(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Set the coefficients of pruned heads to zero, and freeze all coefficients."""
    for name, stays in kept.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankUpdateLinear)
        layer.coefficients.mul_(stays)
        layer.coefficients.requires_grad_(False)


def _coefficients(model: nn.Module, attention: Attention) -> Tensor:
    layer = model.get_submodule(attention.output)
    assert isinstance(layer, LowRankUpdateLinear)
    return layer.coefficients.detach()


def remaining(model: nn.Module, attention: Attention) -> Tensor:
    """Return which heads of an attention are not silenced, ``(heads,)`` bool."""
    return _coefficients(model, attention) != 0


@torch.no_grad()
def remove_heads_(model: nn.Module, found: Collection[Attention]) -> None:
    """Remove silenced heads from the projections, and merge coefficients into the weights.

    Layers of an attention that keeps all its heads are left as they are.
    """
    for one in found:
        stays = remaining(model, one)
        if stays.all():
            continue
        features = one.features(stays)
        for name in one.names:
            layer = model.get_submodule(name)
            plain = layer.to_dense() if isinstance(layer, LowRankUpdateLinear) else layer
            side = "columns" if name == one.output else "rows"
            replace_(model, name, PrunedLinear.of(plain, **{side: features}))
