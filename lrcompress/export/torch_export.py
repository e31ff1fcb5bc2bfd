"""Export to a ``torch.export`` program, for any batch and length, checked against the model."""

import copy
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from lrcompress.errors import ExportError, SettingError
from lrcompress.export.pretrained import checked_model

PROGRAM = "model.pt2"
TOLERANCE = 1e-4  # of the largest output; float32 rounding of deep models stays a tenth of it
Inputs = Mapping[str, Tensor]
Run = Callable[[Inputs], dict[str, Tensor]]


def export_program(
    model: nn.Module, folder: str | Path, example: Inputs, tokenizer: Any = None
) -> float:
    """Write a model to a folder as a program of ``torch.export``, with its config and tokenizer.

    ``torch.export.load(folder / "model.pt2").module()`` needs neither this package nor
    ``transformers``; it takes a dict of the example's names, with any batch and length, and gives
    a dict of tensors. It is checked: loaded again, and compared with the model at two other
    batches and lengths. No file is written if anything is wrong.

    Args:
        model: a ``transformers`` model in float32 on the CPU, factored or not; it is not changed.
        folder: is made if need be; files of these names in it are written over.
        example: what the model is called with, by name, ``(batch, …)`` each; where there are two
            axes the second is the length. The batch is at least 2, a length at least 4.
        tokenizer: or processor, whose own ``save_pretrained`` is called.

    Returns:
        The largest absolute difference to the model's own outputs.

    Raises:
        SettingError: if ``model`` is no ``transformers`` model in float32 on the CPU or is
            quantised, or ``example`` does not fit.
        ExportError: if the model cannot be traced, or an output of the program is off by more
            than 1e-4 of its largest value (of 1 where that is less).
    """
    with traced(model, example) as (checked, program), into(folder) as place:
        torch.export.save(program, place / PROGRAM)
        loaded = torch.export.load(place / PROGRAM).module()
        difference = compare(loaded, checked, example)
        save_beside(checked, place, tokenizer)
    return difference


@contextmanager
def traced(model: nn.Module, example: Inputs) -> Iterator[tuple[PreTrainedModel, ExportedProgram]]:
    """Yield the model and its graph; the model is in evaluation mode until the block ends.

    Raises:
        SettingError: if the model or the example cannot be used.
        ExportError: if the model cannot be traced.
    """
    checked = checked_model(model)
    kinds = {f"{p.dtype} on {p.device}" for p in checked.parameters()}
    if kinds != {"torch.float32 on cpu"}:
        raise SettingError(
            f"expected a model in float32 on the CPU, got {', '.join(sorted(kinds))}"
        )
    _check_example(example)
    shapes = {name: dict.fromkeys(axes(name, x), Dim.DYNAMIC) for name, x in example.items()}
    inputs = {name: x.contiguous() for name, x in example.items()}
    with _evaluating(checked), quiet():
        try:
            program = torch.export.export(
                _Named(checked), (inputs,), dynamic_shapes={"inputs": shapes}, strict=False
            )
        except Exception as error:  # whatever stands in the way of tracing
            raise ExportError(
                f"torch.export cannot trace {type(checked).__name__} for any batch and length: "
                f"{type(error).__name__}: {error}"
            ) from error
        yield checked, program


class _Named(nn.Module):
    """Wrap a model to take and return a dict of tensors, as the graph does, without caches."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return outputs_of(self.model, inputs)


def outputs_of(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors among the outputs of a ``transformers`` model, by name."""
    outputs = model(**inputs, return_dict=True)
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def axes(name: str, tensor: Tensor) -> dict[int, str]:
    """Return the dynamic axes of an input, and their names."""
    length = "decoder_length" if name.startswith("decoder_") else "length"
    return {0: "batch", 1: length} if tensor.ndim == 2 else {0: "batch"}


def _check_example(example: Inputs) -> None:
    """Check that the example is of tensors of one batch, large enough to be made smaller.

    Raises:
        SettingError: if it cannot.
    """
    least = {0: 2, 1: 4}
    for name, x in example.items():
        if not isinstance(x, Tensor) or any(x.shape[i] < least[i] for i in axes(name, x)):
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise SettingError(
                f"example: expected {name} to be a tensor of two of a batch, and four of a length "
                f"if it has one, at least; got {shape}"
            )
    if len({x.shape[0] for x in example.values()}) != 1:
        raise SettingError(
            f"example: expected tensors of one batch, got {_sizes(example) or 'none'}"
        )


def compare(run: Run, model: PreTrainedModel, example: Inputs) -> float:
    """Return the largest difference of a graph to its model, at two other batches and lengths.

    Raises:
        ExportError: if it is more than rounding, the outputs have other names or shapes, or the
            graph fails.
    """
    largest = 0.0
    for inputs in (_resized(example, larger=False), _resized(example, larger=True)):
        expected, where = outputs_of(model, inputs), f"for inputs of sizes {_sizes(inputs)}"
        try:
            found = run(inputs)
        except Exception as error:  # whatever the graph was not made for
            raise ExportError(f"the graph fails {where}: {error}") from error
        if _sizes(found) != _sizes(expected):
            raise ExportError(
                f"the graph gives {_sizes(found)}, the model {_sizes(expected)}, {where}"
            )
        for name, value in expected.items():
            difference = float((found[name] - value).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(value.abs().max())):
                raise ExportError(f"{name} of the graph are {difference:.2g} off {where}")
            largest = max(largest, difference)
    return largest


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _resized(example: Inputs, larger: bool) -> dict[str, Tensor]:
    """Return the example with another batch and another length, by repeating and leaving out."""
    inputs = dict(example)
    for name, x in example.items():
        for axis in axes(name, x):
            size = x.shape[axis]
            length, batch = (size - 1, 2 * size + 1) if larger else (size // 2, 1)
            taken = torch.arange(length if axis else batch) % size
            inputs[name] = inputs[name].index_select(axis, taken)
    return inputs


@contextmanager
def into(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files are moved to ``folder`` if the block succeeds."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path) as place:
        yield Path(place)
        for file in Path(place).iterdir():
            shutil.move(file, path / file.name)


def save_beside(model: PreTrainedModel, place: Path, tokenizer: Any) -> None:
    """Write the config, without its ``quantization_config``, and the tokenizer."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    config.save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of the exporters: their own deprecations, and packages not needed."""
    loggers = [logging.getLogger(name) for name in ("", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode without gradients for a block, and restore the modes at its end."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
