"""Folders whose models load without this package, by modelling code beside the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from lrcompress.errors import SettingError
from lrcompress.export import modeling_compressed
from lrcompress.export.modeling_compressed import LAYERS
from lrcompress.export.plugin import marker_names
from lrcompress.export.pretrained import checked_model
from lrcompress.structure.plan import DENSE, Plan

CODE = "modeling_compressed.py"
NOTICE = "to load this model: trust_remote_code=True"
AUTO_CLASSES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_TO_SEQ_CAUSAL_LM",
    "AutoModelForMaskedLM": "MASKED_LM",
    "AutoModelForSequenceClassification": "SEQUENCE_CLASSIFICATION",
    "AutoModelForTokenClassification": "TOKEN_CLASSIFICATION",
    "AutoModelForQuestionAnswering": "QUESTION_ANSWERING",
}


def save_remote_code(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """Save a compressed ``transformers`` model with the code that builds it.

    ``from_pretrained(folder, trust_remote_code=True)`` loads it, with torch and ``transformers``
    alone. Code runs at loading: who gets the folder has to trust it, which
    :func:`~lrcompress.save_pretrained` does not ask. Nothing of ``model`` is changed.

    Args:
        model: with low-rank, pivoted or narrowed linear layers.
        folder: is made if need be; files of these names in it are written over.
        tokenizer: or processor, whose own ``save_pretrained`` is called.

    Raises:
        SettingError: if ``model`` is no ``transformers`` model, or a quantised one; if a layer is
            of another kind, or no automatic class of ``transformers`` has the architecture.
    """
    checked, path = checked_model(model), Path(folder)
    plan = Plan(tuple(layer for layer in Plan.of(model) if layer.kind != DENSE))
    tied = {name.rpartition(".")[0] for name in checked.all_tied_weights_keys}
    for layer in plan:
        if layer.kind not in LAYERS or layer.tied or layer.name in tied:
            raise SettingError(
                f"layer {layer.name!r} is of kind {layer.kind!r}{', and tied' * bool(layer.tied)}; "
                f"remote code is for layers of {', '.join(LAYERS)} with weights of their own: save "
                "it with save_pretrained, or merge_dense"
            )
    names = {key for key in marker_names(plan) if key.endswith(".weight")} | {NOTICE}
    state = _state(checked, plan)
    markers = sorted(names - state.keys())
    with _described(checked, plan, markers):
        whole = state | {key: torch.zeros(1, dtype=torch.uint8) for key in markers}
        checked.save_pretrained(
            path, state_dict=whole, max_shard_size="1000TB", save_original_format=False
        )
    source = Path(modeling_compressed.__file__).read_text(encoding="utf-8")
    code = source.replace('"PreTrainedModel"', f'"{type(checked).__name__}"', 1)
    (path / CODE).write_text(code, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _state(model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    """Return the tensors of the model, without which features a narrowed layer has lost."""
    lost = {
        f"{layer.name}.{x}" for layer in plan if layer.kind == "narrow" for x in ("rows", "columns")
    }
    return {name: tensor for name, tensor in model.state_dict().items() if name not in lost}


@contextmanager
def _described(model: PreTrainedModel, plan: Plan, markers: list[str]) -> Iterator[None]:
    """Let the config list the layers while the model is saved, instead of being of our format.

    Raises:
        SettingError: if no automatic class has the architecture.
    """
    name = type(model).__name__
    auto = [
        auto
        for auto, task in AUTO_CLASSES.items()
        if name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
    ]
    if not auto:
        raise SettingError(
            f"no automatic class of transformers has {name}; remote code is for models of "
            f"{', '.join(AUTO_CLASSES)}"
        )
    config, held = model.config, dict(vars(model.config))
    quantizer = model.__dict__.pop("hf_quantizer", None)
    config.__dict__.pop("quantization_config", None)
    config.auto_map = dict.fromkeys(auto, f"{Path(CODE).stem}.CompressedModel")
    config.compressed_layers = {x.name: {"kind": x.kind, "sizes": dict(x.sizes)} for x in plan}
    config.compressed_markers = markers
    try:
        yield
    finally:
        config.__dict__.clear()
        config.__dict__.update(held)
        if quantizer is not None:
            model.__dict__["hf_quantizer"] = quantizer
