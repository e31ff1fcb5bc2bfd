"""Metrics of low-rank approximation (K-FAC, Fisher, covariance), from a layer's statistics.

All weighted decompositions minimise one objective, with ``PᵀP`` an output metric and ``QQᵀ``
an input metric, over all matrices ``M (out, in)`` of rank ``r``::

    min ‖P (W − M) Q‖²

=================  ================  ===================  ===================================
method             output metric     input metric         source
=================  ================  ===================  ===================================
``svd``            I                 I                    Eckart & Young 1936
``fwsvd``          I                 diag Σ_i F_ij        Hsu et al., ICLR 2022
``asvd``           I                 ``diag (mean |x|)``  Yuan et al., arXiv 2312.05821
``drone``          I                 C                    Chen et al., NeurIPS 2021
``row_fisher``     diag Σ_j F_ij     C                    Fisher of rows, inputs as ``drone``
``kfac``           G                 C                    two-sided, arXiv 2505.17974
``weighted_kfac``  G                 C_g                  as ``kfac``, inputs by gradient
``kronecker``      G                 C                    as ``kfac``, sums of Kronecker products
=================  ================  ===================  ===================================

``C`` is the covariance of the inputs (their second moment where there is no bias to refit),
``G`` the second moment of the gradient at the output, ``F`` the per-example Fisher.
``C_g = Σ ‖g‖² x xᵀ / Σ ‖g‖²`` counts a token's input by its squared gradient: where the loss
depends on few tokens, as a classifier's does on the first, the inputs of all the others do not
matter, and ``C`` does not know that. ``C_g ⊗ G`` has the exact trace of the Fisher. ASVD's
exponent is ½ of the scale, hence ``mean |x|`` in the squared metric. With a Fisher metric on the
output, half the squared error predicts the increase of the loss, so errors of different
layers are in one currency: those methods are ``comparable``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.errors import NotFiniteError, SettingError, nearest
from lrcompress.linalg import shrunk
from lrcompress.statistics.moments import Statistics


@dataclass(frozen=True)
class Method:
    """A method: which statistics are its output and input metric, and the form of its layers.

    Attributes:
        output: the statistic behind the output metric; None for the identity.
        input: the statistic behind the input metric; None for the identity.
        form: ``"low_rank"`` or ``"kronecker"``, the kind of layer it makes.
    """

    output: str | None
    input: str | None
    form: str = "low_rank"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The statistics it needs."""
        return tuple(kind for kind in (self.input, self.output) if kind)

    @property
    def comparable(self) -> bool:
        """Whether errors of different layers are comparable, as predicted increases of the loss."""
        return self.output is not None and self.form == "low_rank"

    @property
    def needs_gradients(self) -> bool:
        """Whether its statistics come from a backward pass."""
        return self.output is not None or self.input == "input_fisher"


#: The methods, by the name that ``method=`` takes.
METHODS: dict[str, Method] = {
    "svd": Method(None, None),
    "fwsvd": Method(None, "input_fisher"),
    "asvd": Method(None, "input_abs"),
    "drone": Method(None, "input_moment"),
    "row_fisher": Method("output_fisher", "input_moment"),
    "kfac": Method("output_moment", "input_moment"),
    "weighted_kfac": Method("output_moment", "weighted_moment"),
    "kronecker": Method("output_moment", "input_moment", "kronecker"),
}

COMPARABLE = tuple(name for name, method in METHODS.items() if method.comparable)
LOW_RANK = tuple(name for name, method in METHODS.items() if method.form == "low_rank")

# Tokens an input, below which sums over them are too much chance. Of two layers of MiniLM what is
# predicted from 1 an input is .2 and .7 of what other tokens lose, from 2 .4 and .9, from 8 .8.
FEW = 4

# A full input metric -> the sum its mean comes from, and the count if it is not that of tokens.
_MEANS = {"input_moment": ("input_sum", None), "weighted_moment": ("weighted_sum", "weight")}


