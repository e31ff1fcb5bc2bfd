"""Layers are called as they stand while a step is observed: no compiled graphs, no fast paths."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class Eager:
    """Turns ``torch.compile``, and attention that calls no layers, off while a step is observed.

    Several recorders may observe one step, and leave it in any order: the last one restores
    both, as the first found them.
    """

    def __init__(self) -> None:
        self._holders = 0
        self._stance = ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep both off inside the block."""
        if self._holders == 0:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            fast = torch.backends.mha.get_fastpath_enabled()  # nested tensors, without gradients
            self._stance.callback(torch.backends.mha.set_fastpath_enabled, fast)
            torch.backends.mha.set_fastpath_enabled(False)
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0:
                self._stance.close()


EAGER = Eager()
