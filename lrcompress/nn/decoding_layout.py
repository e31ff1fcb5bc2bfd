"""Memory layout of factors that is read faster when a model generates a token at a time."""

import torch
from torch import nn

from lrcompress.nn.low_rank import FactoredLinear


@torch.no_grad()
def decoding_layout_(model: nn.Module) -> list[str]:
    """Lay the factors of low-rank layers out by columns, which generating on a CPU reads faster.

    A step that generates one token multiplies each factor by one vector, and takes as long as
    reading the factor does. By rows, as parameters come, this is one scalar product a row, and the
    rows of ``left`` are short: only ``rank`` values. By columns it is ``rank`` long sums.

    Names, shapes, values and saved files stay the same, and results do but for rounding. Only
    factors in float32 on a CPU are laid out anew: half precision would become slower there.
    Call it last, on a model that is not trained further (FSDP2 refuses such parameters).

    Args:
        model: changed in place.

    Returns:
        The names of the layers whose factors lie by columns now and did not before.

    Cost:
        A copy of one factor at a time.

    Example:
        >>> from lrcompress import LowRankLinear
        >>> layer = LowRankLinear(6, 4, rank=2)
        >>> decoding_layout_(layer), layer.left.weight.shape, layer.left.weight.stride()
        ([''], torch.Size([4, 2]), (1, 4))
    """
    turned = []
    for name, layer in model.named_modules():
        if isinstance(layer, FactoredLinear):
            by_rows = [
                factor
                for factor in layer.factors
                if factor.dim() == 2
                and factor.device.type == "cpu"
                and factor.dtype == torch.float32
                and not factor.mT.is_contiguous()
            ]
            for factor in by_rows:
                factor.data = factor.mT.contiguous().mT
            turned += [name] if by_rows else []
    return turned
