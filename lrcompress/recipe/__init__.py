"""Reading and validation of recipes, with all errors reported at once."""

from lrcompress.recipe.validation import find_errors, link_

__all__ = ["find_errors", "link_"]
