"""Compressed ``transformers`` model: plain torch and transformers, nothing else to install.

Load it with ``trust_remote_code=True``. Written beside the weights by lrcompress.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

ARCHITECTURE = "PreTrainedModel"  # written anew for each folder


class LowRankLinear(nn.Module):
    """``y = left (right x) + bias``."""

    def __init__(self, sizes: dict[str, int], bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = sizes["in"], sizes["out"]
        self.right = nn.Linear(sizes["in"], sizes["rank"], bias=False)
        self.left = nn.Linear(sizes["rank"], sizes["out"], bias=bias)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight ``(out, in)``, multiplied out: some models look at its dtype."""
        return self.left.weight @ self.right.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(self.right(x))  # type: ignore[no-any-return]


class PivotedLinear(nn.Module):
    """Rows ``right`` of a weight, and the others as ``rest right``, put in order; plus a bias."""

    order: torch.Tensor

    def __init__(self, sizes: dict[str, int], bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = sizes["in"], sizes["out"]
        rank, out_features = sizes["rank"], sizes["out"]
        self.right = nn.Parameter(torch.empty(rank, sizes["in"]))
        self.rest = nn.Parameter(torch.empty(out_features - rank, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("order", torch.arange(out_features))

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight ``(out, in)``, multiplied out: some models look at its dtype."""
        return torch.cat([self.right, self.rest @ self.right])[self.order]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pivots = F.linear(x, self.right)
        y = torch.cat([pivots, F.linear(pivots, self.rest)], -1)[..., self.order]
        return y if self.bias is None else y + self.bias


class NarrowLinear(nn.Linear):
    """A linear layer that lost inputs or outputs."""

    def __init__(self, sizes: dict[str, int], bias: bool) -> None:
        super().__init__(sizes["columns"], sizes["rows"], bias=bias)


LAYERS = {"low_rank": LowRankLinear, "pivoted": PivotedLinear, "narrow": NarrowLinear}


class CompressedModel(getattr(transformers, ARCHITECTURE)):  # type: ignore[misc]
    """The architecture, with the layers that ``compressed_layers`` of its config lists."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        ignored = {re.escape(key) + "$" for key in config.compressed_markers}
        for name, layer in config.compressed_layers.items():
            parent, _, last = name.rpartition(".")
            old = self.get_submodule(name)
            new = LAYERS[layer["kind"]](layer["sizes"], bias=old.bias is not None)
            setattr(self.get_submodule(parent), last, new.to(dtype=old.weight.dtype))
        known: Any = self._keys_to_ignore_on_load_unexpected  # type: ignore[has-type]
        kind = set if isinstance(known, set) else list  # which older versions add lists to
        self._keys_to_ignore_on_load_unexpected = kind([*(known or ()), *ignored])
