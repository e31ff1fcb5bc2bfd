"""What a low-rank layer with rows costs, as ratios measured in one run.

    python tests/benchmarks/sparse_cost.py [--threads 1] [--rounds 15] [--batch 32] [--length 128]
        [--only compacted|pruned]

Layers keep .2 of their parameters, a quarter of that low rank and the rest in rows. First the
compacted layer beside the dense one, without gradients, with the ways there are to put the rows
where they belong. Then the layer as it is pruned, forward and backward, beside the masked form
``left (right x) + (rows x) mask`` at several shares of rows alive. Each figure is a median over
rounds, in which all contestants take turns: how many times faster than the form it is named for.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.nn import LowRankSparseLinear

SIZES = [(768, 3072), (3072, 768), (384, 1536), (1536, 384), (384, 384)]
KEEP, LOW_RANK_SHARE = 0.2, 0.25
ALIVE = (1.0, 0.95, 0.7, 0.4, 0.15)


class Masked(nn.Module):
    """Computes everything and multiplies by zero what is pruned."""

    def __init__(self, layer: LowRankSparseLinear) -> None:
        super().__init__()
        self.right, self.rows = (nn.Parameter(p.detach()) for p in (layer.right, layer.rows))
        self.left, self.mask = layer.left, layer.kept[layer.rank :].float()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(F.linear(x, self.right)) + F.linear(x, self.rows) * self.mask


def placings(layer: LowRankSparseLinear) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return other ways to compute a compacted layer."""
    rank, index, inner = layer.rank, layer.index, layer.inner.weight
    position = torch.full((layer.out_features,), layer.num_rows)
    position = position.index_copy(0, index, torch.arange(layer.num_rows))

    def scatter(x: Tensor) -> Tensor:
        z = F.linear(x, inner)
        rows = z[..., rank:]
        return layer.left(z[..., :rank]).scatter_add_(-1, index.expand_as(rows), rows)

    def index_add(x: Tensor) -> Tensor:
        z = F.linear(x, inner)
        return layer.left(z[..., :rank]).index_add_(-1, index, z[..., rank:])

    def apart(x: Tensor) -> Tensor:
        rows = F.linear(x, inner[rank:])
        y = layer.left(F.linear(x, inner[:rank]))
        return y.scatter_add_(-1, index.expand_as(rows), rows)

    def gather(x: Tensor) -> Tensor:
        z = F.linear(x, inner)
        return layer.left(z[..., :rank]).add_(F.pad(z[..., rank:], (0, 1))[..., position])

    return {"scatter_add": scatter, "index_add": index_add, "two products": apart, "gather": gather}


def clock() -> float:
    """Seconds; of this process alone where one thread does the work, whatever else runs."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def faster(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return how many times faster each is than the first, and the first's milliseconds."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for warm in work.values():
        warm()
    for _ in range(rounds):
        for name, call in work.items():
            start = clock()
            call()
            taken[name].append(clock() - start)
    first, *others = taken
    times = {
        name: statistics.median(a / b for a, b in zip(taken[first], taken[name], strict=True))
        for name in others
    }
    return {first: 1e3 * statistics.median(taken[first]), **times}


def row(name: str, figures: Mapping[str, float]) -> None:
    print(f"{name:>22}", *(f"{key} {figure:6.2f}" for key, figure in figures.items()), sep="  ")


def rank_of(in_features: int, out_features: int) -> int:
    low_rank = LOW_RANK_SHARE * KEEP * in_features * out_features
    return max(1, round(low_rank / (in_features + out_features)))


def compacted(in_features: int, out_features: int, x: Tensor, rounds: int) -> None:
    dense = nn.Linear(in_features, out_features)
    rank = rank_of(in_features, out_features)
    num_rows = round((1 - LOW_RANK_SHARE) * KEEP * out_features)
    whole = LowRankSparseLinear.in_place_of(dense, rank)
    alive = torch.randperm(out_features)[:num_rows]
    kept = torch.ones(rank + out_features, dtype=torch.bool)
    kept[rank:] = torch.isin(torch.arange(out_features), alive)
    masked = Masked(whole.prune_(kept))
    layer = whole.compacted()
    assert isinstance(layer, LowRankSparseLinear)
    forms = {"dense ms": dense, "layer": layer, **placings(layer), "masked": masked}
    with torch.no_grad():
        for form in forms.values():
            assert form is dense or torch.allclose(form(x), layer(x), atol=1e-4)
        figures = faster({n: (lambda f=f: f(x)) for n, f in forms.items()}, rounds)
    row(f"{in_features}x{out_features}", figures)


def pruned(in_features: int, out_features: int, x: Tensor, rounds: int) -> None:
    rank = rank_of(in_features, out_features)
    g = torch.randn(*x.shape[:-1], out_features)
    for share in ALIVE:
        layer = LowRankSparseLinear(in_features, out_features, rank, out_features)
        kept = torch.rand(rank + out_features) < share
        kept[:rank] = True
        masked = Masked(layer.prune_(kept))

        def step(model: nn.Module) -> None:
            model.zero_grad()
            model(x).backward(g)

        def look(model: nn.Module) -> None:
            with torch.no_grad():
                model(x)

        for what, call in (("forward", look), ("step", step)):
            work = {"masked ms": masked, "layer": layer}
            figures = faster({n: (lambda m=m: call(m)) for n, m in work.items()}, rounds)  # noqa: B023
            row(f"{in_features}x{out_features} {share} {what}", figures)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", choices=["compacted", "pruned"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{args.threads} threads, {args.batch}x{args.length} tokens; times faster than the first")
    for measure in (compacted, pruned):
        if args.only not in (None, measure.__name__):
            continue
        for sizes in SIZES:
            x = torch.randn(args.batch, args.length, sizes[0], requires_grad=measure is pruned)
            measure(*sizes, x, args.rounds)


if __name__ == "__main__":
    main()
