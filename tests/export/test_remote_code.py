"""Folders with their own modelling code load where this package is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from lrcompress.errors import SettingError
from lrcompress.export import load_pretrained, save_pretrained
from lrcompress.export.remote_code import save_remote_code
from lrcompress.structure.plan import LayerPlan, Plan

from .conftest import inputs, made

ALONE = """
import sys
sys.modules["lrcompress"] = None  # any import of it fails
import torch, transformers as t
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(t, auto).from_pretrained(folder, trust_remote_code=True)
    batch = torch.load(folder + "/batch.pt")
    with torch.no_grad():
        logits = model(**batch).logits
    found = {"logits": logits, "parameters": sum(p.numel() for p in model.parameters())}
    if model.can_generate():
        asked = {"input_ids": batch["input_ids"][:1, :4], "max_new_tokens": 8, "do_sample": False}
        found["cached"] = model.generate(**asked, use_cache=True)
        found["plain"] = model.generate(**asked, use_cache=False)
    torch.save(found, folder + "/found.pt")
"""
CASES = {
    ("llama", "low_rank"): "AutoModelForCausalLM",
    ("llama", "pivoted"): "AutoModelForCausalLM",
    ("llama", "narrow"): "AutoModelForCausalLM",
    ("gpt2", "low_rank"): "AutoModelForCausalLM",
    ("gpt2", "narrow"): "AutoModelForCausalLM",
    ("bert", "pivoted"): "AutoModelForSequenceClassification",
    ("t5", "low_rank"): "AutoModelForSeq2SeqLM",
}


@pytest.fixture(scope="module")
def loaded_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders, each loaded by one process that has not this package."""
    root, given = tmp_path_factory.mktemp("remote"), []
    for (architecture, kind), auto in CASES.items():
        folder = root / f"{architecture}-{kind}"
        model = made(architecture, kind)
        before = dict(vars(model.config))
        save_remote_code(model, folder)
        assert vars(model.config) == before, "the model is as it was"
        torch.save(inputs(model), folder / "batch.pt")
        given += [str(folder), auto]
    own = {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=own)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_a_process_without_this_package_loads_and_generates(
    architecture: str, kind: str, loaded_alone: Path
) -> None:
    folder, model = loaded_alone / f"{architecture}-{kind}", made(architecture, kind)
    found, batch = torch.load(folder / "found.pt"), inputs(model)
    with torch.no_grad():
        expected = model(**batch).logits
    assert found["logits"].allclose(expected, atol=1e-6)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    if model.can_generate():
        asked = {"input_ids": batch["input_ids"][:1, :4], "max_new_tokens": 8, "do_sample": False}
        assert found["cached"].equal(model.generate(**asked))
        assert found["cached"].equal(found["plain"])
    text = (folder / "modeling_compressed.py").read_text()
    assert "import lrcompress" not in text
    assert "from lrcompress" not in text


def test_a_loaded_model_is_saved_with_code_and_stays_what_it_was(tmp_path: Path) -> None:
    save_pretrained(made("bert", "pivoted"), tmp_path / "ours")
    model = load_pretrained(tmp_path / "ours")
    save_remote_code(model, tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["compressed_layers"].keys() == {layer.name for layer in Plan.of(model)}
    save_pretrained(model, tmp_path / "again")
    assert Plan.of(load_pretrained(tmp_path / "again")) == Plan.of(model)


@pytest.mark.parametrize("kind", ["low_rank", "pivoted", "narrow"])
def test_without_trust_nothing_is_loaded_instead(kind: str, tmp_path: Path) -> None:
    save_remote_code(made("llama", kind), tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|mismatch"):
        tf.LlamaForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config


def test_what_remote_code_cannot_build_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="is of kind 'kronecker'; remote code is for layers of"):
        save_remote_code(made("llama", "kronecker"), tmp_path)
    body = tf.LlamaModel(made("llama").config)
    sizes = {"in": 16, "out": 16, "rank": 2}
    Plan((LayerPlan("layers.0.self_attn.q_proj", "low_rank", sizes),)).apply_(body)
    with pytest.raises(SettingError, match="no automatic class of transformers has LlamaModel"):
        save_remote_code(body, tmp_path)
    assert not list(tmp_path.iterdir())
