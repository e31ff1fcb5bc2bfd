"""Embeddings: which tables are chosen, what an error in a row counts, and surgery."""

from lrcompress.embedding.factor import factor_tables_, record_of
from lrcompress.embedding.settings import EmbeddingSettings, EmbeddingTable

__all__ = ["EmbeddingSettings", "EmbeddingTable", "factor_tables_", "record_of"]
