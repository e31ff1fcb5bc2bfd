"""Save and load compressed ``transformers`` models, bit for bit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from lrcompress import __version__
from lrcompress.errors import CheckpointError, LRCompressError, SettingError, nearest
from lrcompress.export.dense import forget_structure_
from lrcompress.export.folder import (
    CONFIG,
    RECORD,
    WEIGHTS,
    Contents,
    check_model,
    read_folder,
    sha256,
)
from lrcompress.export.model_card import model_card
from lrcompress.export.plugin import VERSION, CompressionConfig, CompressionQuantizer, shape_
from lrcompress.files import atomic_write
from lrcompress.report import PointRecord, Report
from lrcompress.structure.plan import Plan
from lrcompress.structure.wrapped import check_unwrapped

# Arguments of from_pretrained that load_pretrained fixes.
_FIXED = {"config", "trust_remote_code", "use_safetensors", "local_files_only", "subfolder"}
_FIXED |= {"output_loading_info", "state_dict", "quantization_config"}


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    report: Report | PointRecord | None = None,
) -> None:
    """Save a compressed ``transformers`` model to a folder, with all that is needed to load it.

    There are ``config.json`` with the plan in it, ``model.safetensors``, ``lrcompress.json`` with
    plan, report and checksums, the tokenizer's files if one is given, and ``README.md``, a model
    card with the figures of the report. Nothing of ``model`` is changed.

    Args:
        model: a ``transformers`` model whose layers may be factored, on any device.
        folder: is made if need be; files of these names in it are written over.
        tokenizer: or processor, whose own ``save_pretrained`` is called.
        report: of the callback (``callback.report``), or what ``compress`` returned.

    Raises:
        SettingError: if ``model`` is no ``transformers`` model, or a quantised one.
        LayerError: if a factored layer has adapters, or quantised factors.

    Example:
        >>> import tempfile
        >>> from lrcompress.structure.plan import LayerPlan
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 20}
        >>> config = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
        >>> layer = LayerPlan("pooler.dense", "low_rank", {"in": 8, "out": 8, "rank": 2})
        >>> model = Plan((layer,)).apply_(transformers.BertModel(config))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, folder)
        ...     loaded = load_pretrained(folder)
        >>> Plan.of(loaded) == Plan.of(model)
        True
    """
    checked = checked_model(model)
    path, plan = Path(folder), Plan.of(model)
    with _marked(checked, plan):
        # under the names of the model: transformers cannot join factors with a layer's dense weight
        checked.save_pretrained(path, max_shard_size="1000TB", save_original_format=False)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    report = Report([report]) if isinstance(report, PointRecord) else report
    record = {
        "version": VERSION,
        "lrcompress": __version__,
        "plan": plan.to_dict(),
        "report": None if report is None else report.to_dict(),
        "sha256": {name: sha256(path / name) for name in (CONFIG, WEIGHTS)},
    }
    (path / "README.md").write_text(model_card(checked, plan, report), encoding="utf-8")
    with atomic_write(path / RECORD) as passing:
        passing.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def checked_model(model: nn.Module) -> PreTrainedModel:
    """Return the model as a ``PreTrainedModel``, if it can be exported.

    Raises:
        SettingError: if it is no ``transformers`` model, or a quantised one.
        LayerError: if a factored layer has adapters, or quantised factors.
    """
    if not isinstance(model, PreTrainedModel):
        inner = [name for name, child in model.named_children() if _is_pretrained(child)]
        way = (
            f"give its {inner[0]!r}"
            if inner
            else "keep its state_dict beside Plan.of(model).to_dict(), and give a new model its "
            "structure with Plan.apply_ or restore_structure before load_state_dict; for ONNX call "
            "torch.onnx.export, to which low-rank factors are linear layers"
        )
        raise SettingError(f"expected a transformers model, got a {type(model).__name__}; {way}")
    other = getattr(model, "hf_quantizer", None)
    if not (other is None or isinstance(other, CompressionQuantizer) or _is_unpacked(other)):
        raise SettingError(
            f"the model is quantised by {type(other).__name__}; export it before it is quantised"
        )
    check_unwrapped(model)
    return model


def _is_unpacked(quantizer: Any) -> bool:
    """Return whether it is that of a GGUF file whose weights were all made plain tensors."""
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    return method == "gguf" and not getattr(quantizer, "packed_modules", None)


def _is_pretrained(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel)


@contextmanager
def _marked(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Mark the model as compressed while ``transformers`` saves it, and unmark it at the end."""
    config = model.config
    before = getattr(config, "quantization_config", None), getattr(model, "hf_quantizer", None)
    entry = CompressionConfig(plan.to_dict())
    config.quantization_config = entry
    model.__dict__["hf_quantizer"] = CompressionQuantizer(entry)
    try:
        yield
    finally:
        forget_structure_(model)
        if before[0] is not None:
            config.quantization_config = before[0]
        if before[1] is not None:
            model.__dict__["hf_quantizer"] = before[1]


