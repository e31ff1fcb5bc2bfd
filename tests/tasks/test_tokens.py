"""Words with tags, and models that give them."""

import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

import lrcompress
from lrcompress.errors import NoMatchError, SettingError
from lrcompress.nn import LowRankLinear
from lrcompress.tasks import TokenClassification, TokenData

KINDS = {
    "noun": ["film", "movie", "story", "plot", "music", "actor"],
    "said": ["good", "bad", "great", "awful", "wonderful", "dullest"],
    "other": ["the", "a", "of", "in", "and", "was"],
}
Row = dict[str, Any]


def rows_of(count: int, seed: int) -> list[Row]:
    """Texts of 2 to 9 words, some longer than a token, and the kind of each word."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        tags = draw.choices(sorted(KINDS), k=draw.randint(2, 9))
        rows.append({"tokens": [draw.choice(KINDS[tag]) for tag in tags], "tags": tags})
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


@pytest.fixture
def tiny_roberta(tmp_path: Path) -> Path:
    """A folder with a random RoBERTa and byte-pair tokens that begin with their space."""
    folder = tmp_path / "roberta"
    folder.mkdir()
    pieces = ByteLevelBPETokenizer(add_prefix_space=False)
    texts = [" ".join(row["tokens"]) for row in rows_of(60, 0)]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces.train_from_iterator(texts, vocab_size=300, special_tokens=special, show_progress=False)
    pieces.save_model(str(folder))
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = RobertaTokenizerFast(*files, model_max_length=64)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": len(tokenizer)}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = RobertaConfig(**sizes, **still)
    RobertaModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_roberta"])
def test_the_first_token_of_a_word_has_its_tag(
    kind: str, files: dict[str, str], request: pytest.FixtureRequest
) -> None:
    data = TokenData(str(request.getfixturevalue(kind)), max_length=12, **files)
    data.setup("fit")
    assert data.num_labels == 3
    cut = 0
    for row, encoded in zip(rows_of(60, 0), data._splits["train"], strict=True):
        first, last = data.tokenizer.cls_token_id, data.tokenizer.sep_token_id
        wanted, labels = [first], [-100]
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            pieces = data.tokenizer([word], is_split_into_words=True, add_special_tokens=False)
            wanted += pieces.input_ids
            labels += [sorted(KINDS).index(tag)] + [-100] * (len(pieces.input_ids) - 1)
        cut += len(wanted) > 11
        assert encoded["input_ids"] == [*wanted[:11], last]
        assert encoded["labels"] == [*labels[:11], -100]
    assert 0 < cut < 60
    for batch in data.train_dataloader():
        padding = batch["attention_mask"] == 0
        assert batch["labels"].shape == batch["input_ids"].shape
        assert (batch["labels"][padding] == -100).all()


def test_figures_are_those_of_all_words(
    tiny_bert: Path, files: dict[str, str], trainer: Any
) -> None:
    torch.manual_seed(0)
    module = TokenClassification(str(tiny_bert), 3, lr=3e-3, metrics=["accuracy", "f1", "matthews"])
    data = TokenData(str(tiny_bert), eval_batch_size=3, max_length=64, **files)
    run = trainer(max_epochs=1)
    run.fit(module, data)
    module.eval()
    said, right, total = [], [], 0.0
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits = module(batch).logits.double()
        real = batch["labels"] != -100
        said.append(logits.argmax(-1)[real])
        right.append(batch["labels"][real])
        total += F.cross_entropy(logits[real], right[-1], reduction="sum").item()
    s, r = torch.cat(said), torch.cat(right)
    table = torch.stack([(r == c).double() for c in range(3)])
    guess = torch.stack([(s == c).double() for c in range(3)])
    both = (table * guess).sum(1)
    f1 = (2 * both / (table.sum(1) + guess.sum(1))).mean()
    found = run.callback_metrics
    assert len(r) == sum(len(row["tokens"]) for row in rows_of(11, 1))
    assert found["val_loss"] == pytest.approx(total / len(r), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx(float((s == r).double().mean()))
    assert 0.3 < found["val_accuracy"] < 1
    assert found["val_f1"] == pytest.approx(float(f1))
    assert -1 < found["val_matthews"] < 1


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_roberta"])
def test_it_is_compressed_while_it_learns(
    kind: str, files: dict[str, str], trainer: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(kind))
    L.seed_everything(0, verbose=False)
    module = TokenClassification(folder, 3, lr=1e-2)
    data = TokenData(folder, batch_size=8, max_length=62, **files)
    factorize = lrcompress.Factorize(
        keep=0.6, at="epoch:6", align=2, validate=False, report_path=None, verbose=False
    )
    run = trainer(factorize, max_epochs=10)
    run.fit(module, data)
    assert run.callback_metrics["val_accuracy"] > 0.75, "a third is chance"
    assert factorize.report.points[0].predicted_loss > 0
    assert any(isinstance(layer, LowRankLinear) for layer in module.modules())
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = TokenClassification.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert all(x.equal(module.state_dict()[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tags": ["noun"]}, r"a.jsonl, row 0 \(from 0\): 2 words and 1 tags; expected a list of"),
        ({"tags": "noun"}, r"row 0 \(from 0\): 2 words and 'noun' tags; expected a list of one"),
        ({"tokens": "a film"}, r"column 'tokens' holds Value\('string'\), expected lists of words"),
        ({"tokens": [1, 2]}, r"column 'tokens' holds List.*, expected lists of words"),
    ],
)
def test_rows_that_are_refused(row: Row, message: str, tiny_bert: Path, tmp_path: Path) -> None:
    whole = {"tokens": ["a", "film"], "tags": ["other", "noun"]} | row
    data = TokenData(str(tiny_bert), train=write(tmp_path / "a.jsonl", [whole]), max_length=32)
    with pytest.raises(SettingError, match=message):
        data.setup("fit")


def test_settings_that_are_refused(
    tiny_bert: Path, files: dict[str, str], trainer: Any, tmp_path: Path
) -> None:
    folder = str(tiny_bert)
    with pytest.raises(SettingError, match="max_length=65 is more than the 64 tokens"):
        TokenData(folder, max_length=65, **files)
    with pytest.raises(SettingError, match="limit must be at least 1, got 0"):
        TokenData(folder, max_length=32, limit=0, **files)
    with pytest.raises(NoMatchError, match=r"no column 'ner_tags'; .* nearest: tags"):
        TokenData(folder, tags="ner_tags", max_length=32, **files).setup("fit")
    with pytest.raises(SettingError, match="num_labels must be 2 or more, got 1"):
        TokenClassification(folder, 1)
    with pytest.raises(SettingError, match="num_labels=2, but the data has 3 classes"):
        trainer().fit(TokenClassification(folder, 2), TokenData(folder, max_length=32, **files))
    module = TokenClassification(folder, 3)
    module.model.config.max_position_embeddings = 20
    with pytest.raises(SettingError, match="max_length=32, the model has 20 positions"):
        trainer().fit(module, TokenData(folder, max_length=32, **files))
    (strange,) = rows_of(1, 5)
    strange["tags"] = ["verb"] * len(strange["tokens"])
    files["val"] = write(tmp_path / "strange.jsonl", [strange])
    with pytest.raises(SettingError, match="val split: label 'verb' is not among the 3 training"):
        TokenData(folder, max_length=32, **files).setup("fit")
