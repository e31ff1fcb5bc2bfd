"""``lrcompress bench``: a compressed folder beside its dense form, or another, in one command."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from lrcompress.bench.decoding import GeneratingModel
from lrcompress.bench.models import Batch
from lrcompress.cli import main
from lrcompress.export import load_pretrained, save_pretrained
from lrcompress.nn import FactoredLinear
from lrcompress.structure.plan import LayerPlan, Plan


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    """A compressed classifier; its body is that of the tiny BERT."""
    model = tf.BertForSequenceClassification.from_pretrained(tiny_bert)
    names = [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]
    sizes = {"in": 64, "out": 32, "rank": 5}
    Plan(tuple(LayerPlan(name, "low_rank", sizes) for name in names)).apply_(model)
    save_pretrained(model, tmp_path / "small")
    return tmp_path / "small"


def bench(*options: str | Path) -> int:
    return main(["bench", *map(str, options), "--rounds=2"])


def test_a_compressed_model_is_measured_beside_its_dense_form(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, record = torch.get_num_threads(), tmp_path / "made" / "bench.json"
    options = "--threads=1", "--shapes=4x16,1x8", f"--json={record}"
    assert bench(folder, *options) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(record.read_text())
    small, dense = found["models"][str(folder)], found["models"]["its dense form"]
    saved = 2 * (64 * 32 - 5 * 96)
    assert dense["parameters"] - small["parameters"] == saved
    assert small["stored_bytes"] == (folder / "model.safetensors").stat().st_size
    assert dense["stored_bytes"] == 4 * dense["parameters"]
    assert [(run["batch"], run["length"]) for run in found["runs"]] == [(4, 16), (1, 8)]
    for run in found["runs"]:
        speeds = run["speeds"]
        flops = [speeds[name]["flops"] for name in found["models"]]
        assert flops[1] - flops[0] == 2 * run["batch"] * run["length"] * saved
        assert run["share_of_ideal"] == pytest.approx(run["faster"] / run["ideal"])
        assert [layer["keep"] for layer in run["layers"]] == [5 * 96 / (64 * 32)] * 2
    said = capsys.readouterr()
    assert "lrcompress bench: torch" in said.out
    assert "32×64" in said.out
    assert "lrcompress bench: 4 × 16, eager on cpu: 2 calls of each model" in said.err


@pytest.mark.parametrize(
    ("load", "threads", "told"), [(3.2, 2, True), (3.2, 1, False), (0.4, 2, False)]
)
def test_a_busy_machine_is_told(
    load: float,
    threads: int,
    told: bool,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert bench(folder, "--shapes=1x8", f"--threads={threads}") == 0
    said = capsys.readouterr().err
    assert ("this machine was busy in the last minute (load 3.2)" in said) == told


def test_another_model_of_its_kind_is_given_the_same_head(
    folder: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    record = tmp_path / "bench.json"
    options = "--shapes=1x8", "--dtype=bfloat16", f"--json={record}"
    assert bench(folder, tiny_bert, *options) == 0
    found = json.loads(record.read_text())
    assert len(found["runs"][0]["layers"]) == 2
    small, dense = (found["models"][str(path)]["parameters"] for path in (folder, tiny_bert))
    assert dense - small == 2 * (64 * 32 - 5 * 96)
    assert bench(tiny_bert, *options) == 0  # alone
    found = json.loads(record.read_text())
    assert (list(found["models"]), found["runs"][0]["faster"]) == ([str(tiny_bert)], None)


def test_what_was_typed_wrong_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tf.ViTConfig().save_pretrained(tmp_path / "images")
    tf.ViTModel(
        tf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "images")
    for options, code, message in [
        ([], 2, "the following arguments are required: model; usage: lrcompress bench"),
        ([folder, "--shape", "1x8"], 2, "unrecognized arguments: --shape"),
        ([folder, "--shapes", "32"], 2, "expected BATCHxLENGTH such as 32x128,1x32, got '32'"),
        ([folder, "--modes", "fast"], 2, "expected some of eager,compiled, got 'fast'"),
        ([folder, "--threads", "0"], 2, "expected a whole number from 1, got '0'"),
        ([folder, "--devices", "gpu"], 2, "--devices: expected some of cpu,cuda, got 'gpu'"),
        ([folder, "--shapes", "1x65"], 1, "reads at most 64 tokens, got length 65"),
        ([tmp_path / "images"], 1, "makes up token ids, which a vit model does not read"),
        ([tmp_path / "none"], 1, "there is no folder"),
        ([tmp_path / "none.onnx"], 1, "there is no file"),
    ]:
        assert bench(*options) == code, options
        assert message in capsys.readouterr().err, options


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(folder, "--devices=cuda") == 1
    assert "torch finds no CUDA device here; leave cuda out" in capsys.readouterr().err


def test_a_graph_is_not_compared_with_a_module(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").touch()
    tf.AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "graph")
    assert bench(tmp_path / "graph", folder) == 2
    assert "expected two models for torch or two for onnxruntime" in capsys.readouterr().err


@pytest.fixture
def writer(tiny_bert: Path, tmp_path: Path) -> Path:
    """A compressed language model of 64 positions."""
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 200}
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **ends))
    name = "transformer.h.0.mlp.c_fc"
    Plan((LayerPlan(name, "low_rank", {"in": 32, "out": 128, "rank": 5}),)).apply_(model)
    save_pretrained(model, tmp_path / "writer")
    return tmp_path / "writer"


def test_a_language_model_generates_beside_its_dense_form(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "bench.json"
    assert bench(writer, "--decode=6", "--shapes=2x16,1x57", f"--json={record}") == 0
    found = json.loads(record.read_text())
    assert [(run["batch"], run["length"]) for run in found["runs"]] == [(2, 16), (1, 57)]
    for run in found["runs"]:
        small, dense = run["models"].values()
        assert dense["read_bytes"] - small["read_bytes"] == 4 * (32 * 128 - 5 * 160)
        assert run["promised"] == dense["read_bytes"] / small["read_bytes"]
        assert run["share_of_promised"] == pytest.approx(run["faster"] / run["promised"])
        assert min(small["tokens_per_second"], small["first_token_seconds"]) > 0
        assert small["peak_bytes"] > small["read_bytes"]
    said = capsys.readouterr().out
    assert "tokens after the first" in said
    assert "its dense form" in said


def test_models_decode_with_their_factors_by_columns(
    writer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out = []

    class Seen(GeneratingModel):
        def call(self, batch: Batch) -> tuple[float, float]:
            factors = [m.factors for m in self.model.modules() if isinstance(m, FactoredLinear)]
            laid_out.append([factor.stride(0) for pair in factors for factor in pair])
            return super().call(batch)

    monkeypatch.setattr("lrcompress.cli.bench.GeneratingModel", Seen)
    assert bench(writer, "--decode=2", "--shapes=1x8") == 0
    assert next(strides for strides in laid_out if strides) == [1, 1]
    assert [] in laid_out  # the dense form has no factors


CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}a film"


@pytest.mark.parametrize("chat", [False, True])
def test_both_models_answer_prompts_side_by_side(
    chat: bool,
    writer: Path,
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(writer)
    prompts, record = ["a very good", "dull [/b]"], tmp_path / "bench.json"
    asked = [f"--prompt={text}" for text in prompts]
    assert bench(writer, "--decode=6", "--shapes=1x8", f"--json={record}", *asked) == 0
    texts = json.loads(record.read_text())["texts"]
    model = load_pretrained(writer).eval()
    for prompt in prompts:
        wanted = []
        read = f"user: {prompt} a film" if chat else prompt
        ids = tokenizer(read, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
        for _ in range(6):  # without a cache, by hand
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            wanted.append(int(ids[0, -1]))
            if wanted[-1] == 3:  # the end of the text
                break
        small, dense = texts[prompt].values()
        assert small == dense == tokenizer.decode(wanted, skip_special_tokens=True).strip()
    told = capsys.readouterr().out
    assert "the likeliest text after each prompt" in told
    assert "dull [/b]" in told


def test_a_translator_answers_with_what_its_decoder_says(tiny_bart: Path, tmp_path: Path) -> None:
    record = tmp_path / "bench.json"
    place = f"--json={record}"
    assert bench(tiny_bart, "--decode=4", "--shapes=1x8", place, "--prompt=a good film") == 0
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_bart)
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(tiny_bart)
    given = tokenizer("a good film", return_tensors="pt")
    given = {name: given[name] for name in ("input_ids", "attention_mask")}
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 4}
    (found,) = model.generate(**given, **settings)
    ((said,),) = (x.values() for x in json.loads(record.read_text())["texts"].values())
    assert said == tokenizer.decode(found, skip_special_tokens=True).strip()


def test_what_cannot_be_decoded_is_told(
    folder: Path, writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").touch()
    tf.AutoConfig.from_pretrained(writer).save_pretrained(tmp_path / "graph")
    for options, code, message in [
        ([writer, "--decode", "0"], 2, "expected a whole number from 1, got '0'"),
        ([writer, "--decode=6", "--modes=compiled"], 2, "--decode generates with eager models"),
        ([tmp_path / "graph", "--decode=6"], 2, "--decode generates with eager models"),
        ([writer, "--decode=6", "--shapes=1x58"], 1, "at most 64 tokens, got length 58 and 7 more"),
        ([folder, "--decode=6", "--shapes=1x8"], 1, "BertForSequenceClassification does not"),
        ([writer, "--prompt=a"], 2, "--prompt is answered in so many tokens: give --decode TOKENS"),
        (
            [writer, "--decode=6", "--shapes=1x8", "--prompt=a"],
            1,
            "has no tokenizer to read it with",
        ),
    ]:
        assert bench(*options) == code, options
        assert message in capsys.readouterr().err, options
