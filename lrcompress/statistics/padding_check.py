"""Check, by gradients, that a mask does not have padding and tokens the wrong way."""

import torch
from torch import Tensor

from lrcompress.errors import ObservationError
from lrcompress.statistics.masks import INVERTED, MaskSource, Tokens


class PaddingCheck:
    """Checks once that gradients do not all lie where a mask says that there is padding."""

    def __init__(self) -> None:
        self._done = False
        self._sums: list[Tensor] = []  # of gradients' sizes, at tokens and everywhere

    def wants(self, tokens: Tokens) -> bool:
        """Return whether it has to see gradients of these tokens."""
        return tokens.real is not None and not self._done

    def add(self, tokens: Tokens, gradient: Tensor) -> None:
        """Add the gradient at a layer's output, ``(..., out)``, if it has to be seen."""
        if self.wants(tokens):
            both = tokens.of(gradient).float().abs().sum(), gradient.float().abs().sum()
            self._sums.append(torch.stack(both))

    def drop(self) -> None:
        """Discard what was added in a step that was interrupted."""
        self._sums.clear()

    def check(self, owner: str, source: MaskSource = None) -> None:
        """Check what was added in a step.

        Args:
            owner: who asks, for the message.
            source: what the mask was found by, for the message.

        Raises:
            ObservationError: if there are gradients, and none of them at a token.
        """
        if not self._sums:
            return
        at_tokens, everywhere = torch.stack([x.cpu() for x in self._sums]).sum(0).tolist()
        self._sums.clear()
        self._done = self._done or everywhere > 0
        if everywhere > 0 and at_tokens == 0:
            turned = isinstance(source, str) and source.startswith(INVERTED)
            named = "" if source is None else f" (mask={source!r})"
            raise ObservationError(
                f"{owner}: all gradients lie where the mask says that there is padding, and none "
                f"at its tokens{named}. "
                + (
                    "With ~ a mask is nonzero at padding, and this one is nonzero at tokens: leave "
                    f"the ~ out, mask={str(source).removeprefix(INVERTED)!r}"
                    if turned
                    else "A mask is nonzero at tokens; torch's key_padding_mask is nonzero at "
                    "padding: name such a one as mask='~key'"
                )
            )