def load_pretrained(folder: str | Path, model_class: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Load the model of an exported folder, in evaluation mode, all its parameters trainable.

    The folder is checked first: its files against their checksums, the plan against the sizes of
    the tensors, the model of ``config.json`` against both. Nothing in it can run code, and
    nothing is allocated that its own files could not fill.

    Args:
        folder: of :func:`save_pretrained`.
        model_class: a class of ``transformers`` to load instead of the one that was saved, such
            as ``AutoModelForSequenceClassification``, which may add a head of its own.
        **kwargs: of ``from_pretrained``: ``dtype``, ``device_map``, … but not those that are
            fixed here: ``config``, ``trust_remote_code``, ``use_safetensors``,
            ``local_files_only``, ``subfolder``, ``output_loading_info``, ``state_dict`` and
            ``quantization_config``.

    Returns:
        The model, with the values that were saved, bit for bit.

    Raises:
        CheckpointError: if the folder is not as it was written, or not by this package, or
            ``transformers`` cannot load it.
        SettingError: if ``kwargs`` has what is fixed here.
    """
    fixed = sorted(_FIXED & kwargs.keys())
    if fixed:
        raise SettingError(f"{fixed[0]} is fixed in load_pretrained; use from_pretrained for it")
    contents = read_folder(folder)
    try:
        return _loaded(contents, model_class, kwargs)
    except CheckpointError:
        raise
    except LRCompressError as error:
        raise CheckpointError(f"{contents.path} does not fit together: {error}") from error
    except Exception as error:  # whatever transformers makes of a strange config.json
        raise CheckpointError(
            f"transformers cannot load {contents.path}: {type(error).__name__}: {error}"
        ) from error


def _loaded(contents: Contents, model_class: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    given = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(contents.path, **given)
    chosen = _saved_class(contents) if model_class is None else model_class
    with torch.device("meta"):
        is_model = isinstance(chosen, type) and issubclass(chosen, PreTrainedModel)
        build = chosen if is_model else chosen.from_config
        empty = build(config)
        shape_(empty, contents.plan)
    own = {_stored(name, empty, contents): x for name, x in _own(empty).items()}
    state = empty.state_dict()
    beside = sum(x.nbytes for name, x in empty.named_buffers() if name not in state)
    check_model(contents, own, beside, whole=model_class is None)
    model, found = chosen.from_pretrained(
        contents.path,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        **given,
        **kwargs,
    )
    if model_class is None and found["missing_keys"]:
        raise CheckpointError(
            f"{contents.path}: {len(found['missing_keys'])} tensors of the model are not in the "
            f"weights, such as {min(found['missing_keys'])!r}"
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _own(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that the model would load, by name; tied ones once."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _stored(name: str, model: PreTrainedModel, contents: Contents) -> str:
    """Return the name in the folder, which may be that of another class of the same base model."""
    prefix = f"{model.base_model_prefix}."
    names = (name, prefix + name, name.removeprefix(prefix))
    return next((x for x in names if x in contents.tensors), name)


def _saved_class(contents: Contents) -> Any:
    """Return the model class that ``config.json`` names.

    Raises:
        CheckpointError: if it is no model of ``transformers``.
    """
    names = contents.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        models = [x for x in dir(transformers) if "For" in x or x.endswith("Model")]
        raise CheckpointError(
            f"{contents.path / CONFIG}: architectures must name a model class of transformers, got "
            f"{names!r}; nearest: {nearest(str(name), models)}"
        )
    return found
