"""Which Lightning hook calls which verb; besides tasks and cli only this knows Lightning."""

from lrcompress.callbacks.factorize import Factorize

__all__ = ["Factorize"]
