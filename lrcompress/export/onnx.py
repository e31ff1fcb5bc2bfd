"""ONNX files that onnxruntime runs as torch runs the model, in float32 and with weights in int8."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import ExportError, SettingError
from lrcompress.export.torch_export import (
    Inputs,
    Run,
    axes,
    compare,
    into,
    outputs_of,
    quiet,
    save_beside,
    traced,
)

ONNX, INT8 = "model.onnx", "model.int8.onnx"


def export_onnx(
    model: nn.Module, folder: str | Path, example: Inputs, tokenizer: Any = None
) -> float:
    """Write a model to a folder as ``model.onnx``, with its config and tokenizer.

    The inputs have the example's names, the outputs those of the model; batch and length are
    free. The file is checked: run by onnxruntime, and compared with the model at two other
    batches and lengths.

    Args:
        model: as in :func:`export_program`, and so are the others.
        folder: is made if need be.
        example: what the model is called with, by name.
        tokenizer: or processor.

    Returns:
        The largest difference to the model's own outputs.

    Raises:
        SettingError: if a package is missing, ``model`` is no ``transformers`` model in float32
            on the CPU, or ``example`` does not fit.
        ExportError: if the model cannot be traced or has no ONNX form, or the file computes
            something else.
    """
    _package("onnxscript")
    _package("onnxruntime")
    with traced(model, example) as (checked, program), into(folder) as place:
        names = {name: axes(name, x) for name, x in example.items()}
        try:
            graph = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(example),
                output_names=list(outputs_of(checked, example)),
                dynamic_shapes={"inputs": names},
            )
        except Exception as error:  # operations that ONNX has not
            reason: BaseException = error
            while reason.__cause__ is not None:
                reason = reason.__cause__
            raise ExportError(
                f"torch.onnx cannot write {type(checked).__name__}: {reason}"
            ) from error
        assert graph is not None
        graph.save(place / ONNX)
        difference = compare(run_onnx(place / ONNX), checked, example)
        save_beside(checked, place, tokenizer)
    return difference


def quantize_onnx(folder: str | Path) -> Path:
    """Write ``model.int8.onnx`` beside ``model.onnx``, and return where it is.

    Every matrix, factors and embeddings too, is kept in int8 with one scale; activations are
    quantised while it runs, with a scale of their own in every product.

    Args:
        folder: of :func:`export_onnx`.
    """
    quantization = _package("onnxruntime.quantization")
    source, target = Path(folder) / ONNX, Path(folder) / INT8
    with quiet():
        quantization.quantize_dynamic(source, target, weight_type=quantization.QuantType.QInt8)
    return target


def run_onnx(path: str | Path, threads: int = 0) -> Run:
    """Return a function from named inputs to named outputs, run by onnxruntime on the CPU.

    Args:
        path: of the file.
        threads: that it may use; 0 lets onnxruntime choose.
    """
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = [x.name for x in session.get_inputs()]
    given = [x.name for x in session.get_outputs()]

    def run(inputs: Inputs) -> dict[str, Tensor]:
        outputs = session.run(given, {name: inputs[name].numpy() for name in taken})
        return {name: torch.from_numpy(x) for name, x in zip(given, outputs, strict=True)}

    return run


def _package(name: str) -> Any:
    """Return a package that only this format needs.

    Raises:
        SettingError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingError(
            f'ONNX files need {name}, which is not installed: pip install "lrcompress[onnx]"'
        ) from error
