"""Loading of ``transformers`` models to train, in training mode."""

import logging
from typing import Any, Literal, get_args

import torch
import transformers
from transformers import AutoConfig

from lrcompress.errors import SettingError, nearest
from lrcompress.export.dense import forget_structure_
from lrcompress.tasks.locations import named_source, source_arguments

DType = Literal["float32", "bfloat16", "auto"]


def load_model(kind: Any, folder: str, pretrained: bool, dtype: DType = "float32") -> Any:
    """Return a model of a class such as ``AutoModelForCausalLM``.

    It is in training mode; ``from_pretrained`` alone leaves it in evaluation mode.

    Args:
        kind: the class.
        folder: as :func:`~lrcompress.tasks.locations.model_folder` gives it.
        pretrained: whether to load the weights.
        dtype: of the weights; ``auto`` is that of the files.

    Raises:
        SettingError: if ``dtype`` is another.
    """
    if dtype not in get_args(DType):
        near = nearest(str(dtype), get_args(DType), 1)
        raise SettingError(
            f"dtype is one of {', '.join(get_args(DType))}, got {dtype!r}; nearest: {near}"
        )
    with named_source(folder):
        if pretrained:
            wanted = dtype if dtype == "auto" else getattr(torch, dtype)
            return _loaded(kind, folder, dtype=wanted).train()
        config = AutoConfig.from_pretrained(**source_arguments(folder))
    own = config.dtype or torch.float32
    return kind.from_config(config, dtype=own if dtype == "auto" else getattr(torch, dtype)).train()


def load_for_fine_tuning(kind: Any, folder: str, pretrained: bool, num_labels: int) -> Any:
    """Return a model of a class such as ``AutoModelForSequenceClassification``.

    Its head may be new, which is what fine-tuning starts from; a body with new weights is
    reported as ``transformers`` does.
    """
    with named_source(folder):
        config = AutoConfig.from_pretrained(**source_arguments(folder), num_labels=num_labels)
    if config.pad_token_id is None:  # decoders classify by the last token that is no padding
        config.pad_token_id = config.eos_token_id
    if not pretrained:
        return kind.from_config(config, dtype=torch.float32).train()
    logger = logging.getLogger("transformers.modeling_utils")
    report = _LoadReport()
    logger.addFilter(report)
    try:
        model, info = _loaded(
            kind, folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    finally:
        logger.removeFilter(report)
    body = f"{model.base_model_prefix}."
    if any(key.startswith(body) and "pooler" not in key for key in info["missing_keys"]):
        for record in report.held:
            logger.handle(record)
    return model.train()


def _loaded(kind: Any, folder: str, **given: Any) -> Any:
    """Return what ``from_pretrained`` does, of a GGUF file with weights that may be trained."""
    source = source_arguments(folder)
    if "gguf_file" in source and hasattr(transformers, "GgufConfig"):
        given["quantization_config"] = transformers.GgufConfig(dequantize=True)
    found = kind.from_pretrained(**source, **given)
    model = found[0] if isinstance(found, tuple) else found
    if "gguf_file" in source:  # plain tensors from here on
        forget_structure_(model)
        model.is_quantized = False
    return found


class _LoadReport(logging.Filter):
    """Holds back the report on weights that were not in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            self.held.append(record)
        return not is_report
