"""What a GPU takes to observe, to solve and to run factors: tables in Markdown.

    python tests/benchmarks/gpu.py [--layers 8] [--rounds 11]
    python tests/benchmarks/gpu.py --device cpu --small        # only that it runs

First the training step of a Llama-type model under bf16 autocast (float32 weights, AdamW), plain
and observed for ``kfac``. Then a point: one block of the shapes of Llama-2-7B, solved by ``kfac``
at keep .5 on the device and on the host; the model has 32 of them. Last, layers in bf16 beside
their factors at keep .5, with many calls between two synchronisations; a training call is one
forward and one backward pass. Peaks are those of torch's allocator, above what was there before.
"""

import argparse
import copy
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lrcompress.bench.timing import interleaved, ratio
from lrcompress.engine.compress import factor_
from lrcompress.engine.settings import Settings
from lrcompress.nn import LowRankLinear
from lrcompress.objective import METHODS
from lrcompress.statistics.capture import Recorder

GIB = 2**30
BLOCKS = 32  # of Llama-2-7B
EVERY = 10  # steps, of which one is observed


def peak(device: torch.device, work: Callable[[], object]) -> str:
    """Return the most GiB that ``work`` took on the device, where it counts them."""
    if device.type != "cuda":
        work()
        return "–"
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / GIB:.2f}"


