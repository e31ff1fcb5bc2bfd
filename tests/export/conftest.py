"""Tiny random models of every architecture, given a structure by plan."""

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lrcompress.nn import LowRankSparseLinear, PivotedLinear, PrunedLinear
from lrcompress.statistics.views import is_linear, view
from lrcompress.structure.plan import LayerPlan, Plan
from lrcompress.structure.selection import select

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 50, "max_position_embeddings": 24, **SIZES, "intermediate_size": 24}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}


def bert() -> tf.PreTrainedModel:
    return tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=3))


def roberta() -> tf.PreTrainedModel:
    return tf.RobertaForMaskedLM(tf.RobertaConfig(**TEXT))


def distilbert() -> tf.PreTrainedModel:
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}
    return tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=50, max_position_embeddings=24, **sizes)
    )


def deberta_v2() -> tf.PreTrainedModel:
    return tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**TEXT, **DEBERTA))


def deberta_v3() -> tf.PreTrainedModel:
    shared = {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
    return tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(**TEXT, **DEBERTA, **shared, type_vocab_size=0)
    )


def gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=4)
    )


def llama() -> tf.PreTrainedModel:
    grouped = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, **grouped))


def t5() -> tf.PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=50, **sizes, decoder_start_token_id=0)
    )


def bart() -> tf.PreTrainedModel:
    sides = ("encoder", "decoder")
    sizes = {f"{side}_{key}": n for side in sides for key, n in (("layers", 2), ("ffn_dim", 24))}
    heads = {f"{side}_attention_heads": 4 for side in sides}
    return tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=50, d_model=16, max_position_embeddings=24, **sizes, **heads)
    )


def vit() -> tf.PreTrainedModel:
    return tf.ViTForImageClassification(
        tf.ViTConfig(**SIZES, intermediate_size=24, image_size=8, patch_size=4, num_labels=3)
    )


ARCHITECTURES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    make.__name__: make
    for make in (
        bert,
        roberta,
        distilbert,
        deberta_v2,
        deberta_v3,
        gpt2,
        llama,
        t5,
        bart,
        vit,
    )
}


# Of layers, as give_structure_ makes them.
KINDS = [
    "low_rank",
    "low_rank_sparse",
    "kronecker",
    "pivoted",
    "narrow",
    "narrow_low_rank",
    "narrow_pivoted",
]


def give_structure_(model: nn.Module, kind: str) -> Plan:
    """Factor the numbered layers at random, all of one kind; of sparse rows some are pruned.

    Of narrow kinds are only the layers of feed-forward blocks, which keep 10 inner features.
    """
    layers = []
    inner = 64 if model.config.model_type == "gpt2" else 24
    for name in select(model).names:
        out_features, in_features = view(model.get_submodule(name)).shape
        left = {
            "rows": 10 if out_features == inner else out_features,
            "columns": 10 if in_features == inner else in_features,
        }
        own = {
            "low_rank": {"rank": 3},
            "pivoted": {"rank": 3},
            "low_rank_sparse": {"rank": 3, "rows": out_features // 2},
            "kronecker": {"terms": 2, "first_out": out_features // 2, "first_in": 4},
            "narrow": left,
            "narrow_low_rank": {**left, "rank": 3},
            "narrow_pivoted": {**left, "rank": 3},
        }[kind]
        if kind.startswith("narrow") and inner not in (out_features, in_features):
            continue
        layers.append(LayerPlan(name, kind, {"in": in_features, "out": out_features} | own))
    plan = Plan(tuple(layers))
    plan.apply_(model)
    for i, module in enumerate(m for m in model.modules() if isinstance(m, LowRankSparseLinear)):
        module.index.copy_(torch.arange(module.num_rows) + 1)
        if i % 2:
            module.prune_(torch.arange(len(module.kept)) % 3 != 1)
    for module in model.modules():
        if isinstance(module, PrunedLinear):
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, PivotedLinear):
            module.order.copy_(torch.randperm(module.out_features))
    return plan


def made(architecture: str, kind: str = "low_rank") -> tf.PreTrainedModel:
    """A tiny random model of that architecture, factored."""
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]()
    assert any(is_linear(module) for module in model.modules())
    give_structure_(model, kind)
    return model.eval()


def inputs(model: tf.PreTrainedModel) -> dict[str, Tensor]:
    """What the model can be called with, and gives a loss for."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(2, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
    ids = torch.randint(5, 50, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = torch.tensor([0, 1]) if "Classification" in type(model).__name__ else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train_step_(model: nn.Module) -> None:
    """One step of AdamW over all parameters, without dropout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**inputs(model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars while weights are read and written."""
    tf.logging.disable_progress_bar()
    yield
    tf.logging.enable_progress_bar()
