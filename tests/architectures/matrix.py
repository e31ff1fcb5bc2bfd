"""Every method on every architecture: what works, how, and what is refused with which reason.

``python -m tests.architectures.matrix`` writes the table into the guide.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lrcompress
from lrcompress.engine.compress import factor_
from lrcompress.engine.settings import Settings
from lrcompress.errors import LRCompressError
from lrcompress.objective import METHODS as METRICS
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.masks import batch_decoder_mask
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.plan import Plan
from lrcompress.structure.selection import select

from .models import MODELS, batch_for, made

PAGE = Path(__file__).parents[2] / "lrcompress" / "guide" / "models.md"
BEGIN, END = "<!-- architectures -->", "<!-- end of architectures -->"
# What a user may have to add, in the order in which it is tried.
WAYS: Mapping[str, dict[str, Any]] = {
    "yes": {},
    "shared": {"shared": True},
    "mask": {"mask": None},
}


class Module(L.LightningModule):
    """Trains a model by the loss that it gives itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        assert loss.isfinite()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fitted(architecture: str, callback: L.Callback, steps: int) -> tuple[nn.Module, nn.Module]:
    """A model after a fit, and as it was right after the callback's last change."""
    model = made(architecture)
    changed: list[nn.Module] = []

    class After(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if not changed and callback.report.points:
                changed.append(copy.deepcopy(model))

    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, After()],
    )
    trainer.fit(Module(model), DataLoader([batch_for(model)] * steps, batch_size=None))
    return model, changed[0]


def factorized(method: str) -> Callable[[str, dict[str, Any]], nn.Module]:
    def fit(architecture: str, extra: dict[str, Any]) -> nn.Module:
        quiet = {"verbose": False, "report_path": None, "align": 1}
        when = {"at": "step:2", "every_n_steps": 1}
        callback = lrcompress.Factorize(method=method, keep=0.5, **when, **quiet, **extra)
        model, changed = fitted(architecture, callback, 4)
        check_moved(changed, model)
        return model

    return fit


def losparse(architecture: str, extra: dict[str, Any]) -> nn.Module:
    quiet = {"verbose": False, "report_path": None}
    callback = lrcompress.LoSparse(0.5, mask_every=2, **quiet, **extra)
    model, changed = fitted(architecture, callback, 10)
    check_moved(changed, model)
    return model


def compressed(method: str) -> Callable[[str, dict[str, Any]], nn.Module]:
    def compress(architecture: str, extra: dict[str, Any]) -> nn.Module:
        model = made(architecture)
        settings = Settings(method=method, keep=0.5, align=1, shared=bool(extra.get("shared")))
        factor_(model, observed(architecture, extra), settings)
        changed, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
        Module(model).training_step(batch_for(model), 0).backward()
        optimizer.step()
        check_moved(changed, model)
        return model

    return compress


_OBSERVED: dict[str, Statistics] = {}


def observed(architecture: str, extra: dict[str, Any]) -> Statistics:
    """What all methods need to know of a model, from one batch; kept for the next method."""
    key = f"{architecture} {extra}"
    if key not in _OBSERVED:
        _OBSERVED[key] = _observe(made(architecture), **extra)
    return _OBSERVED[key]


def _observe(model: nn.Module, shared: bool = False, mask: str | None = "given") -> Statistics:
    batch = batch_for(model)
    kinds = dict.fromkeys(kind for metric in METRICS.values() for kind in metric.kinds)
    recorder = Recorder(model, select(model, shared=shared).names, kinds, shared=shared)
    padding = None if mask is None else batch.get("attention_mask")
    missing = None if mask is None or padding is not None else "there is no attention_mask"
    with recorder.step(padding, decoder_mask=batch_decoder_mask(batch, "test"), missing=missing):
        loss = model(**batch).loss
        recorder.commit(len(batch["labels"]))
        loss.backward()
    return recorder.statistics


def embedding(architecture: str, extra: dict[str, Any]) -> nn.Module:
    quiet = {"verbose": False, "report_path": None}
    when = {"at": "step:2", "every_n_steps": 1}
    callback = lrcompress.FactorizeEmbedding(0.4, **when, **quiet, **extra)
    model, changed = fitted(architecture, callback, 4)
    check_moved(changed, model)
    return model


