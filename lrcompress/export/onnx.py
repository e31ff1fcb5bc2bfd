"""Export to ONNX in float32 or with int8 weights, and run with onnxruntime."""

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
    batches and lengths. No file is written if anything is wrong.

    Args:
        model: a ``transformers`` model in float32 on the CPU, factored or not; it is not changed.
        folder: is made if need be; files of these names in it are written over, and what
            :func:`quantize_onnx` made of an earlier one is removed.
        example: what the model is called with, by name, ``(batch, …)`` each; where there are two
            axes the second is the length. The batch is at least 2, a length at least 4.
        tokenizer: or processor, whose own ``save_pretrained`` is called.

    Returns:
        The largest absolute difference to the model's own outputs.

    Raises:
        SettingError: if a package is missing, ``model`` is no ``transformers`` model in float32
            on the CPU or is quantised, or ``example`` does not fit.
        ExportError: if the model cannot be traced or has no ONNX form, or an output of the file
            is off by more than 1e-4 of its largest value (of 1 where that is less).
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
    (Path(folder) / INT8).unlink(missing_ok=True)
    return difference


def quantize_onnx(folder: str | Path) -> Path:
    """Write ``model.int8.onnx`` beside ``model.onnx``, and return its path.

    Dynamic quantization of onnxruntime: every matrix, factors and embeddings too, is kept in int8
    with one scale; activations are quantised while it runs, with a scale of their own in every
    product. The outputs differ from those of ``model.onnx``; by how much is not checked.

    Args:
        folder: of :func:`export_onnx`.

    Raises:
        SettingError: if onnxruntime or onnx is not installed.
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
        threads: most threads for one operation; 0 lets onnxruntime choose.

    Returns:
        ``run({name: tensor}) -> {name: tensor}``, of tensors on the CPU. Inputs that the graph
        does not take are left out.

    Raises:
        SettingError: if onnxruntime is not installed.
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
    """Import and return a package that only ONNX export needs.

    Raises:
        SettingError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingError(
            f'ONNX files need {name}, which is not installed: pip install "lrcompress[onnx]"'
        ) from error
