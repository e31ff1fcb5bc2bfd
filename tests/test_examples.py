"""The example scripts, run for a few steps on small models, each after the one it builds on."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lrcompress
from lrcompress.structure.plan import Plan

RECIPES = Path(__file__).parents[1] / "recipes"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script in this process, in a folder of its own; return what it printed."""

    def runs(script: str, *options: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *options])
        runpy.run_path(str(RECIPES / script), run_name="__main__")
        return capsys.readouterr().out

    return runs


def test_a_module_of_ones_own_trains_in_two_processes_and_is_served(
    launch: Callable[..., list[str]], run: Run, tiny_bert: Path, tmp_path: Path
) -> None:
    few = ["--model", str(tiny_bert), "--rows", "128", "--steps", "4", "--out", "own"]
    spread = ["--strategy", "ddp", "--devices", "2"]
    script = tmp_path / "script.py"
    lines = ["import runpy, sys", f"sys.argv[1:] = {few + spread!r}"]
    lines.append(f"runpy.run_path({str(RECIPES / 'own_module.py')!r}, run_name='__main__')")
    script.write_text("\n".join(lines))
    first, second = launch(script, 2)
    assert "what was lost and gained" in first
    assert "val_accuracy" in first
    assert "lost and gained" not in second
    assert len(Plan.of(lrcompress.load_pretrained(tmp_path / "own"))) > 0
    report = json.loads((tmp_path / "own" / "report.json").read_text())
    assert report["points"][0]["observed"]["tokens"] > 0

    told = run("serve_onnx.py", "own", "a film", "a very dull film")
    assert "the largest difference to the model is" in told
    assert re.findall(r"class \d: (.*)", told) == ["a film", "a very dull film"]


def test_a_language_model_is_compressed_and_healed(
    tiny_bert: Path, run: Run, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(tmp_path / "gpt2")
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    config = GPT2Config(vocab_size=len(tokenizer), **sizes, **ends)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "train.txt").write_text("a very good film, and a very dull movie.\n" * 100)
    few = ["--text", "train.txt", "--length", "32", "--blocks", "16", "--steps", "12"]
    told = run("language_model.py", "gpt2", *few, "--out", "out")
    dense, cut, healed = (float(line.rpartition(" ")[2]) for line in told.splitlines())
    assert min(dense, cut, healed) > 1
    assert "0.6 kept" in told or "0.60 kept" in told
    assert len(Plan.of(lrcompress.load_pretrained(tmp_path / "out"))) > 0


CHATTY = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_chat_model_is_tuned_compressed_healed_and_answers_without_this_package(
    tiny_bert: Path, run: Run, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.chat_template = CHATTY
    tokenizer.save_pretrained(tmp_path / "llama")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **ends)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    talk = [
        {"role": "user", "content": "a film"},
        {"role": "assistant", "content": "a very dull film, and a very good movie"},
    ]
    for part in ("train", "val"):
        (tmp_path / f"{part}.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 32)
    few = ["--steps", "4", "--batch", "4", "--length", "48", "--answer", "6", "--ask", "a film"]
    told = run("chat.py", "llama", "--chats", "train.jsonl", *few, "--out", "out")
    assert "what was lost and gained" in told
    answer = told.partition("Without this package it answers:")[2].strip()
    (point,) = json.loads((tmp_path / "out" / "report.json").read_text())["points"]
    assert 0 < point["observed"]["tokens"] < 4 * 2 * 48 / 2, "the answers alone"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    given = tokenizer("user: a film\nassistant: ", return_tensors="pt", add_special_tokens=False)
    found = model.generate(given["input_ids"], max_new_tokens=6, do_sample=False)
    wanted = tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.split() == wanted.split()


def test_the_notebook_runs_from_first_to_last_cell(tiny_bert: Path, tmp_path: Path) -> None:
    """In a kernel of its own; the cell after that of its settings puts stand-ins in their place."""
    client = pytest.importorskip("nbclient", reason="notebooks need lrcompress[test]")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="notebooks need lrcompress[test]")
    notebook = nbformat.read(RECIPES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    tags = [cell.metadata.get("tags") for cell in notebook.cells]
    few = {"train_size": 96, "val_size": 12, "test_size": 12}
    stand_ins = nbformat.v4.new_code_cell(f"MODEL = {str(tiny_bert)!r}\nTEXTS = {few}")
    notebook.cells.insert(tags.index(["parameters"]) + 1, stand_ins)
    place = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=120, resources=place).execute()
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert "what was lost and gained" in shown
    assert len(Plan.of(lrcompress.load_pretrained(tmp_path / "runs" / "minilm-30"))) > 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_starts_with_its_command(path: Path) -> None:
    assert f"python recipes/{path.name}" in path.read_text().split('"""')[1]
