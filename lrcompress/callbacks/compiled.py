"""Modules compiled one by one by ``torch.compile``, whose sizes a change of structure parts."""

import torch._dynamo
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

_GRAPHS = 8  # of one module: in training and evaluation, under autocast, …; torch's own limit


def keep_compiled(model: nn.Module) -> None:
    """Let a model whose structure has changed be compiled anew, each block with its own ranks.

    Graphs of layers that are gone would stay in torch's cache, with ``reduce-overhead`` their
    memory too, so where anything is compiled all graphs of the process are dropped.

    Blocks of one class share their code. As long as they are alike they share a graph too; with
    sizes of their own each takes one, and torch runs those beyond ``recompile_limit`` (8) eagerly.
    Hence torch's limits are raised, those of the whole process; they are never lowered.

    Example:
        >>> layers = [nn.Linear(2, 2) for _ in range(3)]
        >>> blocks = nn.Sequential(*(torch.compile(layer, backend="eager") for layer in layers))
        >>> with torch._dynamo.config.patch(recompile_limit=8):
        ...     keep_compiled(blocks)
        ...     torch._dynamo.config.recompile_limit
        24
    """
    found = sum(
        isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )
    if found or getattr(model, "_compiler_ctx", None):  # Lightning's, of a module as a whole
        torch.compiler.reset()
    config = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, max(getattr(config, limit), found * _GRAPHS))
