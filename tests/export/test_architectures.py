"""What transformers writes into the files of any architecture is read back."""

import inspect
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lrcompress.export import load_pretrained, save_pretrained
from lrcompress.export.folder import check_config
from lrcompress.statistics.views import view
from lrcompress.structure.plan import LayerPlan, Plan
from lrcompress.structure.selection import select

WIDTHS = ("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "word_embed_proj_dim")
INNER = ("intermediate_size", "hidden_dim", "d_ff", "n_inner", "ffn_dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIDES = [f"{side}_{key}" for side in ("encoder", "decoder") for key in ("layers", "ffn_dim")]
SMALL = {key: 32 for key in WIDTHS} | {key: 24 for key in INNER} | {key: 4 for key in HEADS}
SMALL |= {key: 2 for key in (*DEPTHS, "num_key_value_heads", "num_experts_per_tok")}
SMALL |= {key: 24 if key.endswith("dim") else 2 for key in SIDES}
SMALL |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
SMALL |= {"vocab_size": 99, "head_dim": 8, "d_kv": 8, "image_size": 16, "patch_size": 8}
SMALL |= {key: 64 for key in ("max_position_embeddings", "n_positions")}
SMALL |= {key: 4 for key in ("num_experts", "num_local_experts", "n_routed_experts")}
SMALL |= {key: 8 for key in ("moe_intermediate_size", "kv_lora_rank", "q_lora_rank", "v_head_dim")}
SMALL |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 1, "topk_group": 1}
SMALL |= {f"{key}_token_id": 1 for key in ("pad", "bos", "eos", "decoder_start")}

CLASSES = {
    **MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    **MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    **MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
# Gemma 3 and OPT write private numbers, MPT an empty private text, Falcon-H1 and Nemotron-H an
# infinity; of the rows from gte on, transformers stores several layers as one tensor.
TYPES = """
gemma3_text mpt falcon_h1 nemotron_h opt gemma2 qwen2 qwen3 mistral mixtral qwen2_moe olmoe phi
gpt_neox gptj bloom stablelm cohere2 granite olmo2 starcoder2 deepseek_v3 lfm2 xglm electra albert
bigbird_pegasus blenderbot pegasus mbart m2m_100 mt5 beit deit mpnet xlnet ernie
gte nomic_bert jina_embeddings_v3 hrm_text
"""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def tiny(model_type: str) -> tf.PreTrainedModel:
    """A model of its default config but for sizes, every other linear layer in blocks factored."""
    if model_type not in CLASSES:
        pytest.skip(f"transformers {tf.__version__} has no {model_type}")
    name: Any = CLASSES[model_type]
    kind = getattr(tf, name if isinstance(name, str) else name[0])
    default = kind.config_class()
    own = {k: v for k, v in SMALL.items() if isinstance(getattr(default, k, None), int | list)}
    fields = inspect.signature(kind.config_class).parameters
    torch.manual_seed(0)
    model = kind(kind.config_class(**{k: v for k, v in own.items() if k in fields})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layers = []
    for layer in select(model).names[::2]:
        out_features, in_features = view(model.get_submodule(layer)).shape
        sizes = {"in": in_features, "out": out_features, "rank": min(2, in_features, out_features)}
        layers.append(LayerPlan(layer, "low_rank", sizes))
    Plan(tuple(layers)).apply_(model)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return model(pixel_values=pixels).logits  # type: ignore[no-any-return]
    ids = torch.arange(5, 13)[None]
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("model_type", TYPES.split())
def test_a_tiny_model_of_the_type_comes_back(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    save_pretrained(model, tmp_path)
    for again in (load_pretrained(tmp_path), type(model).from_pretrained(tmp_path)):
        assert Plan.of(again) == Plan.of(model)
        state, expected = again.state_dict(), model.state_dict()
        assert state.keys() == expected.keys()
        assert all(state[key].equal(expected[key]) for key in expected)
    if model_type not in ("gptj", "deepseek_v3"):  # whose heads cannot be that small
        assert logits(again).equal(logits(model))


def test_the_default_config_of_every_type_is_read() -> None:
    checked = 0
    for model_type in CONFIG_MAPPING.keys():  # noqa: SIM118  it loads on demand
        try:
            text = CONFIG_MAPPING[model_type]().to_json_string()
        except Exception:  # the two of transformers that have no default
            continue
        check_config(Path("config.json"), json.loads(text), num_tensors=30, nbytes=2**30)
        checked += 1
    assert checked > 300