def dsee(architecture: str, extra: dict[str, Any]) -> nn.Module:
    quiet = {"verbose": False, "report_path": None}
    before = made(architecture)
    callback = lrcompress.DSEE(0.5, rank=2, entries=4, prune_at="step:2", **quiet, **extra)
    model, _ = fitted(architecture, callback, 4)
    names = [n for n in select(before).names if n in dict(model.named_modules())]
    entries = [model.get_submodule(name).weight for name in names]
    zero = sum(int((x == 0).sum()) for x in entries)
    assert 0.2 < zero / sum(x.numel() for x in entries) < 0.6
    return model


# A method more is a line more here, and a column more in the guide.
PLAIN = ("LoSparse", "FactorizeEmbedding", "DSEE")  # they never ask for more
METHODS: Mapping[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "svd": factorized("svd"),
    "fwsvd": compressed("fwsvd"),
    "asvd": compressed("asvd"),
    "drone": compressed("drone"),
    "row_fisher": compressed("row_fisher"),
    "kfac": factorized("kfac"),
    "weighted_kfac": compressed("weighted_kfac"),
    "kronecker": compressed("kronecker"),
    "LoSparse": losparse,
    "FactorizeEmbedding": embedding,
    "DSEE": dsee,
}


def check_moved(before: nn.Module, after: nn.Module) -> None:
    """Training went on, and moved the factors too."""
    assert len(Plan.of(after)) > 0
    assert Plan.of(before) == Plan.of(after)
    old = before.state_dict()
    for layer in Plan.of(after):
        moved = [
            not value.equal(old[f"{layer.name}.{key}"])
            for key, value in after.get_submodule(layer.name).named_parameters()
        ]
        assert any(moved), layer.name


def check_reloads(architecture: str, model: nn.Module, folder: Path) -> None:
    """What is saved and loaded again gives the very same outputs."""
    if isinstance(model, tf.PreTrainedModel):
        lrcompress.save_pretrained(model, folder)
        again: nn.Module = lrcompress.load_pretrained(folder)
    else:
        torch.save(model.state_dict(), folder / "model.pt")
        again = lrcompress.restore_structure(made(architecture), folder / "model.pt")
        again.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    assert Plan.of(again) == Plan.of(model)
    batch = batch_for(model)
    with torch.no_grad():
        one, other = (each.eval()(**batch).logits for each in (model, again))
    assert one.isfinite().all()
    assert one.equal(other)


def cell(architecture: str, method: str) -> tuple[str, str]:
    """The first way in which a method works on an architecture, or why none does."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        for way, extra in WAYS.items():
            if extra and method in PLAIN:
                continue
            try:
                model = METHODS[method](architecture, extra)
            except LRCompressError as error:
                reason = str(error)
                continue
            check_reloads(architecture, model, Path(folder))
            return way, ""
    return "no", reason


def stays(architecture: str) -> dict[str, str]:
    """What is left alone of an architecture, by the reason."""
    try:
        left = select(made(architecture), shared=True).left_alone
    except LRCompressError:
        return {}
    return {why: f"`{name.rpartition('.')[2]}` of {architecture}" for name, why in left.items()}


def table(cells: Mapping[tuple[str, str], tuple[str, str]]) -> str:
    """The table and the reasons, as they stand in the guide."""
    lines = [f"| | {' | '.join(f'`{method}`' for method in METHODS)} |"]
    lines.append("|---" * (len(METHODS) + 1) + "|")
    notes: dict[str, list[str]] = {}
    for architecture in MODELS:
        row = [cells[architecture, method] for method in METHODS]
        left = stays(architecture)
        name = f"{architecture}, in part" if left else architecture
        lines.append(f"| {name} | {' | '.join(way for way, _ in row)} |")
        refused = [(why, m) for (_, why), m in zip(row, METHODS, strict=True) if why]
        for reason, method in refused[:1]:
            notes.setdefault(reason, []).append(f"{architecture} (`{method}`)")
        for reason, layers in left.items():
            notes.setdefault(reason, []).append(layers)
    told = [f"* {', '.join(names)}: {why}." for why, names in notes.items()]
    return "\n".join([*lines, "", *told])


def in_guide() -> str:
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tf.logging.disable_progress_bar()
    cells = {(one, method): cell(one, method) for one in MODELS for method in METHODS}
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(cells)}\n{END}{after}")


if __name__ == "__main__":
    main()
