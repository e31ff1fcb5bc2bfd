"""SmolLM2-135M on WikiText-2, compressed and then healed by some steps with a teacher.

    python tests/benchmarks/heal.py FOLDER [--keep .8 .6 .4] [--steps 24] [--rate 2e-4] [--task 0]
        [--schedule constant] [--teach start] [--dense] [--part test]

FOLDER, statistics and text are those of ``smollm2.py``. Feed-forward blocks may be narrowed, ranks
are those of pivoted rows, and what is healed are the balanced factors of the same matrices. Each
step reads 512 tokens that statistics have not seen. Its loss is ``task`` times that of the text,
and ``1 − task`` times the divergence from the teacher's predictions. The teacher is the dense
model as it came (``start``), or after the same steps on the text (``tuned``). With ``--dense`` the
dense model takes the steps itself, with the loss of the text. Choose settings by ``--part valid``.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from smollm2 import blocks_of, loaded, observed, perplexity, windows
from torch import Tensor, nn

from lrcompress.distill.functional import soft_kl_divergence
from lrcompress.engine.compress import factor_
from lrcompress.engine.settings import Settings

SEEN = 64  # windows of the training text that statistics or comparisons have read


def train_(
    model: nn.Module, teacher: nn.Module | None, texts: Tensor, given: argparse.Namespace
) -> None:
    """Train a model, a step a window ``(512,)`` of texts."""
    started, steps = time.perf_counter(), len(texts)
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
    print(f"{steps} steps in {time.perf_counter() - started:.0f} s", flush=True)


def settings(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """Yield every combination of what was given several times."""
    names = ("steps", "rate", "task", "temperature", "schedule")
    for values in itertools.product(*(getattr(args, name) for name in names)):
        yield argparse.Namespace(**dict(zip(names, values, strict=True)))


def compressed(folder: Path, keep: float, statistics: Path) -> nn.Module:
    """Return the model in closed form, as balanced factors and narrower layers."""
    model = loaded(folder)
    train = windows(folder, "train", 48)
    found = observed(model, train, statistics)
    blocks = blocks_of(model, train[0])
    given = Settings(keep=keep, storage="pivoted", narrow_blocks=True)
    print(factor_(model, found, given, blocks=blocks, train_balanced=True).note, flush=True)
    return model


def main() -> None:
    """Print a line a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.8, 0.6, 0.4])
    parser.add_argument("--steps", type=int, nargs="+", default=[24])
    parser.add_argument("--rate", type=float, nargs="+", default=[2e-4])
    parser.add_argument("--task", type=float, nargs="+", default=[0.0])
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument(
        "--schedule", choices=["constant", "linear"], nargs="+", default=["constant"]
    )
    parser.add_argument("--teach", choices=["start", "tuned"], default="start")
    parser.add_argument("--dense", action="store_true", help="train the dense model as well")
    parser.add_argument("--seed", type=int, default=0, help="which training windows are read")
    parser.add_argument("--part", choices=["valid", "test"], default="test")
    parser.add_argument("--statistics", type=Path, default=Path("runs/smollm2/statistics.pt"))
    args = parser.parse_args()
    texts = windows(args.folder, args.part, 16)
    first = SEEN + args.seed * max(args.steps)
    train = windows(args.folder, "train", first + max(args.steps))[first:]
    teacher = loaded(args.folder)
    print(f"dense: {perplexity(teacher, texts):.2f}", flush=True)
    for given in settings(args) if args.dense or args.teach == "tuned" else ():
        tuned = loaded(args.folder)
        train_(tuned, None, train[: given.steps], given)
        print(f"dense, {vars(given)}: {perplexity(tuned, texts):.2f}", flush=True)
        teacher = tuned if args.teach == "tuned" else teacher
    for keep in args.keep:
        model = compressed(args.folder, keep, args.statistics)
        print(f"keep {keep:g}: {perplexity(model, texts):.2f}", flush=True)
        closed = {name: x.clone() for name, x in model.state_dict().items()}
        for given in settings(args):
            model.load_state_dict(closed)
            train_(model, teacher, train[: given.steps], given)
            print(f"keep {keep:g}, {vars(given)}: {perplexity(model, texts):.2f}", flush=True)


if __name__ == "__main__":
    main()
