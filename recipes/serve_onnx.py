"""Serve a compressed classifier with onnxruntime alone: no torch, no lrcompress in the server.

    python recipes/serve_onnx.py own-module "Return the eigenvalues of a matrix."

The folder is one of lrcompress.save_pretrained, with a tokenizer, such as recipes/own_module.py
leaves it. It becomes one ONNX file, which is compared with the model before it counts as written.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import rich
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import lrcompress
from lrcompress.export import export_onnx

EXAMPLE = ["one short text", "another one, which is longer than the first"]


def write(folder: Path) -> None:
    """Write ``folder/onnx/model.onnx`` from the compressed model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    example = dict(tokenizer(EXAMPLE, padding=True, return_tensors="pt"))
    model = lrcompress.load_pretrained(folder)
    difference = export_onnx(model, folder / "onnx", example, tokenizer)
    rich.print(f"written; the largest difference to the model is {difference:.2g}")


def answers(folder: Path, texts: list[str]) -> np.ndarray:
    """Return the class of each text, as a server would: by tokenizers, numpy and onnxruntime."""
    tokenizer = Tokenizer.from_file(str(folder / "onnx" / "tokenizer.json"))
    tokenizer.enable_padding()
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    found = tokenizer.encode_batch(texts)
    columns = {
        "input_ids": np.array([one.ids for one in found]),
        "attention_mask": np.array([one.attention_mask for one in found]),
        "token_type_ids": np.array([one.type_ids for one in found]),
    }
    inputs = {one.name: columns[one.name] for one in session.get_inputs()}
    (logits,) = session.run(["logits"], inputs)
    return logits.argmax(1)


def main() -> None:
    """Write the graph if there is none, then answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", nargs="*", default=EXAMPLE)
    given = parser.parse_args()
    if not (given.folder / "onnx" / "model.onnx").exists():
        write(given.folder)
    for text, answer in zip(given.texts, answers(given.folder, given.texts), strict=True):
        rich.print(f"class {answer}: {text}")


if __name__ == "__main__":
    main()
