"""Conversations: which of their tokens are answers, in blocks and in statistics."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PreTrainedTokenizerFast

import lrcompress
from lrcompress.errors import NoMatchError, SettingError
from lrcompress.statistics.views import view
from lrcompress.structure.selection import select
from lrcompress.tasks import LanguageData, LanguageModelling
from lrcompress.tasks.chat import encode_conversation

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{
'<|start|>system\nYou help.<|end|>\n' }}{% endif %}{{
'<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}{% endfor %}{%
if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
# as Llama 2: no generation prompt, answers trimmed, and roles must take turns
BRACKETS = """{% for message in messages %}{%
if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{
raise_exception('roles must alternate user/assistant') }}{% endif %}{%
if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{%
else %}{{ ' ' + message['content'] | trim + ' <|end|>' }}{% endif %}{% endfor %}"""
# as Qwen 3: thoughts of earlier answers are left out
FORGETTING = """{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' }}{%
if message['role'] == 'assistant' and not loop.last %}{{
message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}{{
'<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
MARKED = """{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' }}{%
if message['role'] == 'assistant' %}{% generation %}{{
message['content'].split('</think>')[-1] + '<|end|>' }}{% endgeneration %}{%
else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"""

TALK = [
    {"role": "user", "content": "what is the cat on"},
    {"role": "assistant", "content": "the cat is on a mat"},
    {"role": "user", "content": "and who is on a mat"},
    {"role": "assistant", "content": "  the cat, the  cat"},
]
SHORT = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "a mat"}]
LONG = [{"role": "user", "content": "what " * 120}, {"role": "assistant", "content": "a mat"}]


def tokenizer(template: str | None = CHATML, **given: Any) -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    texts = [message["content"] for message in TALK] * 20 + ["system user assistant You help"]
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    trained.train_from_iterator(texts, 320, special_tokens=special, show_progress=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=128,
        **given,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    fast.chat_template = template
    return fast


def model_folder(path: Path, template: str | None = CHATML) -> str:
    own = tokenizer(template)
    own.save_pretrained(path)
    LlamaConfig(
        vocab_size=len(own),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    ).save_pretrained(path)
    return str(path)


def written(path: Path, *talks: Any, column: str = "messages") -> str:
    path.write_text("".join(json.dumps({column: talk}) + "\n" for talk in talks))
    return str(path)


def answers(own: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> list[str]:
    """The texts of the stretches that have labels."""
    found: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label == -100:
            found.append([])
        else:
            assert label == token
            found[-1].append(token)
    return [own.decode(stretch) for stretch in found if stretch]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["the cat is on a mat<|end|>", "  the cat, the  cat<|end|>"]),
        (BRACKETS, [" the cat is on a mat <|end|>", " the cat, the  cat <|end|>"]),
        (MARKED, ["the cat is on a mat<|end|>", "  the cat, the  cat<|end|>"]),
    ],
    ids=["ChatML", "no generation prompt", "marked by the template"],
)
def test_labels_are_the_answers_with_what_ends_them(template: str, expected: list[str]) -> None:
    own = tokenizer(template)
    row = encode_conversation(own, TALK, "here")
    assert answers(own, row) == expected
    assert row["input_ids"] == own.apply_chat_template(TALK, return_dict=False)


def test_an_answer_may_begin_a_conversation() -> None:
    own = tokenizer()
    row = encode_conversation(own, [{"role": "assistant", "content": "assistant"}, *TALK], "here")
    assert answers(own, row)[0] == "assistant<|end|>"
    assert len(answers(own, row)) == 3
    alone = tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    row = encode_conversation(alone, [{"role": "assistant", "content": "the cat"}], "here")
    assert row["labels"] == [-100, *row["input_ids"][1:]], "nothing comes before the first token"


def test_answers_that_a_template_changes_later_are_not_guessed() -> None:
    own = tokenizer(FORGETTING)
    thought = [SHORT[0], {"role": "assistant", "content": "<think>cat</think>a mat"}]
    assert answers(own, encode_conversation(own, thought, "x")) == [
        "<think>cat</think>a mat<|end|>"
    ]
    with pytest.raises(SettingError, match=r"row 4: .* writes message 1 otherwise where others"):
        encode_conversation(own, [*thought, *SHORT], "talks.jsonl, row 4")
    assert len(answers(own, encode_conversation(own, TALK, "x"))) == 2
    marked = tokenizer(MARKED)
    found = answers(marked, encode_conversation(marked, [*thought, *SHORT], "x"))
    assert found == ["a mat<|end|>", "a mat<|end|>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation has no messages"),
        (None, "the conversation has no messages"),
        ([{"content": "hi"}], "message 0 has no 'role'; it has content"),
        ([*SHORT, {"role": None, "content": None}], "message 2 has no 'role'; it is empty"),
        ([{"role": "user", "content": None}], "message 0 has no 'content'; it has role"),
        ([{"role": "user", "content": ["a"]}], r"content of message 0 must be text, got \['a'\]"),
        ([{"role": "bot", "content": "a"}], "unknown role 'bot'; expected system, .* nearest: "),
        ([{"role": "asistant", "content": "a"}], "unknown role 'asistant'.*nearest: assistant"),
        (TALK[:1], "no message of the role 'assistant', .* roles are user"),
        (TALK[1:], "template refuses this: roles must alternate"),
        (["hi"], r"expected a list of messages, each with a 'role' .* got \['hi'\]"),
        ({"role": "user"}, "expected a list of messages"),
    ],
)
def test_a_conversation_that_is_none_names_its_row(messages: Any, message: str) -> None:
    with pytest.raises(SettingError, match=rf"^talks\.jsonl, row 7: .*{message}"):
        encode_conversation(tokenizer(BRACKETS), messages, "talks.jsonl, row 7")


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    folder, talks = model_folder(tmp_path / "base", None), written(tmp_path / "t.jsonl", SHORT)
    with pytest.raises(SettingError, match=r"tokenizer '.*base' has no chat template: base models"):
        LanguageData(folder, train=talks, messages="messages")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": "messages", "masked": 0.1}, "messages='messages' is for causal models"),
        ({"isolated": True, "masked": 0.1}, "isolated=True is for causal models, got masked=0.1"),
        ({"messages": "messages", "end": True}, "end=True is for rows of text"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    folder, talks = model_folder(tmp_path / "chat"), written(tmp_path / "t.jsonl", SHORT)
    with pytest.raises(SettingError, match=message):
        LanguageData(folder, train=talks, **given)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_files_of_conversations_are_one_a_row(suffix: str, tmp_path: Path) -> None:
    train = written(tmp_path / f"train{suffix}", TALK, SHORT, LONG, SHORT)
    if suffix == ".parquet":
        Dataset.from_dict({"messages": [TALK, SHORT, LONG, SHORT]}).to_parquet(train)
    folder = model_folder(tmp_path / "chat")
    data = LanguageData(folder, train=train, messages="messages", length=110, batch_size=2)
    with pytest.warns(UserWarning, match=r"1 of 4 conversations have no answer within length=110"):
        data.setup("fit")
    batches = list(data.train_dataloader())
    assert sorted(len(batch["input_ids"]) for batch in batches) == [1, 2]
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        real = batch["attention_mask"] == 1
        assert (batch["input_ids"][~real] == data.tokenizer.pad_token_id).all()
        assert (batch["labels"][~real] == -100).all()
    rows = data._splits["train"]
    assert [answers(data.tokenizer, row)[-1] for row in rows] == [
        "  the cat, the  cat<|end|>",
        "a mat<|end|>",
        "a mat<|end|>",
    ]


def test_conversations_are_cut_at_length(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", TALK, TALK)
    folder = model_folder(tmp_path / "chat")
    data = LanguageData(folder, train=train, messages="messages", length=60, limit=1)
    data.setup("fit")
    (row,) = data._splits["train"]
    whole = encode_conversation(data.tokenizer, TALK, "x")
    assert row["input_ids"] == whole["input_ids"][:60]
    assert row["labels"] == whole["labels"][:60]


def test_files_without_conversations_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "chat")

    def setup(*talks: Any, column: str = "messages", **given: Any) -> None:
        train = written(tmp_path / "train.jsonl", *talks, column=column)
        LanguageData(folder, train=train, **{"messages": "messages", "length": 110, **given}).setup(
            "fit"
        )

    with pytest.raises(NoMatchError, match=r"no column 'messages'; nearest: message"):
        setup(SHORT, column="message")
    with pytest.raises(SettingError, match=r"column 'messages' holds .*, expected lists of mess"):
        setup("just text")
    with pytest.raises(SettingError, match="expected text; for conversations set messages: talk"):
        setup(SHORT, column="talk", text="talk", messages=None)
    with pytest.raises(SettingError, match=r"jsonl, row 1 \(from 0\): message 1 has no 'role'"):
        setup(SHORT, [SHORT[0], {"content": "a mat"}])
    with pytest.raises(SettingError, match=r"1 of 1 conversations have no answer .* set length"):
        setup(LONG)


def test_statistics_of_conversations_are_those_of_the_answers_alone(
    tmp_path: Path, trainer: Any
) -> None:
    """K-FAC's sums, by hand from what each layer reads and gives at the answers' tokens."""
    folder = model_folder(tmp_path / "chat")
    train = written(tmp_path / "train.jsonl", TALK, SHORT, SHORT)
    given = {"train": train, "val": train, "messages": "messages", "length": 110}
    data = LanguageData(folder, batch_size=3, **given)
    module = LanguageModelling(folder, pretrained=False)
    factorize = lrcompress.Factorize(keep=0.5, at="step:1", every_n_steps=1)
    seen: dict[str, Any] = {}
    observed = factorize._change_model

    def kept(*given: Any) -> None:
        seen["statistics"] = factorize._observation.statistics
        observed(*given)

    factorize._change_model = kept  # type: ignore[method-assign]
    before = {key: value.clone() for key, value in module.model.state_dict().items()}
    trainer(factorize, max_steps=2).fit(module, data)

    model = AutoModelForCausalLM.from_config(module.model.config)
    model.load_state_dict(before)
    (batch,) = data.train_dataloader()
    names = select(model).names
    reads: dict[str, torch.Tensor] = {}
    gives: dict[str, torch.Tensor] = {}
    for name in names:

        def saw(_: Any, read: Any, given: torch.Tensor, name: str = name) -> None:
            given.retain_grad()
            reads[name], gives[name] = read[0], given

        model.get_submodule(name).register_forward_hook(saw)
    loss = model(**batch).loss
    answered = batch["labels"] != -100
    (loss * answered.sum()).backward()
    statistics = seen["statistics"]
    assert statistics.tokens == answered.sum()
    for name in names:
        x, g = reads[name][answered], gives[name].grad[answered]
        sums = statistics.of(f"model.{name}", ("input_moment", "output_moment"))
        assert sums.moment("input_moment").allclose(x.T @ x, rtol=1e-4, atol=1e-5)
        assert sums.moment("output_moment").allclose(g.T @ g, rtol=1e-3, atol=1e-7)
        assert view(model.get_submodule(name)).shape == (g.shape[1], x.shape[1])


def test_a_mask_that_was_chosen_stays(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "chat")
    talks = written(tmp_path / "train.jsonl", TALK, SHORT)
    data = LanguageData(folder, train=talks, messages="messages")
    sampling = lrcompress.Factorize(keep=0.5, at=0.5).sampling
    assert sampling.mask == "attention_mask"
    assert sampling.for_data(data).mask == "labels"
    assert sampling.for_data(None) == sampling
    chosen = lrcompress.Factorize(keep=0.5, at=0.5, mask="~padding").sampling
    assert chosen.for_data(data) == chosen
    text = LanguageData(folder, train=talks)
    assert sampling.for_data(text) == sampling


def test_isolated_conversations_give_the_logits_of_each_alone(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "chat")
    train = written(tmp_path / "train.jsonl", SHORT, TALK[:2], SHORT, SHORT)
    given = {"train": train, "messages": "messages", "length": 110}
    data = LanguageData(folder, isolated=True, **given)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    alone = LanguageData(folder, **given)
    alone.setup("fit")
    model = LanguageModelling(folder, pretrained=False).model.eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert set(batch) == {"input_ids", "labels", "position_ids", "use_cache"}
    logits = model(**batch).logits
    found = []
    for row in range(len(logits)):
        places = batch["position_ids"][row].tolist()
        starts = [i for i, place in enumerate(places) if place == 0]
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
            if (batch["labels"][row, start:end] != -100).any():  # and no padding
                found.append((batch["input_ids"][row, start:end], logits[row, start:end]))
    rows = list(alone._splits["train"])
    assert len(found) == len(rows) == 4
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        expected = model(input_ids=ids[None]).logits[0]
        same = [y for x, y in found if x.equal(ids)]
        assert same
        assert all(y.allclose(expected, atol=1e-5) for y in same)


def test_isolated_text_gives_the_logits_of_each_row_alone(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "chat")
    rows = ["the cat is on a mat", "and who is the cat", "a mat", "what is on the mat and the cat"]
    train = tmp_path / "train.txt"
    train.write_text("\n".join(rows * 3) + "\n")
    data = LanguageData(folder, train=str(train), length=24, isolated=True, end=True, limit=2)
    assert data.statistics_mask is None, "nothing is padded"
    data.setup("fit")
    (batch,) = data.train_dataloader()
    model = LanguageModelling(folder, pretrained=False).model.eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    logits = model(**batch).logits
    for ids, labels, places, found in zip(
        batch["input_ids"], batch["labels"], batch["position_ids"], logits, strict=True
    ):
        starts = [i for i, place in enumerate(places.tolist()) if place == 0]
        assert starts[0] == 0
        assert len(starts) > 2
        for start, end in zip(starts, [*starts[1:], 24], strict=True):
            alone = model(input_ids=ids[None, start:end]).logits[0]
            assert found[start:end].allclose(alone, atol=1e-5)
        unlabelled = (labels == -100).nonzero().flatten().tolist()
        assert unlabelled in (starts, starts[1:]), "the first token of a row follows from nothing"
        labelled = labels != -100
        assert labels[labelled].equal(ids[labelled])


def test_a_model_that_mixes_documents_is_refused(tmp_path: Path, trainer: Any) -> None:
    folder = model_folder(tmp_path / "chat")
    train = written(tmp_path / "train.jsonl", SHORT, SHORT)
    given = {"train": train, "val": train, "messages": "messages", "length": 64}
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2}
    vocabulary = LlamaConfig.from_pretrained(folder).vocab_size
    BloomConfig(vocab_size=vocabulary, **sizes).save_pretrained(folder)
    module = LanguageModelling(folder, pretrained=False)
    with pytest.raises(SettingError, match="a BloomForCausalLM does not keep documents in one"):
        trainer(max_steps=1).fit(module, LanguageData(folder, isolated=True, **given))
    trainer(max_steps=1).fit(module, LanguageData(folder, **given))


@pytest.mark.parametrize("messages", ["messages", None], ids=["conversations", "text"])
def test_isolated_documents_are_compressed_refitted_and_validated(
    messages: str | None, tmp_path: Path, trainer: Any
) -> None:
    folder = model_folder(tmp_path / "chat")
    train = written(tmp_path / "train.jsonl", *[TALK[:2], SHORT] * 4)
    if messages is None:
        lines = [json.dumps({"text": "the cat is on a mat and"}) for _ in range(20)]
        Path(train).write_text("\n".join(lines))
    data = LanguageData(
        folder, train=train, val=train, messages=messages, length=60, isolated=True, batch_size=2
    )
    module = LanguageModelling(folder, pretrained=False)
    factorize = lrcompress.Factorize(keep=0.6, at=0.5, every_n_steps=1, refit=0.5)
    fit = trainer(factorize, max_steps=2)
    fit.fit(module, data)
    (point,) = factorize.report.points
    assert any(layer.rank for layer in point.layers)
    assert fit.callback_metrics["val_perplexity"] > 1
