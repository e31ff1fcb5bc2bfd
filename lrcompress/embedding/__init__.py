"""Factorize embeddings: settings, the metric of a table, and replacement in the model."""

from lrcompress.embedding.factor import factor_tables_, record_of
from lrcompress.embedding.settings import EmbeddingSettings, EmbeddingTable

__all__ = ["EmbeddingSettings", "EmbeddingTable", "factor_tables_", "record_of"]
