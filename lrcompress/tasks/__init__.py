"""Ready modules and data for recipes: fine-tune models on text, with the loops written."""

from lrcompress.tasks.docstrings import DocstringData
from lrcompress.tasks.language_data import LanguageData
from lrcompress.tasks.language_modelling import LanguageModelling
from lrcompress.tasks.sequence_data import SequenceData
from lrcompress.tasks.sequence_to_sequence import SequenceToSequence
from lrcompress.tasks.text_classification import TextClassification
from lrcompress.tasks.text_data import TextData

__all__ = [
    "DocstringData",
    "LanguageData",
    "LanguageModelling",
    "SequenceData",
    "SequenceToSequence",
    "TextClassification",
    "TextData",
]
