"""SmolLM2-135M on WikiText-2: perplexity of every storage at several keeps, without training.

    python tests/benchmarks/smollm2.py FOLDER [--keep .8 .6 .4] [--storage balanced]
        [--narrow [low_rank]] [--refit .5] [--held-out]

FOLDER holds the model and its tokenizer as ``save_pretrained`` writes them. All linear layers of
its blocks are factored by ``kfac`` with global ranks, from statistics of 48 × 512 tokens of the
training text; figures are perplexities of 16 × 512 tokens of the test text. The statistics are
kept in a file (``--statistics``) for the next call: some ten minutes of one core the first time,
then about two a figure. ``--refit`` solves left factors anew on windows of the same training text.
Anchors are to be compared by ``--held-out``: figures are of 16 windows of training text then, which
neither statistics nor refitting have seen.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrcompress import observe
from lrcompress.engine.compress import factor_
from lrcompress.engine.passes import Passes
from lrcompress.engine.refit import Before, Refit
from lrcompress.engine.settings import Settings
from lrcompress.nn import PrunedLinear
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.feed_forward import Blocks, BlockTrace
from lrcompress.structure.selection import select

DATA = Path("../shared/data/wikitext-2")
WINDOW = 512


def loaded(folder: Path) -> nn.Module:
    """Return the dense model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def windows(folder: Path, part: str, count: int) -> Tensor:
    """Return the first tokens of a text, ``(count, 512)``."""
    text = (DATA / f"{part}.txt").read_text()[: 12 * count * WINDOW]
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    return ids[: count * WINDOW].view(count, WINDOW)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean loss of the tokens of one window ``(512,)``."""
    return model(input_ids=ids[None], labels=ids[None], use_cache=False).loss  # type: ignore[no-any-return]


@torch.no_grad()
def perplexity(model: nn.Module, texts: Tensor) -> float:
    """Return the perplexity of windows ``(count, 512)``, each by itself."""
    return math.exp(sum(loss_of(model, ids).item() for ids in texts) / len(texts))


def observed(model: nn.Module, texts: Tensor, cache: Path) -> Statistics:
    """Return the statistics of ``kfac``, from the file if there is one, else observed and kept."""
    found = Statistics()
    if cache.exists():
        found.load_state_dict(torch.load(cache, weights_only=True), "cpu")
        return found
    with observe(model, method="kfac") as recorder:
        for number, ids in enumerate(texts):
            with recorder.step(keep_outputs=True):
                loss = loss_of(model, ids)
                recorder.commit(float(WINDOW - 1), terms=WINDOW - 1)
                torch.autograd.grad(loss, recorder.outputs)
            print(f"observed {number + 1} of {len(texts)}", flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(recorder.statistics.state_dict(), cache)
    return recorder.statistics


def blocks_of(model: nn.Module, ids: Tensor) -> Blocks:
    """Return the feed-forward blocks, as one pass shows them."""
    trace = BlockTrace(model, select(model).names)
    with trace.forward():
        loss = loss_of(model, ids[:16])
    return trace.blocks(loss)


def refit_(
    model: nn.Module, layers: Before, passes: Passes, anchor: float, blocks: Blocks | None
) -> None:
    """Refit a model that was factored, as ``Settings(refit=anchor)`` does."""
    started, refit = time.perf_counter(), Refit(model, layers, passes, anchor)
    found = blocks.found if blocks else ()
    narrow = (b for b in found if isinstance(model.get_submodule(b.down), PrunedLinear))
    refit.run_({block.down: block.ups for block in narrow})
    print(f"{refit.note} ({time.perf_counter() - started:.0f} s)", flush=True)


def main() -> None:
    """Print a Markdown table: a row a storage, a column a keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--storage", nargs="+", default=["balanced", "pivoted"])
    parser.add_argument(
        "--narrow",
        nargs="?",
        const=True,
        default=False,
        help="feed-forward blocks may be narrowed; 'low_rank': with low rank on top",
    )
    parser.add_argument("--refit", type=float, nargs="+", default=[], help="anchors, one a row")
    parser.add_argument("--refit-windows", type=int, default=48)
    parser.add_argument("--held-out", action="store_true", help="figures of training text")
    parser.add_argument("--statistics", type=Path, default=Path("runs/smollm2/statistics.pt"))
    args = parser.parse_args()
    dense = loaded(args.folder)
    train = windows(args.folder, "train", 64)
    statistics = observed(dense, train[:48], args.statistics)
    texts = train[48:] if args.held_out else windows(args.folder, "test", 16)
    print(f"dense {perplexity(dense, texts):.1f}", flush=True)
    blocks = blocks_of(dense, texts[0]) if args.narrow else None
    del dense
    passes = Passes([*train[: args.refit_windows]], loss_of, lambda _: (None, None, None))
    for storage in args.storage:
        cells: dict[float | None, list[str]] = {anchor: [] for anchor in (None, *args.refit)}
        for keep in args.keep:
            given = {"keep": keep, "storage": storage, "narrow_blocks": args.narrow}
            model = loaded(args.folder)
            layers = Before.of(model, select(model).names)
            print(factor_(model, statistics, Settings(**given), blocks=blocks).note, flush=True)
            factored = {name: x.clone() for name, x in model.state_dict().items()}
            for anchor, row in cells.items():
                if anchor is not None:
                    model.load_state_dict(factored)
                    refit_(model, layers, passes, anchor, blocks)
                row.append(f"{perplexity(model, texts):.2f}")
                print(f"{storage}, keep {keep:g}, refit {anchor}: {row[-1]}", flush=True)
        print("| storage | refit | " + " | ".join(f"{keep:g}" for keep in args.keep) + " |")
        print("|---|---|" + "---|" * len(args.keep))
        for anchor, row in cells.items():
            print(f"| {storage} | {anchor or ''} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
