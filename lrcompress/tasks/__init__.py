"""Ready modules and data for recipes: fine-tune an encoder on text, with the loops written."""

from lrcompress.tasks.docstrings import DocstringData
from lrcompress.tasks.language_data import LanguageData
from lrcompress.tasks.language_modelling import LanguageModelling
from lrcompress.tasks.text_classification import TextClassification
from lrcompress.tasks.text_data import TextData

__all__ = [
    "DocstringData",
    "LanguageData",
    "LanguageModelling",
    "TextClassification",
    "TextData",
]
