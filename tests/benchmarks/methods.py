"""Every method at several keeps, before and after an epoch of retraining, by the command line.

    python tests/benchmarks/methods.py sst2
    python tests/benchmarks/methods.py mrpc

Two epochs dense, once: ``lrcompress fit --config tests/benchmarks/sst2.yaml``, whose checkpoint
after epoch 2 holds every statistic. Then one run a cell resumes from it with another method, keep
and allocation, factors at the point and, at keep .3 and .1, trains one epoch more. Figures are
accuracies on the development set. Reports stay in ``runs/``; cells that have one are not run again.
"""

import json
import sys
from pathlib import Path

from lrcompress.cli import main

VARIANTS = [
    ("weighted_kfac", "global"),
    ("kfac", "global"),
    ("drone", "uniform"),
    ("fwsvd", "uniform"),
    ("svd", "uniform"),
    ("row_fisher", "global"),
    ("asvd", "uniform"),
]
MORE = [("weighted_kfac", "uniform"), ("kfac", "uniform"), ("row_fisher", "uniform")]
KEEPS = (0.5, 0.3, 0.2, 0.1)
RETRAINED = (0.3, 0.1)


def run(task: str, method: str, allocation: str, keep: float, retrain: bool) -> None:
    kind = "after" if retrain else "before"
    report = Path("runs") / task / f"{method}-{allocation}-{keep}-{kind}.json"
    if report.exists() and (not retrain or json.loads(report.read_text())["final"]):
        return
    dense = report.parent / "epoch=1.ckpt"
    # a time limit stops after the first step; a step limit confuses Lightning's resume
    length = [] if retrain else ["--trainer.max_time=00:00:00:01"]
    code = main(
        [
            "fit",
            f"--config=tests/benchmarks/{task}.yaml",
            f"--ckpt_path={dense}",
            "--trainer.callbacks=lrcompress.Factorize",
            "--trainer.callbacks.at=epoch:2",
            f"--trainer.callbacks.method={method}",
            f"--trainer.callbacks.allocation={allocation}",
            f"--trainer.callbacks.keep={keep}",
            "--trainer.callbacks.verbose=false",
            f"--trainer.callbacks.report_path={report}",
            "--trainer.enable_checkpointing=false",
            *length,
        ]
    )
    assert code == 0, (method, allocation, keep)


def figure(task: str, method: str, allocation: str, keep: float, kind: str) -> str:
    path = Path("runs") / task / f"{method}-{allocation}-{keep}-{kind}.json"
    if not path.exists():
        return ""
    report = json.loads(path.read_text())
    held = report["final"] if kind == "after" else report["points"][0]["metrics"]["after"]
    return f"{held['val_accuracy']:.3f}".removeprefix("0") if held else ""


def table(task: str) -> str:
    heads = [f"{k:g}"[1:] for k in KEEPS] + [f"{k:g}"[1:] + " after" for k in RETRAINED]
    lines = ["| method | ranks | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for method, allocation in VARIANTS + MORE:
        cells = [figure(task, method, allocation, keep, "before") for keep in KEEPS]
        cells += [figure(task, method, allocation, keep, "after") for keep in RETRAINED]
        if any(cells):
            lines.append(f"| `{method}` | {allocation} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    task = sys.argv[1]
    if not (Path("runs") / task / "epoch=1.ckpt").exists():
        assert main(["fit", f"--config=tests/benchmarks/{task}.yaml"]) == 0
    for keep in KEEPS:
        for method, allocation in VARIANTS:
            run(task, method, allocation, keep, retrain=False)
    for method, allocation in VARIANTS:
        for keep in RETRAINED:
            run(task, method, allocation, keep, retrain=True)
    for keep in KEEPS:
        for method, allocation in MORE:
            run(task, method, allocation, keep, retrain=False)
    print(table(task))
