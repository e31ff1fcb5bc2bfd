"""What tests beside other libraries share."""

import torch
from transformers import BertConfig, BertForSequenceClassification

IDS = torch.arange(24).reshape(3, 8)


def bert(width: int = 32) -> BertForSequenceClassification:
    """A tiny random classifier."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config).eval()
