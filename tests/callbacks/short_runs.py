"""Short fits of a small tagger with every callback, by whatever trainer."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lrcompress
from lrcompress.distill import Distilled, HiddenStates, Logits, Relations
from lrcompress.objective import METHODS

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Loader, Tagger, sentences

QUIET: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
RUNS = [
    *METHODS,
    *("losparse", "losparse auto", "losparse entries", "dsee", "distilled"),
    *("embedding low_rank", "embedding kronecker"),
]


def callbacks(name: str, **kwargs: Any) -> list[L.Callback]:
    """The callbacks of a run of 8 steps: they observe every step, and change the model after 4."""
    seen = {"at": "step:4", "every_n_steps": 1, "window": "step:4"} | kwargs
    if name in METHODS:
        return [lrcompress.Factorize(keep=0.5, method=name, **seen, **QUIET)]
    kind, _, option = name.partition(" ")
    if kind == "distilled":
        return callbacks("kfac", **kwargs)
    if kind == "dsee":
        given = {"keep": 0.5, "rank": 2, "entries": 4, "updates": ["*.up"], "prune_at": "step:4"}
        return [lrcompress.DSEE(**given, **QUIET)]
    if kind == "embedding":
        given = {"targets": ["embed"], "method": option, **seen}
        return [lrcompress.FactorizeEmbedding(keep=None, rank=8, **given, **QUIET)]
    given = {"init": "kfac", "mask_every": 2, **seen}
    given |= {"low_rank_share": "auto"} if option == "auto" else {}
    given |= {"granularity": "entries"} if option == "entries" else {}
    return [lrcompress.LoSparse(keep=0.5, prune_until="step:7", fix_at="step:7", **given, **QUIET)]


def tagger(
    name: str, folder: Path, number: int = 0, kind: type[Tagger] = Tagger, **kwargs: Any
) -> L.LightningModule:
    """Return the module, alike in all processes, whose dropout is not."""
    L.seed_everything(0, verbose=False)
    attends = name == "distilled relations"  # 48 outputs are three projections of two heads
    model = kind(**({"width": 24} if attends else {}), **kwargs)
    torch.manual_seed(number)
    if not name.startswith("distilled"):
        return model
    losses = [Logits(), HiddenStates(layers=["blocks.0.down", "blocks.1.down"])]
    losses += [Relations(heads=2, projections=["up"])] if attends else []
    return Distilled(model, losses=losses, teacher_dir=str(folder))


def fit(
    trainer: Callable[..., L.Trainer],
    name: str,
    folder: Path,
    *watching: L.Callback,
    ckpt_path: Path | None = None,
    kind: type[Tagger] = Tagger,
    dropout: float = 0.1,
    number: int = 0,
    size: int = 1,
    **kwargs: Any,
) -> tuple[L.LightningModule, L.Trainer]:
    """Train on this process's rows of the batches; return the module and its trainer."""
    model = tagger(name, folder, number, kind, dropout=dropout)
    run = trainer(*callbacks(name), *watching, default_root_dir=folder, **kwargs)
    rows = [{k: v[number::size] for k, v in batch.items()} for batch in sentences(10)]
    run.fit(model, Loader(rows), ckpt_path=ckpt_path)
    return model, run
