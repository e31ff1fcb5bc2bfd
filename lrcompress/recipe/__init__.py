"""Read the recipe a command line gives, and say everything that is wrong with it."""

from lrcompress.recipe.validation import find_errors, link_

__all__ = ["find_errors", "link_"]
