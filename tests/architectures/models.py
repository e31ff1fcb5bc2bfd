"""Tiny random models of every architecture that the guide speaks of, and a batch for each."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.export.conftest import ARCHITECTURES, SIZES, TEXT, inputs

GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}


def albert() -> nn.Module:
    return tf.AlbertForMaskedLM(tf.AlbertConfig(**TEXT, embedding_size=8))


def opt() -> nn.Module:
    sizes = {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 8}
    return tf.OPTForCausalLM(tf.OPTConfig(vocab_size=50, max_position_embeddings=24, **sizes))


def mistral() -> nn.Module:
    return tf.MistralForCausalLM(tf.MistralConfig(**GROUPED))


def qwen2() -> nn.Module:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED, max_window_layers=2))


def qwen3() -> nn.Module:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, max_window_layers=2))


def mixtral() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, **experts))


def qwen3_moe() -> nn.Module:
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=4))


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> SequenceClassifierOutput:
        x = self.embed(input_ids)
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        logits = self.head(x[:, 0])
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels), logits)


class TorchAttention(TorchEncoder):
    """``nn.MultiheadAttention`` without anything around it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2)
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> SequenceClassifierOutput:
        x = self.embed(input_ids)
        for attention in self.encoder:
            x = x + attention(x, x, x, key_padding_mask=attention_mask == 0)[0]
        logits = self.head(x[:, 0])
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels), logits)


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "BERT": ARCHITECTURES["bert"],
    "RoBERTa": ARCHITECTURES["roberta"],
    "DistilBERT": ARCHITECTURES["distilbert"],
    "ALBERT": albert,
    "DeBERTa-v2": ARCHITECTURES["deberta_v2"],
    "DeBERTa-v3": ARCHITECTURES["deberta_v3"],
    "GPT-2": ARCHITECTURES["gpt2"],
    "OPT": opt,
    "Llama": ARCHITECTURES["llama"],
    "Mistral": mistral,
    "Qwen2": qwen2,
    "Qwen3": qwen3,
    "Mixtral": mixtral,
    "Qwen3-MoE": qwen3_moe,
    "T5": ARCHITECTURES["t5"],
    "BART": ARCHITECTURES["bart"],
    "ViT": ARCHITECTURES["vit"],
    "`nn.TransformerEncoder`": TorchEncoder,
    "`nn.MultiheadAttention`": TorchAttention,
}


def made(architecture: str) -> nn.Module:
    """The model, always with the same random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[architecture]().train()


def batch_for(model: nn.Module) -> dict[str, Any]:
    """A padded batch, whose targets have another length where there is a decoder."""
    if not isinstance(model, tf.PreTrainedModel):
        batch = inputs(tf.DistilBertForMaskedLM(tf.DistilBertConfig(**_LEAST)))
        return batch | {"labels": torch.tensor([0, 1])}
    batch = inputs(model)
    if model.config.is_encoder_decoder:
        labels = batch["labels"][:, :5].clone()
        labels[0, 3:] = -100
        batch["labels"] = labels
    return batch


_LEAST = {"vocab_size": 5, "dim": 2, "hidden_dim": 2, "n_layers": 1, "n_heads": 1}