def method_named(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        SettingError: if there is none; the message lists the nearest.

    Example:
        >>> method_named("drone").kinds
        ('input_moment',)
    """
    if name not in METHODS:
        raise SettingError(
            f"method must be one of {', '.join(METHODS)}; got {name!r}, "
            f"nearest: {nearest(str(name), METHODS, 1)}"
        )
    return METHODS[name]


def few_tokens(method: str, tokens: int, inputs: int) -> str:
    """Return what there is to say of an input metric that rests on too few tokens, or "".

    Args:
        method: a key of :data:`METHODS`.
        tokens: that were observed.
        inputs: of the widest layer.

    Raises:
        SettingError: if there is no such method.

    Example:
        >>> few_tokens("kfac", 512, 1536)[:66]
        '512 tokens were observed of layers with up to 1,536 inputs, which '
        >>> few_tokens("kfac", 4 * 1536, 1536), few_tokens("fwsvd", 512, 1536)
        ('', '')
    """
    if method_named(method).input not in _MEANS or tokens >= FEW * inputs:
        return ""
    return (
        f"{tokens:,} tokens were observed of layers with up to {inputs:,} inputs, which is too "
        f"few: more is lost than is predicted; observe {2 * FEW * inputs:,} or more"
    )


@dataclass(frozen=True)
class Metric:
    """The metric of one layer, in float64.

    Attributes:
        output: ``PᵀP``: None for the identity, ``(out,)`` its diagonal, or ``(out, out)``.
        input: ``QQᵀ``: None, ``(in,)`` or ``(in, in)``, centred if ``mean`` is given.
        mean: ``(in,)`` mean input ``μ``; given, the bias is refitted: ``b' = b + (W − M) μ``.
        loss_scale: ``½‖P (W − M) Q‖²`` times this predicts the increase of the loss per
            example; None where the metric does not know the loss, 0 where nothing of the layer
            reached it.
        note: what was done about a metric that could not be used as it was, or "".
    """

    output: Tensor | None = None
    input: Tensor | None = None
    mean: Tensor | None = None
    loss_scale: float | None = None
    note: str = ""


def metric_of(
    method: str,
    statistics: Statistics,
    layer: str,
    *,
    refit_bias: bool,
    shrink: tuple[float, float] = (0.0, 0.0),
    device: torch.device | str | None = None,
) -> Metric:
    """Return the metric of ``method`` for the errors of ``layer``.

    Args:
        method: a key of :data:`METHODS`.
        statistics: with the layer's statistics that the method needs.
        layer: its name.
        refit_bias: whether the layer has a bias that may take up the mean error; the input
            moment is then centred, which is the exact optimum over weight and bias together.
        shrink: shares of the mean diagonal mixed into the input and the output metric.
        device: where the metric is to be; by default where its statistics are.

    Returns:
        The metric, with the identity for a side whose statistics are all zero.

    Raises:
        SettingError: if there is no such method.
        NotFiniteError: if a statistic holds a NaN or an infinity.
        ObservationError: if a statistic is missing.
    """
    chosen = method_named(method)
    if not chosen.kinds:
        return Metric()
    sums = statistics.of(layer, chosen.kinds)
    values = {kind: sums.moment(kind, torch.float64, device) for kind in chosen.kinds}
    for kind, value in values.items():
        if not value.sum().isfinite() and not value.isfinite().all():
            raise NotFiniteError(f"{kind} of layer {layer!r} holds a NaN or an infinity")
    tokens, examples = float(max(1, int(sums.tokens))), max(1, int(sums.examples))
    inner = values[chosen.input] if chosen.input else None
    outer = values[chosen.output] if chosen.output else None
    mean, loss_scale = None, None
    if chosen.input in _MEANS and inner is not None:
        total, count = _MEANS[chosen.input]
        tokens = float(sums.values[count]) if count else tokens
        inner /= max(tokens, torch.finfo(torch.float32).tiny)
        spread = inner.diagonal().sum()
        if refit_bias:
            mean = sums.moment(total, torch.float64, device) / max(
                tokens, torch.finfo(torch.float32).tiny
            )
            inner.addr_(mean, mean, alpha=-1)
            inner *= inner.diagonal().sum() > 1e-5 * spread  # less is a constant's rounding
    if outer is not None:
        outer /= examples
        # Σ_j F_ij = G_ii · trace C where inputs and gradients are independent
        fisher = chosen.output == "output_fisher"
        loss_scale = float(1 / spread.clamp(min=torch.finfo(spread.dtype).tiny)) if fisher else 1.0
    return _usable(Metric(outer, inner, mean, loss_scale), shrink)


def _usable(metric: Metric, shrink: tuple[float, float]) -> Metric:
    sides, notes = [], []
    for side, share in ((metric.input, shrink[0]), (metric.output, shrink[1])):
        trace = None if side is None else (side if side.ndim == 1 else side.diagonal()).sum()
        if trace is None or trace > 0:
            sides.append(shrunk(side, share) if side is not None and share else side)
        else:
            sides.append(None)
            notes.append(f"the {('input', 'output')[len(sides) - 1]} metric was all zero: identity")
    inner, outer = sides
    blind = (inner is None, outer is None) != (metric.input is None, metric.output is None)
    scale = 0.0 if blind and metric.loss_scale is not None else metric.loss_scale
    return Metric(outer, inner, metric.mean, scale, "; ".join(notes))
