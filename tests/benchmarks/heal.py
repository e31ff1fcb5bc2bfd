"""SmolLM2-135M on WikiText-2, compressed and then healed by some steps with a teacher.

    python tests/benchmarks/heal.py FOLDER [--keep .8 .6 .4] [--steps 24] [--rate 5e-5] [--task .5]
        [--narrow low_rank] [--first 24] [--schedule constant] [--dense] [--part test]

FOLDER, statistics and text are those of ``smollm2.py``. Feed-forward blocks may be narrowed, ranks
are those of pivoted rows, and what is healed are the balanced factors of the same matrices. Each
step reads 512 tokens that nothing has read before. Its loss is ``task`` times that of the text,
and ``1 − task`` times the divergence from the teacher's predictions. The teacher is the dense
model. With ``--first`` it takes so many steps on the text itself before it is observed and
compressed, at a rate of 2e-4; its statistics are kept in a file of their own. With ``--dense``
the dense model takes the steps of healing too, at 2e-4, with the loss of the text. Choose settings
by ``--part valid``.
"""

import argparse
import copy
import itertools
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from smollm2 import blocks_of, loaded, observed, perplexity, windows
from torch import Tensor, nn

from lrcompress.distill.functional import soft_kl_divergence
from lrcompress.engine.compress import factor_
from lrcompress.engine.settings import Settings
from lrcompress.statistics.moments import Statistics

SEEN = 64  # windows of the training text that statistics or comparisons have read


def train_(
    model: nn.Module, teacher: nn.Module | None, texts: Tensor, given: argparse.Namespace
) -> None:
    """Train a model, a step a window ``(512,)`` of texts."""
    started, steps = time.process_time(), len(texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for ids in texts:
        output = model(input_ids=ids[None], labels=ids[None], use_cache=False)
        loss = output.loss
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(input_ids=ids[None], use_cache=False).logits
            apart = soft_kl_divergence(output.logits, wanted, given.temperature)
            loss = given.task * loss + (1 - given.task) * apart
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if given.schedule == "linear":
            rate.step()
    model.eval()
    print(f"{steps} steps in {time.process_time() - started:.0f} s", flush=True)


def settings(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """Yield every combination of what was given several times."""
    names = ("steps", "rate", "task", "temperature", "schedule")
    for values in itertools.product(*(getattr(args, name) for name in names)):
        yield argparse.Namespace(**dict(zip(names, values, strict=True)))


def compressed(dense: nn.Module, found: Statistics, texts: Tensor, given: Settings) -> nn.Module:
    """Return the model in closed form, as balanced factors and narrower layers."""
    model, started = copy.deepcopy(dense), time.process_time()
    blocks = blocks_of(model, texts[0])
    print(factor_(model, found, given, blocks=blocks, train_balanced=True).note)
    print(f"solved in {time.process_time() - started:.0f} s", flush=True)
    return model


def main() -> None:
    """Print a line a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.8, 0.6, 0.4])
    parser.add_argument("--steps", type=int, nargs="+", default=[24])
    parser.add_argument("--rate", type=float, nargs="+", default=[5e-5])
    parser.add_argument("--task", type=float, nargs="+", default=[0.5])
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument(
        "--schedule", choices=["constant", "linear"], nargs="+", default=["constant"]
    )
    parser.add_argument("--narrow", choices=["blocks", "low_rank"], default="low_rank")
    parser.add_argument("--first", type=int, default=0, help="steps of the dense model before")
    parser.add_argument("--dense", action="store_true", help="train the dense model as well")
    parser.add_argument("--seed", type=int, default=0, help="which training windows are read")
    parser.add_argument("--part", choices=["valid", "test"], default="test")
    parser.add_argument("--statistics", type=Path, default=Path("runs/smollm2/statistics.pt"))
    args = parser.parse_args()
    texts = windows(args.folder, args.part, 16)
    first = SEEN + args.seed * (args.first + max(args.steps))
    train = windows(args.folder, "train", first + args.first + max(args.steps))
    observed_texts, before = train[:48], train[first : first + args.first]
    train = train[first + args.first :]
    dense, on_text = loaded(args.folder), argparse.Namespace(rate=2e-4, schedule="constant")
    statistics, blocks = args.statistics, True if args.narrow == "blocks" else "low_rank"
    if args.first:
        train_(dense, None, before, on_text)
        statistics = statistics.with_name(f"statistics-{args.first}-{args.seed}.pt")
    print(f"dense: {perplexity(dense, texts):.2f}", flush=True)
    started = time.process_time()
    found = observed(dense, observed_texts, statistics)
    print(f"observed in {time.process_time() - started:.0f} s", flush=True)
    if args.dense:
        tuned = copy.deepcopy(dense)
        train_(tuned, None, train, on_text)
        print(f"dense, {len(train)} steps: {perplexity(tuned, texts):.2f}", flush=True)
    for keep in args.keep:
        given = Settings(keep=keep, storage="pivoted", narrow_blocks=blocks)
        model = compressed(dense, found, observed_texts, given)
        print(f"keep {keep:g}: {perplexity(model, texts):.2f}", flush=True)
        closed = {name: x.clone() for name, x in model.state_dict().items()}
        for setting in settings(args):
            model.load_state_dict(closed)
            train_(model, dense, train[: setting.steps], setting)
            print(f"keep {keep:g}, {vars(setting)}: {perplexity(model, texts):.2f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