def table(title: str, heads: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table in Markdown, row by row, as each is measured."""
    heads = list(heads)
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def training(device: torch.device, args: argparse.Namespace) -> Iterable[list[object]]:
    """Yield time and peak of plain and of observed steps."""
    width = 64 if args.small else 2048
    config = LlamaConfig(
        num_hidden_layers=2 if args.small else args.layers,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_attention_heads=width // 32 if args.small else width // 64,
        num_key_value_heads=2 if args.small else 8,
        vocab_size=500 if args.small else 32_000,
    )
    model = LlamaForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    names = Settings(keep=0.5).select(model).names
    recorder = Recorder(model, names, METHODS["kfac"].kinds)
    shape = (2, 16) if args.small else (8, 1024)
    ids = torch.randint(0, config.vocab_size, shape, device=device)
    mask = torch.ones_like(ids)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(input_ids=ids, attention_mask=mask, labels=ids).loss

    def step(observe: bool) -> None:
        optimizer.zero_grad()
        if observe:
            with recorder.step(mask):
                value = loss()
                recorder.commit(float(len(ids)))
                value.backward()
        else:
            loss().backward()
        optimizer.step()

    step(False), step(True)  # the optimizer's state and the sums are there from now on
    work = {"plain": partial(step, False), "observed": partial(step, True)}
    peaks = {name: peak(device, call) for name, call in work.items()}
    taken = interleaved(work, args.rounds, calls=1 if args.small else 3)
    plain, more = taken["plain"], ratio(taken["observed"], taken["plain"])
    tokens = ids.numel()
    yield ["plain", f"{1e3 * statistics.median(plain):.1f}", "1.00", peaks["plain"], tokens]
    seen = 1e3 * statistics.median(taken["observed"])
    yield ["every step observed", f"{seen:.1f}", f"{more:.2f}", peaks["observed"], tokens]
    amortised = 1 + (more - 1) / EVERY
    mean = amortised * 1e3 * statistics.median(plain)
    name = f"every {EVERY}th observed"
    yield [name, f"{mean:.1f}", f"{amortised:.2f}", peaks["observed"], tokens]


class Block(nn.Module):
    """The seven layers of a Llama-type block, without its softmax and its norms."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) * self.k(x).sigmoid() + self.v(x))
        return x + self.down(self.gate(x).relu() * self.up(x))


def solving(device: torch.device, args: argparse.Namespace) -> Iterable[list[object]]:
    """Yield time and peak of solving one block on the device and on the host."""
    width, inner = (128, 344) if args.small else (4096, 11_008)
    block = Block(width, inner).to(device)
    names = [name for name, _ in block.named_children()]
    recorder = Recorder(block, names, METHODS["kfac"].kinds)
    x = torch.randn(256 if args.small else 16_384, width, device=device)
    with recorder.step(), torch.autocast(device.type, torch.bfloat16):
        block(x).square().mean().backward()
    block.zero_grad()
    del x
    settings = Settings(method="kfac", keep=0.5, targets=["*"])
    if device.type == "cuda":  # its libraries take memory and time at their first use
        factor_(copy.deepcopy(block), recorder.statistics, settings)
    places = {device: None, torch.device("cpu"): None}
    for place in places:
        model = copy.deepcopy(block).to(place)
        started = time.perf_counter()

        def solve(model: nn.Module = model) -> None:
            factor_(model, recorder.statistics, settings)
            if device.type == "cuda":
                torch.cuda.synchronize()

        most = peak(device, solve)
        seconds = time.perf_counter() - started
        where = place.type if place.type != "cpu" else f"host, {torch.get_num_threads()} threads"
        yield [where, f"{seconds:.2f}", f"{BLOCKS * seconds / 60:.2f}", most]


def layers(device: torch.device, args: argparse.Namespace) -> Iterable[list[object]]:
    """Yield the times of dense and of factored layers by size and shape of the batch."""
    sizes = [(64, 64), (64, 256)] if args.small else [
        (1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096), (11_008, 4096), (4096, 11_008),
    ]  # fmt: skip
    shapes = [(1, 1), (2, 8)] if args.small else [(1, 1), (32, 1), (1, 128), (8, 512), (16, 2048)]
    calls = 2 if args.small else 50
    for out_features, in_features in sizes:
        rank = out_features * in_features // (2 * (out_features + in_features)) // 8 * 8
        dense = nn.Linear(in_features, out_features, bias=False)
        factored = LowRankLinear(in_features, out_features, rank, bias=False)
        work = {"dense": dense, "factored": factored}
        for model in work.values():
            model.to(device, torch.bfloat16)
        for shape in shapes:
            x = torch.randn(*shape, in_features, device=device, dtype=torch.bfloat16)
            cells: list[object] = [
                f"{out_features} × {in_features}",
                rank,
                f"{shape[0]} × {shape[1]}",
            ]
            for call in (forward, trained):
                mine = {name: partial(call, model, x) for name, model in work.items()}
                taken = interleaved(mine, args.rounds, calls)
                cells += [f"{1e6 * statistics.median(one):.1f}" for one in taken.values()]
                cells.append(f"{ratio(taken['dense'], taken['factored']):.2f}")
            cells += [peak(device, partial(trained, model, x)) for model in work.values()]
            yield cells


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def trained(model: nn.Module, x: Tensor) -> None:
    y = model(x.detach().requires_grad_())
    torch.autograd.grad(y, [*model.parameters()], torch.ones_like(y))


def main() -> None:
    """Measure and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--small", action="store_true", help="sizes that show only that it runs")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model that is trained")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is false: --device cpu --small tries it without")
    torch.manual_seed(0)
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
    print(f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    if args.small:
        print("\nSmall sizes: the figures mean nothing.")
    heads = ["step", "ms", "× plain", "peak GiB", "tokens"]
    table("Training step, bf16 autocast, `kfac`:", heads, training(device, args))
    heads = ["one block solved on", "seconds", f"minutes for {BLOCKS}", "peak GiB on the device"]
    table("A point, `kfac`, keep .5, Llama-2-7B:", heads, solving(device, args))
    heads = ["out × in", "rank", "batch", "dense µs", "factored µs", "× faster"]
    heads += ["dense trained µs", "factored trained µs", "× faster trained"]
    heads += ["dense peak GiB", "factored peak GiB"]
    table("Layers in bf16, keep .5:", heads, layers(device, args))


if __name__ == "__main__":
    main()
