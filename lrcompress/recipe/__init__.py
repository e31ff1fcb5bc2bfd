"""Read the recipe a command line gives, and say everything that is wrong with it."""

from lrcompress.recipe.validation import find_faults, link_

__all__ = ["find_faults", "link_"]
