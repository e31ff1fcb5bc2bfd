"""Plugin with which ``transformers`` builds factored layers before it loads their weights."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrcompress.errors import CheckpointError
from lrcompress.export.tensors import check_plan, read_headers
from lrcompress.nn import KINDS, LowRankSparseLinear, Replacement
from lrcompress.structure.plan import DENSE, LayerPlan, Plan

METHOD = "lrcompress"
VERSION = 1
_ALIGNED = 64  # bytes, as torch allocates
# A tensor name, for who loads the folder without this package: the error report shows it.
NOTICE = "to load this model: import lrcompress.export"


@register_quantization_config(METHOD)
class CompressionConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of a ``config.json``: the plan of a compressed model.

    Args:
        plan: the structure, as :meth:`~lrcompress.Plan.to_dict` gives it.
        version: of the format of this entry, a whole number from 1.
        quant_method: always ``lrcompress``.

    Raises:
        CheckpointError: if the version is no such number or later than this package knows, or
            ``plan`` describes no plan.

    Example:
        >>> CompressionConfig(Plan().to_dict()).to_dict()
        {'quant_method': 'lrcompress', 'version': 1, 'plan': {'version': 1, 'layers': []}}
    """

    def __init__(
        self, plan: Mapping[str, object], version: int = VERSION, quant_method: str = METHOD
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.version = check_version(version, "config.json")
        self.plan = check_read(plan, "config.json").to_dict()

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the entry that ``config_dict`` describes.

        Args:
            config_dict: with the keys ``quant_method``, ``version`` and ``plan``.
            return_unused_kwargs: return a pair of the entry and ``kwargs``.
            **kwargs: not used; ``transformers`` passes its own.

        Raises:
            CheckpointError: if it has other keys, or their values are not those of an entry.
        """
        keys = {"quant_method", "version", "plan"}
        if set(config_dict) != keys:
            raise CheckpointError(
                f"quantization_config of config.json must have the keys {', '.join(sorted(keys))}, "
                f"got {', '.join(map(str, config_dict))}"
            )
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


def check_version(version: object, where: str) -> int:
    """Return the version if this package can read it.

    Raises:
        CheckpointError: if it cannot.
    """
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{where} is of version {version}, this lrcompress reads {VERSION}; update it"
        )
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where} must have a version from 1 to {VERSION}, got {version!r}")
    return version


def check_read(plan: object, where: str) -> Plan:
    """Return the plan that an entry of a file describes.

    Raises:
        CheckpointError: if it describes none.
    """
    if not isinstance(plan, Mapping):
        raise CheckpointError(f"{where}: expected a plan, got {type(plan).__name__}")
    return Plan.from_dict(plan)


@register_quantizer(METHOD)
class CompressionQuantizer(HfQuantizer):
    """The ``transformers`` quantizer that builds the layers of the plan; nothing is quantised.

    ``from_pretrained`` makes one for a folder whose ``config.json`` has a
    :class:`CompressionConfig`. It checks the weight files against the plan, gives the model its
    structure on the ``meta`` device before its weights are loaded, and checks what was loaded.
    All parameters are plain float tensors and may be trained.

    Args:
        quantization_config: the entry of the config.
        **kwargs: of ``HfQuantizer``.

    Attributes:
        plan: the structure.

    Raises:
        CheckpointError: if the config holds no plan. While a model is loaded, also if the weight
            files do not fit the plan or hold values that no layer can have; and then
            NoMatchError, ShapeError or LayerError if the model does not fit the plan.
    """

    requires_calibration = True

    def __init__(self, quantization_config: CompressionConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan = Plan.from_dict(quantization_config.plan)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if checkpoint_files is not None:
            listed = read_headers(map(Path, checkpoint_files))
            check_plan(self.plan, listed, str(Path(checkpoint_files[0]).parent))
        shape_(model, self.plan)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        for name, module in model.named_modules():
            reason = module.inconsistency() if isinstance(module, Replacement) else None
            if reason is not None:
                raise CheckpointError(f"the weights of {name}: {reason}")
            if isinstance(module, LowRankSparseLinear):
                module.to(module.kept.device)  # so that it looks at what `kept` now holds
        align_(model)
        # every parameter is a plain float tensor: .half(), .float() and training may go on
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors and the metadata that ``save_pretrained`` writes.

        Among the tensors are markers, at which a loader without this package fails.
        """
        return {**model.state_dict(), **markers(Plan.of(model))}, {}

    def is_serializable(self) -> bool:
        """Return True: ``save_pretrained`` may save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: all parameters may be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: training needs no adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: ``torch.compile`` may be used."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> Any:
        back = (LayerPlan(x.name, DENSE, x.sizes) for x in Plan.of(model))
        return Plan(tuple(back)).apply_(model).to(dtype)


def markers(plan: Plan) -> dict[str, Tensor]:
    """Return marker tensors, with which loading the file as a dense model fails.

    Without them the layers of a dense model would stay random. Where that has ``name.weight`` the
    file has one of size 1, which every loader refuses. The name of one more says what to do.
    """
    return {key: torch.zeros(1, dtype=torch.uint8) for key in marker_names(plan)}


def marker_names(plan: Plan) -> list[str]:
    """Return the names of the marker tensors, which are no part of the model.

    A kind that has a weight of its own, of other sizes, needs none.
    """
    plain = [kind.kind for kind in KINDS.values() if "weight" in kind.sizing_tensors]
    return [NOTICE, *(f"{layer.name}.weight" for layer in plan if layer.kind not in plain)]


def shape_(model: PreTrainedModel, plan: Plan) -> None:
    """Give a model the structure of the plan, on any device, under the layer names of its class."""
    own = renamed(plan, model)
    own.apply_(model)
    ignored = {f"{re.escape(name)}$" for name in marker_names(own)}
    ignored |= {f"^{re.escape(name)}$" for name in marker_names(plan)}
    known = model._keys_to_ignore_on_load_unexpected
    kind = set if isinstance(known, set) else list  # which older versions add lists to
    model._keys_to_ignore_on_load_unexpected = kind([*(known or ()), *ignored])


def align_(model: nn.Module) -> None:
    """Copy CPU tensors whose memory is not aligned, as it is of those mapped from a file.

    Matrix kernels take other paths for them, and round otherwise: the same values would not
    give the same logits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNED:
            tensor.data = tensor.data.clone()


def renamed(plan: Plan, model: PreTrainedModel) -> Plan:
    """Return the plan with the layer names of another class of the same base model.

    ``encoder.layer.0`` of a BertModel is ``bert.encoder.layer.0`` of a classifier, and the other
    way round. Layers of another class's head are left out.
    """
    modules = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    has_body = any(layer.name.startswith(prefix) for layer in plan)
    names = {}
    for layer in plan:
        of_body = layer.name.startswith(prefix)
        other = layer.name.removeprefix(prefix) if of_body else prefix + layer.name
        name = layer.name if layer.name in modules or other not in modules else other
        if name in modules or of_body or not has_body:
            names[layer.name] = name
    kept = (layer for layer in plan if layer.name in names)
    return Plan(tuple(replace(x, name=names[x.name], tied=names.get(x.tied, "")) for x in kept))
