"""The structure of a model: select and replace layers, plans, tied weights, checkpoints."""
