"""Compress a Llama-type model of 1.1 billion parameters in float32, and tell time and memory.

    python tests/benchmarks/large.py [--layers 16] [--threads 2]

Random weights, 32 × 128 random tokens, ``compress(method="kfac", keep=.5)``. The peak is that of
the whole process, as the operating system counts it.
"""

import argparse
import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrcompress import compress

GIB = 2**30


def main() -> None:
    """Build the model, compress it, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=32_000,
    )
    model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable()
    dense = sum(p.numel() for p in model.parameters())
    print(
        f"{dense / 1e9:.2f} billion parameters, {4 * dense / GIB:.2f} GiB; {peak():.2f} GiB so far"
    )
    ids = torch.randint(0, config.vocab_size, (32, 128))
    batches = [{"input_ids": one, "labels": one} for one in ids.split(4)]
    started = time.perf_counter()
    record = compress(
        model,
        batches,
        lambda model, batch: model(**batch).loss,
        method="kfac",
        keep=args.keep,
        mask=None,
    )
    seconds = time.perf_counter() - started
    print(
        f"keep {args.keep}: {record.model_after / 1e9:.2f} billion; {seconds:.0f} s, of which "
        f"{record.seconds:.0f} s the solve; statistics "
        f"{record.observed['bytes'] / GIB:.2f} GiB; peak {peak():.2f} GiB"
    )


def peak() -> float:
    """Return the most memory this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


if __name__ == "__main__":
    main()
