"""Questions whose answers stand in a text, and models that find them."""

import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lrcompress
from lrcompress.distill import HiddenStates
from lrcompress.errors import NoMatchError, SettingError
from lrcompress.nn import LowRankLinear
from lrcompress.tasks import QuestionAnswering, QuestionData, TextClassification

SHORT: dict[str, Any] = {"max_length": 24, "stride": 6}
NOUNS = ["film", "movie", "story", "plot", "music", "actor", "scene", "love", "life", "time"]
JUDGED = ["good", "very bad", "great", "awful", "not fine", "Dull", "funny", "sad"]
Row = dict[str, Any]


def rows_of(count: int, seed: int, length: int = 12) -> list[Row]:
    """Texts of nouns, somewhere among them what was said of one; every fifth is said twice."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        words = draw.choices(NOUNS, k=draw.randint(4, length) if i % 3 else 3 * length)
        said = draw.choice(JUDGED)
        places = sorted(draw.sample(range(len(words)), 2 if i % 5 == 0 else 1))
        for place in reversed(places):
            words.insert(place, said)
        text = ", ".join(words)
        starts = [j for j in range(len(text)) if text.startswith(said, j)]
        answers = {"text": [said] * len(starts), "answer_start": starts}
        rows.append({"question": f"the {words[-1]} was", "context": text, "answers": answers})
    return rows


def write(file: Path, rows: list[Row]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    sizes = {"train": 60, "val": 11}
    return {
        name: write(tmp_path / f"{name}.jsonl", rows_of(count, seed))
        for seed, (name, count) in enumerate(sizes.items())
    }


def test_windows_hold_the_text_and_say_where_the_answer_is(
    tiny_bert: Path, files: dict[str, str]
) -> None:
    data = QuestionData(str(tiny_bert), **SHORT, **files)
    data.setup("fit")
    decode = data.tokenizer.decode
    rows = rows_of(60, 0)
    windows, at, seen = data._splits["train"], 0, 0
    for row in rows:
        question, text, said = (
            data.tokenizer(x, add_special_tokens=False, padding=False).input_ids
            for x in (row["question"], row["context"], row["answers"]["text"][0])
        )
        read: list[int] = []
        found = []
        while len(read) < len(text):
            ids = windows[at]["input_ids"]
            assert len(ids) <= 24
            body = ids[2 + len(question) : -1]
            assert ids[1 : 1 + len(question)] == question
            read = [*read[: len(read) - 6], *body] if read else body
            start, end = windows[at]["start_positions"], windows[at]["end_positions"]
            if start:
                assert ids[start : end + 1] == said, decode(ids)
                found.append(at)
            else:
                assert end == 0
            at += 1
        assert read == text, "windows overlap by the stride and cover the text"
        assert found, "answers shorter than the stride are whole in some window"
        seen += len(found)
    assert at == len(windows) > len(rows)
    assert data.unanswered == 0
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {
        *("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions")
    }


def normal(text: str) -> list[str]:
    return "".join(c for c in text.lower() if c.isalnum() or c == " ").split()


def score(said: str, right: str) -> tuple[float, float]:
    """Whether one is the other, and the F1 of their words."""
    one, other = normal(said), normal(right)
    both = sum(min(one.count(word), other.count(word)) for word in set(one))
    same = 2 * both / (len(one) + len(other)) if one and other else float(one == other)
    return float(one == other), same


def by_definition(module: QuestionAnswering, tokenizer: Any, row: Row) -> tuple[float, float]:
    """Exact match and F1 of what a module says, span by span."""
    pair = (row["question"], row["context"])
    encoded = tokenizer(
        *pair,
        truncation="only_second",
        padding=False,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        **SHORT,
    )
    found, silence = [], []
    for i, ids in enumerate(encoded.input_ids):
        kinds = torch.tensor([encoded.token_type_ids[i]])
        with torch.no_grad():
            output = module.model(torch.tensor([ids]), token_type_ids=kinds)
        start, end = output.start_logits[0], output.end_logits[0]
        silence.append(float(start[0] + end[0]))
        inside = [t for t, part in enumerate(encoded.sequence_ids(i)) if part == 1]
        spans = [(s, e) for s in inside for e in inside if s <= e]
        begins, ends = zip(*encoded.offset_mapping[i], strict=True)
        for s, e in spans:
            if e < s + module.longest:
                found.append((float(start[s] + end[e]), row["context"][begins[s] : ends[e]]))
    best, said = max(found)
    said = "" if module.may_be_silent and min(silence) > best else said
    scores = [score(said, right) for right in row["answers"]["text"] or [""]]
    return max(exact for exact, _ in scores), max(f1 for _, f1 in scores)


@pytest.mark.parametrize(("silent", "epochs"), [(False, 4), (True, 20)])
def test_figures_are_those_of_all_questions_by_the_definition(
    silent: bool, epochs: int, tiny_bert: Path, files: dict[str, str], trainer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = QuestionAnswering(str(tiny_bert), lr=1e-3, longest=4, may_be_silent=silent)
    train, val = (rows_of(*size) for size in ((60, 0), (11, 1)))
    for row in [*train[::3], *val[::2]] if silent else []:
        row |= {"question": "not the plot", "answers": {"text": [], "answer_start": []}}
    files = {
        name: write(tmp_path / f"{name}.json", r) for name, r in (("train", train), ("val", val))
    }
    data = QuestionData(str(tiny_bert), **SHORT, eval_batch_size=3, **files)
    run = trainer(max_epochs=epochs, check_val_every_n_epoch=epochs)
    run.fit(module, data)
    module.eval()
    scores = zip(*(by_definition(module, data.tokenizer, row) for row in val), strict=True)
    exact, f1 = (100 * sum(x) / len(val) for x in scores)
    total, count, said = 0.0, 0, []
    for batch in data.val_dataloader():
        with torch.no_grad():
            output = module(batch)
        total += float(output.loss) * len(batch["input_ids"])
        count += len(batch["input_ids"])
        said += module.answers(output.start_logits, output.end_logits, batch)
    assert 0 < exact <= f1 < 100, "neither all right nor all wrong"
    assert {bool(text) for text in said} == ({True, False} if silent else {True})
    assert run.callback_metrics["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert run.callback_metrics["val_exact_match"] == pytest.approx(exact, rel=1e-5)
    assert run.callback_metrics["val_f1"] == pytest.approx(f1, rel=1e-5)


@pytest.mark.parametrize("taught", [False, True])
def test_it_is_compressed_while_it_learns(
    taught: bool, tiny_bert: Path, files: dict[str, str], trainer: Any, tmp_path: Path
) -> None:
    L.seed_everything(0, verbose=False)
    module: Any = QuestionAnswering(str(tiny_bert), lr=1e-2)
    data = QuestionData(str(tiny_bert), **SHORT, **files)
    (before,) = trainer().validate(module, data, verbose=False)
    whole = lrcompress.Distilled(module, losses=[HiddenStates()]) if taught else module
    factorize = lrcompress.Factorize(
        keep=0.6, at="epoch:12", align=2, validate=False, report_path=None, verbose=False
    )
    run = trainer(factorize, max_epochs=20, check_val_every_n_epoch=20)
    run.fit(whole, data)
    assert run.callback_metrics["val_f1"] > before["val_f1"] + 30
    assert factorize.report.points[0].predicted_loss > 0
    assert any(isinstance(layer, LowRankLinear) for layer in module.modules())
    lrcompress.save_pretrained(module.model, tmp_path / "folder", tokenizer=data.tokenizer)
    again = QuestionAnswering(str(tmp_path / "folder"))
    assert all(x.equal(module.state_dict()[name]) for name, x in again.state_dict().items())
    (after,) = trainer().validate(
        again, QuestionData(str(tiny_bert), **SHORT, **files), verbose=False
    )
    assert after["val_f1"] == run.callback_metrics["val_f1"]


def test_the_file_that_squad_is_published_as(
    tiny_bert: Path, files: dict[str, str], tmp_path: Path
) -> None:
    rows = rows_of(60, 0)
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "question": row["question"],
                    "id": str(i),
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(*row["answers"].values(), strict=True)
                    ],
                }
            ],
        }
        for i, row in enumerate(rows)
    ]
    articles = [{"title": "a", "paragraphs": paragraphs[:7]}, {"paragraphs": paragraphs[7:]}]
    published = tmp_path / "train-v1.1.json"
    published.write_text(json.dumps({"version": "1.1", "data": articles}))
    found = []
    for train in (files["train"], str(published)):
        data = QuestionData(str(tiny_bert), **SHORT, train=train, val=files["val"])
        data.setup("fit")
        found.append(data._splits["train"].to_list())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train": None, "val": None}, "give `name`, a data set on the hub, or `train`"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": 65}, "max_length=65 is more than the 64 tokens this model can take"),
        ({"stride": 24}, "stride must be from 0 to below max_length, got 24"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_arguments_that_are_refused(
    kwargs: Any, message: str, tiny_bert: Path, files: dict[str, str]
) -> None:
    with pytest.raises(SettingError, match=message):
        QuestionData(str(tiny_bert), **(SHORT | files | kwargs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": "good"}, r"row 0 \(from 0\): expected answers as .*, got 'good'"),
        ({"answers": {"text": "good", "answer_start": [2]}}, r"row 0 .*: expected answers as "),
        ({"answers": {"text": [], "answer_start": [2]}}, r"row 0 .*: expected answers as "),
        (
            {"answers": {"text": ["good"], "answer_start": [5]}, "context": "a very good film"},
            r"row 0 .*: the answer 'good' is not at character 5 of its text, where 'y go' stands",
        ),
        (
            {"question": "film " * 20},
            "a question of 20 tokens leaves 1 of max_length=24 .* stride=6",
        ),
        ({"context": 5}, r"column 'context' holds Value\('int64'\), expected text"),
    ],
)
def test_rows_that_are_refused(change: Row, message: str, tiny_bert: Path, tmp_path: Path) -> None:
    row = {"question": "the film", "context": "a good film"}
    row |= {"answers": {"text": ["good"], "answer_start": [2]}}
    train = write(tmp_path / "a.jsonl", [row | change])
    with pytest.raises(SettingError, match=message):
        QuestionData(str(tiny_bert), train=train, **SHORT).setup("fit")


def test_data_and_models_that_do_not_belong_together(
    tiny_bert: Path, files: dict[str, str], trainer: Any, tmp_path: Path
) -> None:
    folder = str(tiny_bert)
    with pytest.raises(NoMatchError, match=r"no column 'contex'; .* nearest: context"):
        QuestionData(folder, context="contex", **SHORT, **files).setup("fit")
    with pytest.raises(SettingError, match="longest must be at least 1, got 0"):
        QuestionAnswering(folder, longest=0)
    data = QuestionData(folder, **SHORT, **files)
    with pytest.raises(
        SettingError,
        match=r"TextClassification reads the batches of .*TextData.*, got the data QuestionData",
    ):
        trainer().fit(TextClassification(folder), data)
    module = QuestionAnswering(folder)
    module.model.config.max_position_embeddings = 20
    with pytest.raises(SettingError, match="max_length=24, the model has 20 positions"):
        trainer().fit(module, data)
    silent = rows_of(3, 0)
    silent[1]["answers"] = {"text": [], "answer_start": []}
    data = QuestionData(folder, train=write(tmp_path / "silent.jsonl", silent), **SHORT)
    with pytest.raises(SettingError, match="1 questions have no answer; set may_be_silent: true"):
        trainer().fit(QuestionAnswering(folder), data)
    data = QuestionData(folder, **SHORT, **files)
    with pytest.raises(SettingError, match="there is no test split to test on"):
        data.setup("test")
