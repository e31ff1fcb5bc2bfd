"""Observe, plan, solve, replace: the whole method on a bare ``nn.Module``."""
