"""Ready LightningModules and data modules for recipes that fine-tune ``transformers`` on text."""

from lrcompress.tasks.docstring_source import docstring_splits
from lrcompress.tasks.docstrings import DocstringData
from lrcompress.tasks.language_data import LanguageData
from lrcompress.tasks.language_modelling import LanguageModelling
from lrcompress.tasks.locations import model_folder
from lrcompress.tasks.question_answering import QuestionAnswering
from lrcompress.tasks.question_data import QuestionData
from lrcompress.tasks.sequence_data import SequenceData
from lrcompress.tasks.sequence_to_sequence import SequenceToSequence
from lrcompress.tasks.text_classification import TextClassification
from lrcompress.tasks.text_data import TextData
from lrcompress.tasks.token_classification import TokenClassification
from lrcompress.tasks.token_data import TokenData

__all__ = [
    "DocstringData",
    "LanguageData",
    "LanguageModelling",
    "QuestionAnswering",
    "QuestionData",
    "SequenceData",
    "SequenceToSequence",
    "TextClassification",
    "TextData",
    "TokenClassification",
    "TokenData",
    "docstring_splits",
    "model_folder",
]
