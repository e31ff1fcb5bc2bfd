"""Every figure in the terminal, and a warning of layers that gained nothing."""

from rich.console import Console
from torch import nn

from lrcompress.bench import LayerTime, Run, Speed, TorchModel
from lrcompress.bench.tables import bench_table


def text_of(*runs: Run) -> str:
    subjects = [TorchModel(name, nn.Linear(8, 8, bias=False)) for name in ("small", "dense")]
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(bench_table(subjects, runs, "Title"))
    return capture.get()


def run(*layers: LayerTime) -> Run:
    speeds = {
        "small": Speed([0.01], 32, 3 * 2**20, 10**9),
        "dense": Speed([0.02], 32, None, None),
    }
    return Run("eager", "cpu", 32, 128, speeds, 2.0, 2.5, list(layers))


def test_sizes_times_and_the_share_of_the_ideal() -> None:
    lines = [line.split() for line in text_of(run()).splitlines()]
    assert ["small", "64", "0.0"] in lines
    wanted = "cpu eager 32×128 small 10.0 10.0 3200.0 3 1.00 2.00 2.50 0.80"
    assert wanted.split() in lines
    assert ["dense", "20.0", "20.0", "1600.0"] in lines
    assert "factored layers" not in text_of(run())


def test_layers_are_shown_by_size_and_slow_ones_by_name() -> None:
    kinds = [LayerTime(f"layer.{i}", 4, 8, 1 + i % 2, 0.5, 0.2, 0.1, 0.1, 0.5) for i in range(4)]
    slow = [LayerTime(f"slow.{i}", 8, 8, 2, 0.5, 0.1, 0.2, 0.1, 2.0 + i) for i in range(8)]
    text = text_of(run(*kinds, *slow))
    rows = [line.split() for line in text.splitlines()]
    assert ["4×8", "4", "1–2", "2.00", "(2.00)"] in rows
    assert ["8×8", "8", "2", "0.50", "(2.00)"] in rows
    told = " ".join(text.split())
    assert "warning: 8 of 12 factored layers take longer than plain ones on cpu, 32×128" in told
    assert "slow.7 (rank 2) 9.00 ×" in told
    assert "slow.2 (rank 2) 4.00 ×, and 2 more" in told
