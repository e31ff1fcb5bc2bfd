"""A chat model from fine-tuning to an answer: compressed, healed, exported, read without us.

    python recipes/chat.py MODEL --chats train.jsonl --out runs/small-chat

MODEL is a hub name or a folder of a causal language model whose tokenizer has a chat template, such
as SmolLM2-135M-Instruct. A row of the file is ``{"messages": [{"role": …, "content": …}, …]}``; the
answers alone count, in the loss and in the statistics. Without --chats the conversations are about
docstrings of installed libraries. One fit does it all: half of its steps train the dense model,
then its layers are compressed, and in the other half the dense model of that moment is the teacher.
What is exported has its own modelling code. Another interpreter loads it, which cannot import
lrcompress: this one, or --python that of another environment with torch and transformers.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import rich
from rich.markup import escape

import lrcompress
from lrcompress.distill import Logits
from lrcompress.tasks import LanguageData, LanguageModelling, docstring_splits

LIBRARIES = ("numpy", "sympy", "torch")
ANSWER = """
import sys
sys.modules["lrcompress"] = None  # importing it fails from here on
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, question, tokens = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
asked = [{"role": "user", "content": question}]
given = tokenizer.apply_chat_template(
    asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
given = {key: given[key] for key in ("input_ids", "attention_mask")}
found = model.generate(**given, max_new_tokens=int(tokens), do_sample=False)
print(tokenizer.decode(found[0, given["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def write_chats(folder: Path, rows: int) -> Path:
    """Write conversations about docstrings for training and validation; return the first file."""
    sizes = {"train": rows, "val": max(24, rows // 8)}
    for part, pairs in docstring_splits(LIBRARIES, sizes).items():
        lines = []
        for text, library in pairs:
            asked = f"Complete this docstring of {library}: {' '.join(text.split()[:5])}"
            both = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
            lines.append(json.dumps({"messages": both}))
        (folder / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "train.jsonl"


def main() -> None:
    """Fine-tune, compress, heal, export, and let another process answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--chats", type=Path)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--out", type=Path, default=Path("runs/small-chat"))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--ask", default="Complete this docstring of numpy: Return the eigenvalues")
    parser.add_argument("--answer", type=int, default=32, help="tokens of the answer")
    given = parser.parse_args()
    L.seed_everything(0, verbose=False)
    given.out.mkdir(parents=True, exist_ok=True)
    data = LanguageData(
        tokenizer=given.model,
        messages="messages",
        train=str(given.chats or write_chats(given.out, rows=given.batch * given.steps // 2)),
        length=given.length,
        batch_size=given.batch,
        eval_batch_size=given.batch,
    )
    student = LanguageModelling(given.model, lr=given.lr, schedule="cosine")
    model = lrcompress.Distilled(student, losses=[Logits(weight=0.5, temperature=1.0)], task=0.5)
    half = f"step:{given.steps // 2}"
    callback = lrcompress.Factorize(
        keep=given.keep,
        at=half,
        window=half,
        every_n_steps=1,
        narrow_blocks=True,
        storage="pivoted",
        report_path=str(given.out / "report.json"),
    )
    trainer = L.Trainer(
        max_steps=given.steps,
        limit_val_batches=16,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    lrcompress.export.save_remote_code(model.model, given.out, data.tokenizer)
    asked = [given.python, "-c", ANSWER, str(given.out), given.ask, str(given.answer)]
    done = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True)
    rich.print(f"{given.out} holds the model and its code. Without this package it answers:")
    rich.print(escape(done.stdout))


if __name__ == "__main__":
    main()
