"""Compress language models by low-rank factors while they are being fine-tuned."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Name to module: Lightning and transformers are imported when a name that needs them is used.
_PUBLIC = {
    "DSEE": "callbacks",
    "Distilled": "distill",
    "Factorize": "callbacks",
    "FactorizeEmbedding": "callbacks",
    "LoSparse": "callbacks",
    "LowRankLinear": "nn",
    "LowRankSparseLinear": "nn",
    "Plan": "structure.plan",
    "Report": "report",
    "StartFrom": "callbacks",
    "compress": "engine.compress",
    "decoding_layout_": "nn.decoding_layout",
    "load_pretrained": "export",
    "merge_dense": "export",
    "observe": "engine.observation",
    "restore_structure": "structure.plan",
    "save_pretrained": "export",
    "store_pivoted_": "engine.factored_layers",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lrcompress' has no attribute {name!r}")
    return getattr(import_module(f"lrcompress.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
