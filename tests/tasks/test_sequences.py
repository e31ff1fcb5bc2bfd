"""Pairs of texts, and models that write one for the other."""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, T5Config

import lrcompress
from lrcompress.errors import NoMatchError, SettingError
from lrcompress.nn import LowRankLinear
from lrcompress.tasks import SequenceData, SequenceToSequence

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]
COLUMNS: dict[str, Any] = {"text": "long", "target": "short"}
SHORT: dict[str, Any] = COLUMNS | {"max_length": 32, "max_target": 16}
STORY = [
    *("the", "film", "was", "a", "very", "good", "and", "very", "funny", "story"),
    *("of", "love", "and", "of", "time"),
]


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, str]:
    """Files of 22 and 7 texts of 3 to 9 words, to be written as their last two or three."""
    for name, count in (("train", 22), ("val", 7)):
        lines = ["long\tshort"]
        for i in range(count):
            words = STORY[i % 6 : i % 6 + 3 + i % 7]
            lines.append(f"{' '.join(words)}\t{' '.join(words[-2 - i % 2 :])}")
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines))
    return {name: str(tmp_path / f"{name}.tsv") for name in ("train", "val")}


@pytest.fixture
def tiny_t5(tiny_bart: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "t5"
    tokenizer = AutoTokenizer.from_pretrained(tiny_bart)
    tokenizer.save_pretrained(folder)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    T5Config(vocab_size=len(tokenizer), **sizes, decoder_start_token_id=0).save_pretrained(folder)
    return folder


def test_a_batch_is_the_texts_and_what_is_to_be_written(
    tiny_bart: Path, pairs: dict[str, str]
) -> None:
    data = SequenceData(
        str(tiny_bart), **COLUMNS, prefix="a plot ", max_length=8, max_target=4, **pairs
    )
    data.setup("fit")
    seen = []
    for batch in data.val_dataloader():
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        ids, labels = batch["input_ids"], batch["labels"]
        assert torch.equal(ids == data.tokenizer.pad_token_id, batch["attention_mask"] == 0)
        for read, wanted in zip(ids, labels, strict=True):
            real = wanted[wanted != -100]
            assert (wanted[len(real) :] == -100).all()
            assert real[-1] == data.tokenizer.sep_token_id
            seen.append((data.tokenizer.decode(read, skip_special_tokens=True), real[1:-1]))
    rows = [line.split("\t") for line in Path(pairs["val"]).read_text().splitlines()[1:]]
    cut = Counter(" ".join(["a", "plot", *long.split()][:6]) for long, _ in rows)
    assert Counter(text for text, _ in seen) == cut
    short = Counter(" ".join(text.split()[:2]) for _, text in rows)
    assert Counter(data.tokenizer.decode(tokens) for _, tokens in seen) == short


def overlap(written: str, wanted: str) -> float:
    """ROUGE-1, by its definition."""
    one, other = Counter(written.split()), Counter(wanted.split())
    both = sum((one & other).values())
    return 2 * both / (one.total() + other.total()) if both else 0.0


@pytest.mark.parametrize("beams", [1, 2])
def test_figures_are_those_of_all_texts_and_of_all_tokens(
    beams: int, tiny_bart: Path, pairs: dict[str, str], trainer: Any
) -> None:
    module = SequenceToSequence(str(tiny_bart), beams=beams, max_written=6)
    data = SequenceData(str(tiny_bart), **SHORT, eval_batch_size=3, **pairs)
    (logged,) = trainer().validate(module, data, verbose=False)
    scores, total, count = [], 0.0, 0
    module.eval()
    for batch in data.val_dataloader():
        labels = batch["labels"]
        with torch.no_grad():
            logits, found = module(batch).logits, module.write(batch)
        assert found.shape[1] <= 7, "the start and six tokens"
        total += F.cross_entropy(logits.mT.double(), labels, reduction="sum").item()
        count += int((labels != -100).sum())
        wanted = labels.masked_fill(labels == -100, 0)
        decode = data.tokenizer.batch_decode
        texts = (decode(x, skip_special_tokens=True) for x in (found, wanted))
        scores += [overlap(*pair) for pair in zip(*texts, strict=True)]
    assert logged["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert len(scores) == 7
    assert logged["val_rouge1"] == pytest.approx(sum(scores) / 7, rel=1e-5)
    assert logged["val_rouge2"] <= logged["val_rougeL"] <= logged["val_rouge1"]


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_it_is_compressed_while_it_learns(
    kind: str, tiny_bart: Path, tiny_t5: Path, pairs: dict[str, str], trainer: Any, tmp_path: Path
) -> None:
    folder = str(tiny_bart if kind == "bart" else tiny_t5)
    L.seed_everything(0, verbose=False)
    module = SequenceToSequence(folder, lr=1e-2, max_written=5, pretrained=kind == "bart")
    data = SequenceData(folder, **SHORT, batch_size=6, **pairs)
    (before,) = trainer().validate(module, data, verbose=False)
    factorize = lrcompress.Factorize(
        keep=0.6, at="epoch:8", align=2, validate=False, report_path=None, verbose=False
    )
    run = trainer(factorize, max_epochs=14, check_val_every_n_epoch=14)
    run.fit(module, data)
    after = run.callback_metrics
    assert after["val_loss"] < 0.8 * before["val_loss"]
    assert after["val_rouge1"] > before["val_rouge1"]
    point = factorize.report.points[0]
    for side in ("encoder", "decoder"):
        assert any(f".{side}." in layer.name for layer in point.layers if layer.rank)
    assert point.predicted_loss > 0
    assert any(isinstance(layer, LowRankLinear) for layer in module.modules())
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = SequenceToSequence.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert all(x.equal(module.state_dict()[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train": None, "val": None}, "give `name`, a data set on the hub, or `train`"),
        ({"max_target": 0}, "max_target must be at least 1, got 0"),
        ({"max_length": 100}, "max_length=100 is more than the 64 tokens this model can take"),
        ({"max_target": 65}, "max_target=65 is more than the 64 tokens this model can take"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_arguments_that_are_refused(
    kwargs: Any, message: str, tiny_bart: Path, pairs: dict[str, str]
) -> None:
    with pytest.raises(SettingError, match=message):
        SequenceData(str(tiny_bart), **(COLUMNS | pairs | {"max_length": 32} | kwargs))


def test_data_and_models_that_cannot_be_used(
    tiny_bart: Path, pairs: dict[str, str], trainer: Any, tmp_path: Path
) -> None:
    folder, lengths = str(tiny_bart), {"max_length": 32, "max_target": 16}
    with pytest.raises(NoMatchError, match=r"train.tsv: no column 'shot'; .* nearest: short"):
        SequenceData(folder, "long", "shot", **lengths, **pairs).setup("fit")
    numbers = tmp_path / "a.jsonl"
    numbers.write_text('{"long": "the film", "short": 1}\n')
    with pytest.raises(SettingError, match=r"a.jsonl: column 'short' holds Value.*, expected text"):
        SequenceData(folder, **COLUMNS, train=str(numbers), **lengths).setup("fit")
    with pytest.raises(SettingError, match="there is no test split to test on; give `test`"):
        SequenceData(folder, **COLUMNS, **lengths, **pairs).setup("test")
    for name in ("beams", "max_written"):
        with pytest.raises(SettingError, match=f"{name} must be at least 1, got 0"):
            SequenceToSequence(folder, **{name: 0})
    module = SequenceToSequence(folder)
    module.model.config.max_position_embeddings = 20
    data = SequenceData(folder, **COLUMNS, **lengths, **pairs)
    with pytest.raises(SettingError, match="max_length=32, the model has 20 positions; set max_l"):
        trainer().fit(module, data)
