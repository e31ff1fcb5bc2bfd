"""What compressing Llama models takes of each process, by formula: nothing is allocated.

    python tests/benchmarks/footprints.py [--method kfac]

Weights and AdamW in float32 (bf16-mixed), layers dealt over the processes for observing and
solving. Statistics count a tensor that several layers read (queries, keys and values; gate and
up) once. GB are 10⁹ bytes. Activations are not counted.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrcompress.distributed import Processes
from lrcompress.engine.footprint import footprint
from lrcompress.objective import METHODS
from lrcompress.statistics.capture import Recorder
from lrcompress.structure.selection import select

MODELS = {  # name: layers, width, inner, heads, vocabulary, processes
    "Llama-3-8B": (32, 4096, 14336, 32, 128_256, 8),
    "Llama-3-70B": (80, 8192, 28672, 64, 128_256, 64),
}
READERS = ("k_proj", "v_proj", "up_proj")  # of what q_proj and gate_proj read too
OF_INPUTS = ("input_moment", "input_sum", "input_abs")
COLUMNS = ("weights", "gradients", "optimizer", "statistics", "solve", "solutions", "checkpoint")


def llama(layers: int, width: int, inner: int, heads: int, words: int) -> LlamaForCausalLM:
    """Return a model without memory."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=words,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def statistics_bytes(recorder: Recorder, name: str) -> int:
    """Return the bytes of a layer's statistics, without what another one of its module holds."""
    shared = recorder.shapes[name] if name.endswith(READERS) else {}
    taken = sum(4 * torch.Size(shared[key]).numel() for key in OF_INPUTS if key in shared)
    return recorder.bytes_of(name) - taken


def main() -> None:
    """Print a table for every model, under FSDP2 and DDP."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="kfac", choices=METHODS)
    method = parser.parse_args().method
    print("GB of each process | " + " | ".join((*COLUMNS, "of all: statistics")))
    for name, (*sizes, count) in MODELS.items():
        model = llama(*sizes)
        names = select(model).names
        recorder = Recorder(model, names, METHODS[method].kinds)
        groups: dict[str, float] = {}
        for layer in names:
            parent = layer.rpartition(".")[0]
            groups[parent] = groups.get(parent, 0.0) + statistics_bytes(recorder, layer)
        owner = Processes(0, count).assign(groups)
        most = max(sum(b for g, b in groups.items() if owner[g] == i) for i in range(count))
        for kind in ("FSDP2", "DDP"):
            said = footprint(
                model,
                names,
                method,
                int(most),
                optimizers=[torch.optim.AdamW(model.parameters())],
                processes=count,
                sharded=kind == "FSDP2",
                of_all=int(sum(groups.values())),
                rate=1.0,
            )
            figures = [f"{getattr(said, column) / 1e9:.1f}" for column in COLUMNS]
            figures.append(f"{sum(groups.values()) / 1e9:.1f}")
            print(f"{name}, {count} x {kind} | " + " | ".join(figures))


if __name__ == "__main__":
    main()
