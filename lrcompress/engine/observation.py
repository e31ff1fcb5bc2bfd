"""Observation of a bare ``nn.Module``, without a Trainer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import ObservationError, SettingError
from lrcompress.objective import method_named
from lrcompress.statistics.batches import batch_terms
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.fisher import LogitsCapture, add_fisher
from lrcompress.statistics.masks import MASK, MaskSource, batch_decoder_mask, batch_mask
from lrcompress.statistics.moments import KINDS
from lrcompress.statistics.views import view
from lrcompress.structure.feed_forward import Blocks, BlockTrace
from lrcompress.structure.selection import select

Loss = Callable[[nn.Module, Any], Tensor]


@contextmanager
def observe(
    model: nn.Module,
    *,
    method: str = "kfac",
    kinds: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    shared: bool = False,
    offload: str | None = None,
) -> Iterator[Recorder]:
    """Accumulate statistics of the linear layers of ``model`` over chosen steps.

    Args:
        model: the module; nothing is written on it.
        method: whose statistics to accumulate, a key of :data:`lrcompress.objective.METHODS`.
        kinds: the statistics themselves, of :data:`lrcompress.statistics.moments.KINDS`, in place
            of a method's.
        targets: patterns of layer names; None is every linear layer of a numbered block.
        exclude: patterns of layers to leave out.
        shared: also observe layers with several uses a step, and tied weights.
        offload: device the sums live on; None leaves them beside the layers.

    Yields:
        A :class:`~lrcompress.statistics.capture.Recorder`, which observes what runs inside its
        ``step``. Its ``statistics`` are float32 sums over tokens and examples, such as
        ``input_moment`` ``Σ x xᵀ`` ``(in, in)`` and ``output_moment`` ``Σ g gᵀ`` ``(out, out)``.

    Raises:
        SettingError: if the method or a kind is unknown.
        NoMatchError: if a pattern matches no linear layer, or no layer is left to observe.
        LayerError: if a layer named in full cannot be factored.

    Cost:
        A step runs without ``torch.compile``. ``kfac`` takes up to ``in² + out²`` multiply-adds a
        token and ``4·(in² + out²)`` bytes a layer; layers that read one tensor share its part.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> with observe(model, method="drone") as recorder, recorder.step():
        ...     _ = model(torch.ones(5, 2))
        >>> recorder.statistics.of("0", ["input_moment"]).moment("input_moment").tolist()
        [[5.0, 5.0], [5.0, 5.0]]
    """
    chosen = method_named(method).kinds if kinds is None else tuple(kinds)
    for kind in chosen:
        if kind not in KINDS:
            raise SettingError(f"statistics are {', '.join(KINDS)}; got {kind!r}")
    names = select(model, targets, exclude, shared=shared).names
    yield Recorder(model, names, chosen, offload=offload, shared=shared)


def observe_batches(
    recorder: Recorder,
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    mask: MaskSource = MASK,
    examples: Callable[[Any], int] | None = None,
    logits: LogitsCapture | None = None,
    find_blocks: bool = False,
) -> Blocks | None:
    """Observe one pass over batches, in evaluation mode; no ``.grad`` is touched.

    Args:
        recorder: of layers of the model; its statistics grow.
        model: as it was, afterwards.
        batches: whatever ``loss`` understands.
        loss: ``loss(model, batch)`` gives the mean loss over the batch, a scalar.
        mask: where a batch has its padding mask, as
            :func:`~lrcompress.statistics.masks.batch_mask` says; None if nothing is padded.
        examples: of how many terms a batch's loss is the mean; by default as
            :func:`~lrcompress.statistics.batches.batch_terms` counts them.
        logits: captures them, for the gradients of labels as the model predicts them; None takes
            those of the loss.
        find_blocks: whether to look for feed-forward blocks of the recorder's layers.

    Returns:
        The blocks; None if they were not looked for, or no loss was finite and had a graph.

    Raises:
        ShapeError: if a mask is not two-dimensional.
        ObservationError: if there are no batches, or none with a finite loss; as of
            :meth:`~lrcompress.statistics.capture.Recorder.step`.
    """
    blocks: Blocks | None = None
    fisher = None if logits is None else (logits, torch.Generator().manual_seed(0))
    with _observable(model, recorder):
        for batch in batches:
            trace = BlockTrace(model, recorder.layers) if find_blocks and blocks is None else None
            given = mask, examples, fisher, trace
            blocks = _observe_batch(recorder, model, batch, loss, *given) or blocks
    if not recorder.statistics.steps:
        raise ObservationError(
            f"nothing to learn from: {recorder.statistics.skipped} batches, none with a finite loss"
        )
    return blocks


def _observe_batch(
    recorder: Recorder,
    model: nn.Module,
    batch: Any,
    loss: Loss,
    mask: MaskSource,
    examples: Callable[[Any], int] | None,
    fisher: tuple[LogitsCapture, torch.Generator] | None,
    trace: BlockTrace | None,
) -> Blocks | None:
    found, missing = batch_mask(batch, mask, "compress")
    decoder = None if mask is None else batch_decoder_mask(batch, "compress")
    blocks = None
    told: dict[str, Any] = {"decoder_mask": decoder, "missing": missing, "source": mask}
    with recorder.step(found, **told, keep_outputs=True):
        listening = fisher[0].listening() if fisher else nullcontext()
        with trace.forward() if trace else nullcontext(), listening:
            value = loss(model, batch)
        finite = bool(value.isfinite())
        if trace and finite and value.requires_grad:
            blocks = trace.blocks(value)
        if fisher:
            logits = fisher[0].take()
            count = logits[..., 0].numel()
        else:
            count = batch_terms(batch, value) if examples is None else examples(batch)
        recorder.commit(float(count), terms=count, finite=finite)
        if fisher and finite:
            add_fisher(recorder, logits, fisher[1])
        elif finite and recorder.outputs and value.requires_grad:
            torch.autograd.grad(value, recorder.outputs, allow_unused=True)
    return blocks


@contextmanager
def _observable(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Set evaluation mode and let gradients reach the weights; restore both at the end."""
    gradients = not recorder.forward_only
    modes = {module: module.training for module in model.modules()}
    weights = [p for x in recorder.layers.values() for p in view(x).parameters]
    frozen = [p for p in weights if gradients and not p.requires_grad]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(False)
