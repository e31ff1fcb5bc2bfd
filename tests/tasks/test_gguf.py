"""Models and tokenizers from GGUF files."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lrcompress
from lrcompress.errors import NoMatchError, SettingError
from lrcompress.tasks import LanguageData, LanguageModelling

CHARACTERS = [chr(c) for c in range(33, 127)]
TOKENS = [
    "<end>",
    "\u0120",
    "\u010a",
    *CHARACTERS,
    "th",
    "the",
]  # of byte-level BPE: space, newline
HEADS = {"attn_q": 4, "attn_k": 2}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def write(model: LlamaForCausalLM, path: Path) -> None:
    """The file as llama.cpp's converter writes it: heads of query and key interleaved."""
    file, config = gguf.GGUFWriter(path, "llama"), model.config
    file.add_name("Tiny")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("gpt2")
    file.add_token_list(TOKENS)
    file.add_token_types([3, *[1] * (len(TOKENS) - 1)])
    file.add_token_merges(["t h", "th e"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        file.add_tensor(*stored(name, tensor))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def stored(name: str, tensor: torch.Tensor) -> tuple[str, Any]:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name], tensor.numpy()
    number, _, inner = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    to = NAMES[inner]
    if to in HEADS:
        halves = tensor.view(HEADS[to], 2, -1, tensor.shape[1])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    return f"blk.{number}.{to}.weight", tensor.numpy()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(llama(), tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_the_weights_are_those_of_the_file(file: Path) -> None:
    model = LanguageModelling(str(file)).model
    expected = llama().state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[key]) for key, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "hf_quantizer"), "plain tensors"
    assert {p.dtype for p in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_package_s_file_and_its_config_are_found(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file.parent / "shipped_gguf").mkdir()
    file.rename(file.parent / "shipped_gguf" / "tiny.gguf")
    monkeypatch.syspath_prepend(file.parent)
    model = LanguageModelling("package:shipped_gguf/tiny.gguf", pretrained=False).model
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.num_hidden_layers == 2


def test_it_is_trained_compressed_saved_and_loaded(file: Path, trainer: Any) -> None:
    text = file.parent / "train.txt"
    text.write_text("the cat sat on the mat\n" * 40)
    given = {"train": str(text), "val": str(text)}
    data = LanguageData(str(file), length=16, batch_size=8, end=True, **given)
    module = LanguageModelling(str(file))
    trainer(lrcompress.Factorize(keep=0.5, at=0.5, every_n_steps=1), max_steps=2).fit(module, data)
    lrcompress.save_pretrained(module.model, file.parent / "out", data.tokenizer)
    again = lrcompress.load_pretrained(file.parent / "out")
    expected = module.model.state_dict()
    assert all(value.equal(expected[key]) for key, value in again.state_dict().items())
    assert again.config._model_name_or_path == "Tiny"


def test_what_transformers_itself_has_loaded_is_saved_too(file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    lrcompress.save_pretrained(model, file.parent / "out")
    again = lrcompress.load_pretrained(file.parent / "out")
    expected = llama().state_dict()
    assert all(value.equal(expected[key]) for key, value in again.state_dict().items())


def test_a_file_that_is_not_there_is_told_with_the_nearest(file: Path) -> None:
    with pytest.raises(NoMatchError, match=r"no file .*/tinny\.gguf; nearest there: tiny\.gguf"):
        LanguageModelling(str(file.with_name("tinny.gguf")))


@pytest.mark.parametrize("content", [b"", b"GGUFxxxx" * 20])
def test_a_file_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "none.gguf"
    file.write_bytes(content)
    for pretrained in (True, False):
        with pytest.raises(SettingError, match=r"none\.gguf cannot be read as a GGUF file: \S"):
            LanguageModelling(str(file), pretrained=pretrained)
    with pytest.raises(SettingError, match=r"none\.gguf cannot be read as a GGUF file: \S"):
        LanguageData(str(file), train="train.txt")


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_without_what_reads_them_the_package_is_named(
    missing: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lrcompress.tasks.locations.find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(SettingError, match=f"there is no {missing}: pip install {missing}$"):
        LanguageModelling(str(file))
