"""Which Lightning hook calls which verb: the only place, with tasks and cli, that knows Lightning."""

from lrcompress.callbacks.factorize import Factorize

__all__ = ["Factorize"]
