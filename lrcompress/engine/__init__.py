"""Compression of a bare ``nn.Module``: observe, allocate ranks, solve, replace layers."""
