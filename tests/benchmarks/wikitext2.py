"""A small GPT-2 on WikiText-2: every method at several keeps, before and after a short retraining.

    python tests/benchmarks/wikitext2.py
    python tests/benchmarks/wikitext2.py METHOD ...      # some of them; --plain, --taught: half
    python tests/benchmarks/wikitext2.py --table         # the tables so far

A byte-pair vocabulary of 8,192 is learned from the training text; a model of 4 layers, 256 wide,
is trained for 2,700 steps of 2,048 tokens, once: some 20 minutes on 2 cores. Its checkpoint holds
every statistic. Then one run a cell resumes from it with another method and keep, factors, and
trains for 100 steps more, with and without the dense model as teacher. Figures are perplexities
over all of the test text. Reports stay in ``runs/``; cells that have one are not run again.
"""

import json
import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, PreTrainedTokenizerFast

from lrcompress.cli import main

CONFIG = "--config=tests/benchmarks/wikitext2.yaml"
RUNS = Path("runs/wikitext2")
DENSE = RUNS / "epoch=26.ckpt"
TEXT = "../shared/data/wikitext-2/train.txt"
VOCABULARY, POSITIONS = 8192, 256
METHODS = [
    "weighted_kfac",
    "kfac",
    "row_fisher",
    "drone",
    "asvd",
    "fwsvd",
    "svd",
    "kronecker",
]
KEEPS = (0.5, 0.3, 0.2)
LOGITS = '[{"class_path": "lrcompress.distill.Logits", "init_args": {"weight": 0.5}}]'


def make_model(folder: Path) -> None:
    end = "<|endoftext|>"
    found = ByteLevelBPETokenizer()
    found.train([TEXT], vocab_size=VOCABULARY, special_tokens=[end], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=found._tokenizer, eos_token=end, bos_token=end, unk_token=end
    )
    tokenizer.save_pretrained(folder)
    GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=256,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    ).save_pretrained(folder)


def place(method: str, keep: float, distilled: bool) -> Path:
    return RUNS / f"{method}-{keep}{'-distilled' if distilled else ''}.json"


def run(method: str, keep: float, distilled: bool) -> None:
    report = place(method, keep, distilled)
    if figures(report)[1]:
        return
    model = []
    if distilled:
        model = [
            "--model=lrcompress.Distilled",
            "--model.student=lrcompress.tasks.LanguageModelling",
            f"--model.student.path={RUNS}/model",
            "--model.student.pretrained=false",
            "--model.student.lr=1e-3",
            "--model.student.weight_decay=0.01",
            "--model.student.fused=true",
            "--model.student.warmup=0.03",
            "--model.task=0.5",
            f"--model.losses={LOGITS}",
        ]
    code = main(
        [
            "fit",
            CONFIG,
            f"--ckpt_path={DENSE}",
            "--trainer.callbacks=lrcompress.Factorize",
            "--trainer.callbacks.at=epoch:27",
            f"--trainer.callbacks.method={method}",
            f"--trainer.callbacks.keep={keep}",
            # the rate has fallen to 1/28 of its peak by then
            "--trainer.callbacks.restart_scale=10",
            "--trainer.callbacks.restart_steps=10",
            "--trainer.callbacks.verbose=false",
            f"--trainer.callbacks.report_path={report}",
            "--trainer.enable_checkpointing=false",
            "--trainer.check_val_every_n_epoch=1",
            f"--trainer.callbacks.validate={str(not distilled).lower()}",  # the same twice
            *model,
        ]
    )
    assert code == 0, (method, keep)


def figures(path: Path) -> tuple[float | None, float | None]:
    """Return the perplexity right after the point, and after retraining."""
    if not path.exists():
        return None, None
    report = json.loads(path.read_text())
    after = report["points"][0]["metrics"].get("after", {})
    return after.get("val_perplexity"), report["final"].get("val_perplexity")


def table() -> str:
    heads = [f"{keep:g}{kind}"[1:] for kind in ("", " →", " → distilled") for keep in KEEPS]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for method in METHODS:
        alone = [figures(place(method, keep, False)) for keep in KEEPS]
        taught = [figures(place(method, keep, True)) for keep in KEEPS]
        cells = [*(x[0] for x in alone), *(x[1] for x in alone), *(x[1] for x in taught)]
        shown = [f"{x:.0f}" if x and x >= 1000 else f"{x:.1f}" if x else "–" for x in cells]
        lines.append(f"| `{method}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--table" not in sys.argv:
        if not (RUNS / "model").exists():
            make_model(RUNS / "model")
        if not DENSE.exists():
            assert main(["fit", CONFIG]) == 0
        halves = [name == "--taught" for name in ("--plain", "--taught") if name in sys.argv]
        chosen = [method for method in METHODS if method in sys.argv]
        for distilled in halves or (False, True):
            for method in chosen or METHODS:
                for keep in KEEPS:
                    run(method, keep, distilled)
    print(table())
