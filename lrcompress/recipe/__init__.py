"""Read the recipe a command line gives, and say everything that is wrong with it."""

from lrcompress.recipe.faults import LINKED, find_faults, linked_from

__all__ = ["LINKED", "find_faults", "linked_from"]
