"""What the optimum of a large table costs: seconds and memory, against products of its size.

    python tests/benchmarks/embedding_cost.py [--vocabulary 250000] [--width 768] [--rank 128]

Times depend on the machine; the ratio to one float32 product ``Eᵀ E`` of the same table in the same
run does so less. Memory is the peak of the process, with the table itself in it.
"""

import argparse
import resource
import time

import torch

from lrcompress.solvers.embedding import truncate_embedding


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("vocabulary", 250_000), ("width", 768), ("rank", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.manual_seed(0)
    start = peak()
    table = torch.randn(given.vocabulary, given.width)
    rows = 1 / torch.arange(1.0, given.vocabulary + 1)  # as words are read
    x = torch.randn(4 * given.width, given.width)
    held = peak()
    began = time.perf_counter()
    _ = table.mT @ table
    product = time.perf_counter() - began
    for name, columns in (("frequency", None), ("frequency and head", x.mT @ x)):
        began = time.perf_counter()
        factors = truncate_embedding(table, rows, columns).factors(given.rank)
        taken = time.perf_counter() - began
        print(
            f"{given.vocabulary:,} × {given.width} to rank {given.rank}, {name}: {taken:.1f} s, "
            f"{taken / product:.1f} × EᵀE in float32; peak {peak():.2f} GiB, of which "
            f"{held - start:.2f} the table; error {factors.error:.3f}, "
            f"{torch.get_num_threads()} threads"
        )


if __name__ == "__main__":
    main()
