"""What a metric of few tokens predicts, and what other tokens then lose: two layers of MiniLM.

    python tests/benchmarks/few_tokens.py FOLDER

FOLDER holds MiniLM and its tokenizer, which read sentences of SST-2. Layers are truncated in the
metric of ``drone``. A row a number of tokens; the cells are predicted / measured, as shares of what
the whole layer gives. Half an hour of one core.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from lrcompress.solvers.truncation import truncate

DATA = Path("../shared/data/sst2/train.tsv")
LAYERS = {"encoder.layer.2.intermediate.dense": 192, "encoder.layer.4.output.dense": 48}
OTHERS = 8000  # tokens to measure on


@torch.no_grad()
def read_by(folder: Path, names: list[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model, and the tokens that layers read, in random order."""
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [row.split("\t", 1)[1].strip() for row in DATA.read_text("utf-8").splitlines()[:2000]]
    read: dict[str, list[Tensor]] = {name: [] for name in names}
    mask = torch.ones(0)
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, held=read[name]: held.append(args[0][mask].double())
        )
    for start in range(0, len(rows), 32):
        batch = tokenizer(rows[start : start + 32], padding=True, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        model(**batch)
    order = torch.Generator().manual_seed(0)
    every = {name: torch.cat(parts) for name, parts in read.items()}
    return model, {n: x[torch.randperm(len(x), generator=order)] for n, x in every.items()}


def lost(change: Tensor, moment: Tensor) -> float:
    """Return ``tr(D C Dᵀ)``."""
    return float((change @ moment * change).sum())


def main() -> None:
    """Print a line a number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    model, read = read_by(parser.parse_args().folder, list(LAYERS))
    for name, rank in LAYERS.items():
        weight, x = model.get_submodule(name).weight.detach().double(), read[name]
        seen, others = x[OTHERS:], x[:OTHERS].mT @ x[:OTHERS] / OTHERS
        whole = lost(weight, others)
        print(f"{name}, {tuple(weight.shape)}, rank {rank}", flush=True)
        for share in (0.5, 1, 2, 4, 8, 16):
            count = int(share * weight.shape[1])
            if count > len(seen):
                break
            moment = seen[:count].mT @ seen[:count] / count
            found = truncate(weight, None, moment, most=rank).factors(rank)
            change = weight - found.left @ found.right
            told, true = lost(change, moment) / whole, lost(change, others) / whole
            print(f"{share:g} tokens an input: {told:.4f} / {true:.4f}", flush=True)


if __name__ == "__main__":
    main()
