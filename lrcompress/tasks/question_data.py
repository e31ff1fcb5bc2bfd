"""Extractive question answering data, as SQuAD, from local files or from the hub."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lrcompress.errors import SettingError
from lrcompress.tasks.sources import Sources
from lrcompress.tasks.split_data import SplitData
from lrcompress.tasks.tables import pick_columns

KEYS = ("text", "answer_start")  # of answers, each a list


class QuestionData(SplitData):
    """Extractive question answering data: questions, texts, and the answers' places in them.

    Give ``name``, or ``train``, a file ending in .json, .jsonl or .parquet: rows whose answers are
    ``{"text": [...], "answer_start": [...]}``, characters counted from 0, or a file of SQuAD as its
    authors publish it. A text too long for the model is read in windows of ``max_length`` tokens
    that overlap by ``stride``. Batches to train on are windows: dicts of ``input_ids``,
    ``attention_mask``, ``token_type_ids`` where the tokenizer has them, ``start_positions`` and
    ``end_positions``, the tokens of the first answer; both are 0 in a window without it. Batches
    to validate on hold all windows of each of their questions, and besides

    * ``question``: ``(windows,)``, which of the batch's questions a window is of;
    * ``begins``, ``ends``: ``(windows, length)``, the characters of the text that a token
      stands for; equal where it is none of the text's;
    * ``context``, ``answers``: a list of texts, and for each the answers that count as right.

    Args:
        tokenizer: hub name, local folder or ``package:name/folder``; the ``path`` of the model.
        question: the column of questions, by name or by position from 0.
        context: the column of texts, likewise.
        answers: the column of answers, likewise.
        name: data set on the hub, such as ``rajpurkar/squad``.
        config: its configuration.
        train_split: its split to train on.
        val_split: its split to validate on.
        test_split: its split to test on.
        train: local file to train on.
        val: local file to validate on; by default the file beside ``train`` that is called as
            it is but for ``val``, ``valid``, ``validation`` or ``dev`` in place of ``train``.
        test: local file to test on; by default the one with ``test`` in place of ``train``.
        batch_size: the most windows of a training batch, per process.
        eval_batch_size: the most questions of a validation or test batch, per process.
        max_length: tokens of a window, question included.
        stride: tokens of the text that a window shares with the one before.
        num_workers: processes that load batches; 0 is none.
        seed: of the order of training batches.
        limit: use only the first so many questions of each split.

    Attributes:
        unanswered: the number of questions without an answer, of all splits that ``setup`` read.

    Raises:
        SettingError: if an argument is outside what it may be; from ``setup``, if a file cannot
            be read, an answer is not where it is said to be, or a question leaves no room for
            its text.
        OSError: if ``transformers`` finds no such tokenizer.
        NoMatchError: if there is no folder or package of the tokenizer; from ``setup``, if there
            is no such file or column.

    Shapes:
        ``input_ids`` and ``attention_mask`` of a batch ``(windows, length)``,
        ``start_positions`` and ``end_positions`` ``(windows,)``, all int64.
    """

    def __init__(
        self,
        tokenizer: str,
        question: int | str = "question",
        context: int | str = "context",
        answers: int | str = "answers",
        name: str | None = None,
        config: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        max_length: int = 384,
        stride: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(tokenizer, batch_size, eval_batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.question, self.context, self.answers = question, context, answers
        self.max_length, self.stride, self.limit = max_length, stride, limit
        self.unanswered = 0
        self.sources = Sources.of(
            name,
            config,
            {"train": train_split, "val": val_split, "test": test_split},
            {"train": train, "val": val, "test": test},
        )
        self.check_counts("max_length", "limit")
        self.check_length("max_length")
        if not 0 <= stride < max_length:
            raise SettingError(f"stride must be from 0 to below max_length, got {stride}")
        if not self.tokenizer.is_fast:
            raise SettingError(
                f"{tokenizer}: its tokenizer does not say where in a text its tokens are; "
                "expected one with a tokenizer.json"
            )

    def setup(self, stage: str) -> None:
        for split in self.begin(stage):
            self.serve(split, self._tokenized(split), stage)

    def _tokenized(self, split: str) -> Dataset | None:
        """Return the windows of a split to train on, the questions of another.

        Raises:
            SettingError: if an answer is not where it is said to be, or a question leaves no
                room for its text.
        """
        found = self.sources.read(split)
        if found is None:
            return None
        table = _rows_of_squad(found[0]) if "data" in found[0].column_names else found[0]
        table = pick_columns(table, [self.question, self.context], self.answers, found[1])
        table = self.first(table)
        for row, (text, answers) in enumerate(zip(table["pair"], table["label"], strict=True)):
            _check_answers(text, answers, f"{found[1]}, row {row} (from 0)")
        self.unanswered += sum(not answers["text"] for answers in table["label"])
        self._check_room(table["text"], found[1])
        sizes = {"max_length": self.max_length, "stride": self.stride}
        return self.encoded(table, _encode, **sizes, split=split)

    def _check_room(self, questions: list[str], where: str) -> None:
        tokens = self.tokenizer(list(questions), padding=False, add_special_tokens=False).input_ids
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        row = max(range(len(tokens)), key=lambda i: len(tokens[i]))
        room = self.max_length - special - len(tokens[row])
        if room <= self.stride:
            raise SettingError(
                f"{where}, row {row} (from 0): a question of {len(tokens[row])} tokens leaves "
                f"{max(room, 0)} of max_length={self.max_length} for its text, expected more than "
                f"stride={self.stride}"
            )

    def lengths(self, rows: Dataset) -> list[int]:
        return list(rows["length"]) if "length" in rows.column_names else super().lengths(rows)

    def collate(self, epoch: int, rows: list[dict[str, Any]]) -> Any:
        if "windows" not in rows[0]:
            return super().collate(epoch, rows)
        batch: dict[str, Any] = super().collate(
            epoch, [window for row in rows for window in row["windows"]]
        )
        counts = torch.tensor([len(row["windows"]) for row in rows])
        batch["question"] = torch.arange(len(rows)).repeat_interleave(counts)
        return batch | {name: [row[name] for row in rows] for name in ("context", "answers")}


def _rows_of_squad(table: Dataset) -> Dataset:
    """Return the questions of SQuAD's own files, one a row."""
    rows = [
        {
            "question": asked["question"],
            "context": paragraph["context"],
            "answers": {key: [answer[key] for answer in asked["answers"]] for key in KEYS},
        }
        for articles in table["data"]
        for article in articles
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]
    return Dataset.from_list(rows)


