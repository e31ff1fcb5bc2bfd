"""No compiled graphs and no fast paths while a step is observed, however observers are nested."""

import torch
from torch import nn

from lrcompress.statistics.eager import Eager


def fast() -> bool:
    return torch.backends.mha.get_fastpath_enabled()


def test_the_last_to_leave_restores_what_the_first_has_found() -> None:
    held = Eager()
    one, other = held.held(), held.held()
    assert fast()
    one.__enter__()
    other.__enter__()
    assert not fast()
    one.__exit__(None, None, None)
    assert not fast(), "the other still observes"
    other.__exit__(None, None, None)
    assert fast()

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with held.held():
            assert not fast()
        assert not fast(), "it was off before"
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_compiled_code_runs_as_it_stands_inside() -> None:
    seen: list[bool] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    compiled = torch.compile(body, backend="eager")
    with Eager().held():
        compiled(torch.ones(2))
    assert seen == [False]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    calls: list[int] = []
    layer.linear1.forward = lambda x, f=layer.linear1.forward: calls.append(1) or f(x)  # type: ignore[method-assign, misc]
    with torch.no_grad():
        layer(torch.ones(1, 3, 8))
        with Eager().held():
            layer(torch.ones(1, 3, 8))
    assert calls == [1], "torch's fast path calls no layers"
