"""A language model compressed without a Trainer, and healed by some steps with a teacher.

    python recipes/language_model.py MODEL --text train.txt --out runs/smaller

MODEL is a hub name or a folder of a causal language model, such as SmolLM2-135M. Without --text
it reads docstrings of installed libraries. Statistics come from a few batches; then low-rank layers
and narrowed feed-forward blocks share one budget. The dense model teaches the small one its
predictions. At the end low-rank layers are stored as pivoted rows, the smaller form.
"""

import argparse
import copy
import math
from pathlib import Path

import rich
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrcompress
from lrcompress.tasks import docstring_splits


def blocks(tokenizer: object, text: str, length: int, count: int) -> Tensor:
    """Return ``(count, length)`` tokens of a text, as many as there are."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = min(count, len(ids) // length)
    return ids[: rows * length].reshape(rows, length)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean loss of a predicted token."""
    return model(batch, labels=batch).loss


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """Return ``exp`` of the mean loss over all blocks."""
    model.eval()
    return math.exp(sum(float(loss_of(model, one[None])) for one in tokens) / len(tokens))


def heal(model: nn.Module, teacher: nn.Module, tokens: Tensor, steps: int) -> None:
    """Train the model on the text and, as much, to give the teacher's predictions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for step in range(steps):
        batch = tokens[step % len(tokens)][None]
        with torch.no_grad():
            wanted = teacher(batch).logits.log_softmax(-1).flatten(0, 1)
        output = model(batch, labels=batch)
        given = output.logits.log_softmax(-1).flatten(0, 1)
        apart = nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean")
        loss = 0.5 * output.loss + 0.5 * apart
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Compress, heal, and say what is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", default="runs/smaller")
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.text is None:
        pairs = docstring_splits(("numpy", "sympy", "torch"), {"train": 1500})["train"]
        text = "\n".join(one for one, _ in pairs[::2] + pairs[1::2])
    else:
        text = given.text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokens = blocks(tokenizer, text, given.length, given.blocks + 8)
    test, train = tokens[-8:], tokens[:-8]
    teacher = copy.deepcopy(model).eval()
    rich.print(f"perplexity, dense: {perplexity(model, test):.1f}")
    settings = {"keep": given.keep, "narrow_blocks": True, "mask": None}  # nothing is padded
    record = lrcompress.compress(model, [one[None] for one in train], loss_of, **settings)
    rich.print(f"perplexity, {record.keep:.2f} kept: {perplexity(model, test):.1f}")
    heal(model, teacher, train, given.steps)
    rich.print(f"perplexity, after {given.steps} steps: {perplexity(model, test):.1f}")
    lrcompress.store_pivoted_(model)
    lrcompress.save_pretrained(model, given.out, tokenizer, record)


if __name__ == "__main__":
    main()
