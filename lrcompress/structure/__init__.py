"""The structure of a model: which layers, what replaces them, and how that is stored."""
