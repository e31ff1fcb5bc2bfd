"""Blocks of running text, and language models trained on them."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import lrcompress
from lrcompress.errors import NoMatchError, SettingError
from lrcompress.nn import LowRankLinear
from lrcompress.tasks import LanguageData, LanguageModelling

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "nine", "black", "birds"]
SIZES = {
    "gpt2": {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2},
    "bert": {"hidden_size": 16, "intermediate_size": 24},
}


def write(folder: Path, lines: int, shift: int = 0) -> str:
    rows = [" ".join(WORDS[(i * j + shift) % 11] for j in range(3 + i % 7)) for i in range(lines)]
    path = folder / f"train{shift or ''}.txt"
    path.write_text("\n".join(rows) + "\n")
    return str(path)


@pytest.fixture
def text(tmp_path: Path) -> dict[str, str]:
    return {"train": write(tmp_path, 60), "val": write(tmp_path, 25, 1)}


@pytest.fixture
def causal(tmp_path: Path, text: dict[str, str]) -> Path:
    """A folder with a byte-pair tokenizer and the config of a GPT-2."""
    trained = ByteLevelBPETokenizer()
    trained.train([text["train"]], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<end>", model_max_length=32
    )
    return saved(tmp_path / "causal", fast, "gpt2")


@pytest.fixture
def masked(tmp_path: Path, tiny_bert: Path) -> Path:
    return saved(tmp_path / "masked", AutoTokenizer.from_pretrained(tiny_bert), "bert")


def saved(folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str) -> Path:
    tokenizer.save_pretrained(folder)
    configure(folder, kind, len(tokenizer))
    return folder


def configure(folder: Path, kind: str, words: int) -> None:
    depth = {} if kind == "gpt2" else {"num_hidden_layers": 2, "num_attention_heads": 4}
    if kind != "gpt2":
        depth["max_position_embeddings"] = 32
    config = AutoConfig.for_model(kind, vocab_size=words, **SIZES[kind], **depth)
    config.save_pretrained(folder)


def blocks_of(data: LanguageData, split: str = "train") -> list[list[int]]:
    return data._splits[split]["input_ids"]


def test_blocks_are_the_text_cut_and_nothing_else(causal: Path, text: dict[str, str]) -> None:
    data = LanguageData(str(causal), length=16, **text)
    data.setup("fit")
    whole = data.tokenizer(Path(text["train"]).read_text(), add_special_tokens=False)["input_ids"]
    blocks = blocks_of(data)
    assert [token for block in blocks for token in block] == whole[: len(whole) // 16 * 16]
    assert data.tokenizer.decode(blocks[0]).startswith("the the the\nthe cat sat")
    assert {len(block) for block in blocks} == {16}
    (batch, *_) = data.val_dataloader()
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["attention_mask"].all()


def test_documents_end_where_they_are_asked_to(causal: Path, text: dict[str, str]) -> None:
    data = LanguageData(str(causal), length=8, end=True, limit=5, **text)
    data.setup("fit")
    lines = Path(text["train"]).read_text().splitlines(keepends=True)
    whole = [t for line in lines for t in (*data.tokenizer(line)["input_ids"], 0)]
    assert [token for block in blocks_of(data) for token in block] == whole[:40]


def test_blocks_of_a_masked_model_are_framed_as_its_texts(
    masked: Path, text: dict[str, str]
) -> None:
    data = LanguageData(str(masked), length=10, masked=0.3, **text)
    data.setup("fit")
    cls, sep = data.tokenizer.cls_token_id, data.tokenizer.sep_token_id
    assert all(block[0] == cls and block[-1] == sep for block in blocks_of(data))
    inner = [token for block in blocks_of(data) for token in block[1:-1]]
    assert cls not in inner
    whole = data.tokenizer(Path(text["train"]).read_text(), add_special_tokens=False)["input_ids"]
    assert inner == whole[: len(inner)]


def test_masks_change_with_the_epoch_and_nothing_else(masked: Path, text: dict[str, str]) -> None:
    data = LanguageData(str(masked), length=16, masked=0.3, batch_size=4, **text)
    data.setup("fit")
    rows = [data._splits["train"][i] for i in range(12)]
    whole = torch.tensor([row["input_ids"] for row in rows])
    batch = data.collate(0, rows)
    ids, labels = batch["input_ids"], batch["labels"]
    drawn = labels != -100
    assert torch.equal(labels[drawn], whole[drawn])
    assert torch.equal(ids[~drawn], whole[~drawn])
    assert not drawn[:, 0].any()
    share = drawn.float().mean().item()
    assert 0.15 < share < 0.4
    is_mask = (ids == data.tokenizer.mask_token_id)[drawn].float().mean().item()
    assert 0.6 < is_mask < 0.95
    torch.rand(3)  # the global generator has no part in it
    again = data.collate(0, [rows[3], rows[1]])
    assert torch.equal(again["input_ids"], ids[[3, 1]])
    assert not torch.equal(data.collate(1, rows)["labels"], labels)
    first, second = (list(data.val_dataloader()) for _ in range(2))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, second, strict=True))


def fit(
    folder: Path, text: dict[str, str], trainer: Any, resume: Path | None = None, **kwargs: Any
) -> tuple[list[torch.Tensor], LanguageModelling]:
    L.seed_everything(0 if resume is None else 1, verbose=False)
    share = kwargs.pop("masked", 0.0)
    kind = "masked" if share else "causal"
    module = LanguageModelling(str(folder), kind, lr=1e-2, pretrained=False)
    data = LanguageData(str(folder), length=16, masked=share, batch_size=5, **text)
    seen: list[torch.Tensor] = []

    class Record(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, _: int) -> None:
            seen.append(torch.stack([batch["input_ids"], batch["labels"]]))

    run = trainer(Record(), *kwargs.pop("callbacks", []), every_step=True, max_epochs=2, **kwargs)
    run.fit(module, data, ckpt_path=resume, weights_only=True)
    return seen, module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_resumed_run_sees_the_rest_of_the_uninterrupted_one(
    share: float, causal: Path, masked: Path, text: dict[str, str], trainer: Any, tmp_path: Path
) -> None:
    folder = masked if share else causal
    whole, _ = fit(folder, text, trainer, masked=share)
    assert len(whole) > 6
    for step in (1, len(whole) // 2, len(whole) - 2):
        saved_at = tmp_path / f"step={step}.ckpt"
        kept = saved_at.rename(tmp_path / f"kept-{step}.ckpt")
        rest, _ = fit(folder, text, trainer, kept, masked=share)
        assert len(rest) == len(whole) - step
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[step:], strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_perplexity_is_that_of_all_predicted_tokens(
    share: float, causal: Path, masked: Path, text: dict[str, str], trainer: Any
) -> None:
    folder = masked if share else causal
    kind = "masked" if share else "causal"
    L.seed_everything(0, verbose=False)
    module = LanguageModelling(str(folder), kind, pretrained=False)
    data = LanguageData(str(folder), length=16, masked=share, eval_batch_size=4, **text)
    run = trainer()
    (logged,) = run.validate(module, data, verbose=False)
    total, count = 0.0, 0
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits = module.model.eval()(**batch).logits
        for row, labels in zip(logits, batch["labels"], strict=True):
            if not share:
                row, labels = row[:-1], labels[1:]
            kept = labels != -100
            total += F.cross_entropy(row[kept].double(), labels[kept], reduction="sum").item()
            count += int(kept.sum())
    assert logged["val_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert logged["val_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_it_is_compressed_while_it_trains(
    kind: str, causal: Path, masked: Path, text: dict[str, str], trainer: Any, tmp_path: Path
) -> None:
    folder = masked if kind == "bert" else causal
    configure(folder, kind, 300)
    factorize = lrcompress.Factorize(keep=0.5, at="epoch:1", verbose=False)
    share = 0.3 if kind == "bert" else 0.0
    _, module = fit(folder, text, trainer, masked=share, callbacks=[factorize])
    point = factorize.report.points[0]
    assert point.layers
    assert all(layer.predicted_loss > 0 for layer in point.layers if layer.rank)
    assert any(isinstance(layer, LowRankLinear) for layer in module.modules())
    last = max(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    again = LanguageModelling.load_from_checkpoint(last, map_location="cpu", weights_only=True)
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_the_report_says_how_it_goes_on_with_texts_to_validate_on(
    causal: Path, text: dict[str, str], trainer: Any
) -> None:
    factorize = lrcompress.Factorize(keep=0.5, at="epoch:1", verbose=False)
    _, module = fit(causal, text, trainer, callbacks=[factorize])
    data = LanguageData(str(causal), length=16, **text)
    data.setup("validate")
    samples = factorize.report.samples
    assert len(samples) == 3
    for sample, block in zip(samples, blocks_of(data, "val"), strict=False):
        begun = block[:8]
        assert sample.prompt == data.tokenizer.decode(begun, skip_special_tokens=True)
        ids = torch.tensor([begun])
        for _ in range(32 - 8):  # all positions that the model has
            with torch.no_grad():
                following = module.model.eval()(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, following.view(1, 1)], 1)
            if following == module.model.generation_config.eos_token_id:
                break
        assert sample.after == data.tokenizer.decode(ids[0, 8:], skip_special_tokens=True)
        assert sample.before


def test_a_masked_model_goes_on_with_nothing(
    masked: Path, text: dict[str, str], trainer: Any
) -> None:
    factorize = lrcompress.Factorize(keep=0.5, at="epoch:1", verbose=False)
    fit(masked, text, trainer, masked=0.3, callbacks=[factorize])
    assert factorize.report.points
    assert not factorize.report.samples


def test_a_number_of_samples_below_zero_is_refused(causal: Path) -> None:
    with pytest.raises(SettingError, match="samples is a number of texts from 0, got -1"):
        LanguageModelling(str(causal), pretrained=False, samples=-1)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"train": None, "val": None},
            SettingError,
            "give `name`, a data set on the hub, or `trai",
        ),
        ({"length": 1}, SettingError, "length must be at least 2, got 1"),
        ({"length": 64}, SettingError, "length=64 is more than the 32 tokens this model can take"),
        ({"limit": 0}, SettingError, "limit must be at least 1, got 0"),
        ({"masked": 1.0}, SettingError, "masked is a share of tokens from 0, below 1, got 1.0"),
        ({"masked": 0.2}, SettingError, "masked=0.2, but the tokenizer has no mask_token"),
    ],
)
def test_arguments_that_are_refused(
    kwargs: Any, error: type, message: str, causal: Path, text: dict[str, str]
) -> None:
    with pytest.raises(error, match=message):
        LanguageData(str(causal), **(text | {"length": 16} | kwargs))


def test_data_that_cannot_be_used(
    causal: Path, masked: Path, text: dict[str, str], trainer: Any, tmp_path: Path
) -> None:
    with pytest.raises(NoMatchError, match=r"train.txt: no column 'texts'; nearest: text"):
        LanguageData(str(causal), "texts", length=16, **text).setup("fit")
    table = tmp_path / "a.jsonl"
    table.write_text('{"text": 1}\n')
    with pytest.raises(SettingError, match=r"a.jsonl: column 'text' holds Value.*, expected text"):
        LanguageData(str(causal), train=str(table), length=16).setup("fit")
    table.write_text('{"text": "the cat"}\n')
    with pytest.raises(SettingError, match=r"tokens are less than a block of 32; set length lower"):
        LanguageData(str(causal), train=str(table), length=32).setup("fit")
    with pytest.raises(SettingError, match="there is no test split to test on; give `test`"):
        LanguageData(str(causal), length=16, **text).setup("test")
    module = LanguageModelling(str(masked), "masked", pretrained=False)
    with pytest.raises(SettingError, match=r"objective='masked', but the data has masked=0.0: cau"):
        trainer().fit(module, LanguageData(str(causal), length=16, **text))
    config = AutoConfig.from_pretrained(causal, n_positions=12)
    config.save_pretrained(causal)
    module = LanguageModelling(str(causal), pretrained=False)
    with pytest.raises(SettingError, match="length=16, the model has 12 positions; set length to"):
        trainer().fit(module, LanguageData(str(causal), length=16, **text))
    with pytest.raises(
        SettingError, match=r"BertLMHeadModel reads the tokens that a causal model is to predict; "
    ):
        LanguageModelling(str(masked), pretrained=False)
    with pytest.raises(SettingError, match="unknown objective 'masket'; nearest: masked"):
        LanguageModelling(str(masked), "masket")


def test_a_tokenizer_without_an_end_cannot_end_documents(
    masked: Path, text: dict[str, str]
) -> None:
    with pytest.raises(SettingError, match="end=True, but the tokenizer has no eos_token"):
        LanguageData(str(masked), length=16, end=True, **text)


@pytest.mark.parametrize(
    ("dtype", "stored", "expected"),
    [
        (None, torch.bfloat16, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_model_is_loaded_in_the_precision_that_is_named(
    causal: Path,
    dtype: Any,
    stored: torch.dtype,
    expected: torch.dtype,
    pretrained: bool,
) -> None:
    model = LanguageModelling(str(causal), pretrained=False).model.to(stored)
    model.save_pretrained(causal)
    given = {} if dtype is None else {"dtype": dtype}
    again = LanguageModelling(str(causal), pretrained=pretrained, **given).model
    assert {p.dtype for p in again.parameters()} == {expected}
    if pretrained:
        name, weight = next(iter(model.named_parameters()))
        assert again.get_parameter(name).equal(weight.to(expected))


def test_another_precision_is_refused(causal: Path) -> None:
    with pytest.raises(SettingError, match="float32, bfloat16, auto, got 'bf16'; nearest: bfloat"):
        LanguageModelling(str(causal), pretrained=False, dtype="bf16")  # type: ignore[arg-type]


def test_statistics_of_a_bfloat16_model_are_summed_in_float32(
    causal: Path, text: dict[str, str], trainer: Any
) -> None:
    """By a sum over all tokens in float64 of what a layer reads, which bfloat16 would not give."""
    data = LanguageData(str(causal), length=16, batch_size=4, **text)
    module = LanguageModelling(str(causal), pretrained=False, dtype="bfloat16", lr=0.0)
    name = "model.transformer.h.0.mlp.c_fc"
    read: list[torch.Tensor] = []
    layer = module.get_submodule(name)
    layer.register_forward_hook(
        lambda _, x, y: read.append(x[0].detach()) if y.requires_grad else None
    )
    factorize = lrcompress.Factorize(keep=0.5, at="step:4", every_n_steps=1)
    seen: dict[str, Any] = {}
    change = factorize._change_model

    def kept(*given: Any) -> None:
        seen["sums"] = factorize._observation.statistics.of(name, ("input_moment", "output_moment"))
        seen["inputs"] = torch.cat(read).reshape(-1, 16)
        change(*given)

    factorize._change_model = kept  # type: ignore[method-assign]
    trainer(factorize, max_steps=6).fit(module, data)
    inputs = seen["inputs"]
    assert inputs.dtype == torch.bfloat16
    assert {seen["sums"].values[key].dtype for key in seen["sums"].values} == {torch.float32}
    expected = inputs.double().T @ inputs.double()
    assert seen["sums"].moment("input_moment").double().allclose(expected, rtol=1e-5, atol=1e-4)
    low = [m for m in module.modules() if isinstance(m, LowRankLinear)]
    assert low
    assert {p.dtype for m in low for p in m.parameters()} == {torch.bfloat16}
    assert all(bool(p.isfinite().all()) for p in module.parameters())