def _check_answers(text: str, answers: Any, where: str) -> None:
    lists: list[Any] = [answers.get(key) for key in KEYS] if isinstance(answers, dict) else [None]
    if not all(isinstance(x, list) for x in lists) or len(set(map(len, lists))) != 1:
        raise SettingError(
            f'{where}: expected answers as {{"text": [...], "answer_start": [...]}}, '
            f"got {answers!r}"
        )
    for answer, start in zip(answers["text"], answers["answer_start"], strict=True):
        if text[start : start + len(answer)] != answer:
            raise SettingError(
                f"{where}: the answer {answer!r} is not at character {start} of its text, where "
                f"{text[start : start + len(answer)]!r} stands"
            )


def _encode(
    rows: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int, split: str
) -> Any:
    found = tokenizer(
        rows["text"],
        rows["pair"],
        padding=False,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    of_question = found.pop("overflow_to_sample_mapping")
    offsets = found.pop("offset_mapping")
    windows: list[list[dict[str, Any]]] = [[] for _ in rows["text"]]
    for i, question in enumerate(of_question):
        of_text = np.array([part == 1 for part in found.sequence_ids(i)])
        characters = np.where(of_text[:, None], offsets[i], 0)
        start, end = _tokens_of(characters, rows["label"][question])
        window = {name: values[i] for name, values in found.items()}
        window |= {"start_positions": start, "end_positions": end}
        if split != "train":
            window |= dict(zip(("begins", "ends"), characters.T.tolist(), strict=True))
        windows[question].append(window)
    if split == "train":
        flat = [window for of_one in windows for window in of_one]
        return {name: [window[name] for window in flat] for name in flat[0]}
    return {
        "windows": windows,
        "length": [max(len(window["input_ids"]) for window in of_one) for of_one in windows],
        "context": rows["pair"],
        "answers": [answers["text"] for answers in rows["label"]],
    }


def _tokens_of(characters: np.ndarray, answers: dict[str, list[Any]]) -> tuple[int, int]:
    """Return the first and the last token of the first answer; 0, 0 if it is not whole here.

    Args:
        characters: ``(length, 2)``, where in the text each token begins and ends; equal for
            tokens that are not the text's.
        answers: texts and where they start.
    """
    (inside,) = np.nonzero(characters[:, 1] > characters[:, 0])
    if not answers["text"] or not len(inside):
        return 0, 0
    first = answers["answer_start"][0]
    last = first + len(answers["text"][0])
    begins, ends = characters[inside].T
    if first < begins[0] or last > ends[-1]:
        return 0, 0
    start = int(np.searchsorted(begins, first, side="right")) - 1
    return int(inside[start]), int(inside[np.searchsorted(ends, last)])
