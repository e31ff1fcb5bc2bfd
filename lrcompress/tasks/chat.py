"""Conversations as tokens by a tokenizer's chat template, and which tokens are the answers."""

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lrcompress.errors import SettingError, nearest
from lrcompress.statistics.masks import IGNORED

ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWERS = "assistant"
_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")
_CONTENT = "\ue000"  # a character of no text, to find where a template puts a message
Message = Mapping[str, Any]


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer can write conversations, and tell where in a text its tokens lie.

    Raises:
        SettingError: if it cannot.
    """
    if not tokenizer.chat_template:
        raise SettingError(
            f"messages is set, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "base models have none; take that of an instruct model, or put a chat_template.jinja "
            "into its folder"
        )
    if not tokenizer.is_fast:
        raise SettingError(
            f"messages needs a tokenizer that tells where its tokens lie in a text (is_fast), got "
            f"{type(tokenizer).__name__}"
        )


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message] | None, where: str
) -> dict[str, list[int]]:
    """Return the tokens of a conversation; the labels are -100 but for those of the answers.

    An answer is what the template writes between what it writes before an answer (its generation
    prompt) and the next message, up to the last end-of-text token in it. Where the template marks
    answers by ``{% generation %}``, they are what it marks.

    Args:
        tokenizer: with a chat template; see :func:`check_template`.
        messages: of which each has a ``role`` and a ``content``; entries that are None are as if
            they were not there.
        where: the file and the row, for messages of errors.

    Returns:
        ``input_ids`` and ``labels``. The first label is -100: nothing comes before it.

    Raises:
        SettingError: if a message lacks its role or content or its role is unknown, if there is no
            answer, or if the template refuses the conversation or writes an answer otherwise once
            others follow it.
    """
    checked = _checked(messages, where)
    if _MARKED.search(tokenizer.get_chat_template()):
        ids, answers = _marked(tokenizer, checked, where)
    else:
        ids, answers = _found(tokenizer, checked, where)
    labels = [
        token if answer and i else IGNORED
        for i, (token, answer) in enumerate(zip(ids, answers, strict=True))
    ]
    return {"input_ids": ids, "labels": labels}


def _checked(messages: list[Message] | None, where: str) -> list[dict[str, Any]]:
    if not messages:
        raise SettingError(f"{where}: the conversation has no messages")
    if not (isinstance(messages, list) and all(isinstance(x, Mapping | None) for x in messages)):
        raise SettingError(
            f"{where}: expected a list of messages, each with a 'role' and a 'content', got "
            f"{messages!r:.80}"
        )
    found = [{key: x for key, x in (m or {}).items() if x is not None} for m in messages]
    for i, message in enumerate(found):
        _check_message(message, i, where)
    if not any(message["role"] == ANSWERS for message in found):
        raise SettingError(
            f"{where}: no message of the role {ANSWERS!r}, so there is nothing to learn; roles are "
            f"{', '.join(message['role'] for message in found)}"
        )
    return found


def _check_message(message: Message, i: int, where: str) -> None:
    for key in ("role", "content"):
        if key not in message and not (key == "content" and "tool_calls" in message):
            has = f"it has {', '.join(message)}" if message else "it is empty"
            raise SettingError(f"{where}: message {i} has no {key!r}; {has}")
        if not isinstance(message.get(key, ""), str):
            raise SettingError(
                f"{where}: {key} of message {i} must be text, got {message[key]!r:.80}"
            )
    if message["role"] not in ROLES:
        raise SettingError(
            f"{where}: message {i} is of the unknown role {message['role']!r}; expected "
            f"{', '.join(ROLES)}, nearest: {nearest(message['role'], ROLES, 1)}"
        )


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str
) -> tuple[list[int], Iterable[object]]:
    found: Any = _applied(
        tokenizer,
        messages,
        where,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return found["input_ids"], found["assistant_masks"]


def _found(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str
) -> tuple[list[int], Iterable[object]]:
    text: str = _applied(tokenizer, messages, where)
    encoded = tokenizer(
        text,
        add_special_tokens=False,  # they are the template's
        padding=False,
        truncation=False,
        verbose=False,
        return_offsets_mapping=True,
    )
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    answers = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == ANSWERS:
            begin, end = _place(tokenizer, messages, i, text, where)
            own = [j for j, (a, b) in enumerate(places) if max(b, a + 1) > begin and a < end]
            ends = [n for n, j in enumerate(own, 1) if ids[j] == tokenizer.eos_token_id]
            for j in own[: ends[-1] if ends else None]:
                answers[j] = True
    return ids, answers


def _place(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    i: int,
    text: str,
    where: str,
) -> tuple[int, int]:
    """Return where in the text of a conversation the answer ``i`` begins and ends.

    Raises:
        SettingError: if the conversation without what follows it is written otherwise.
    """
    content = messages[i].get("content", "").strip()
    if i:
        before = _applied(tokenizer, messages[:i], where, add_generation_prompt=True)
    else:  # templates may expect a message to begin with
        probe = [{**messages[0], "content": _CONTENT}]
        before = _applied(tokenizer, probe, where).partition(_CONTENT)[0]
    until = _applied(tokenizer, messages[: i + 1], where)
    end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, until, strict=False)))
    begin = len(before)
    if not text.startswith(before) or content not in text[begin:end]:
        raise SettingError(
            f"{where}: the chat template writes message {i} otherwise where others follow it, so "
            "its tokens cannot be told; keep one answer a conversation, or mark answers in the "
            "template by {% generation %} and {% endgeneration %}"
        )
    return begin, end


def _applied(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, **given: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **given})
    except (TemplateError, TypeError, ValueError) as error:
        raise SettingError(f"{where}: the chat template refuses this: {error}") from error


def packed(
    documents: Iterable[Mapping[str, list[int]]], length: int
) -> Iterable[dict[str, list[int]]]:
    """Yield blocks of whole documents, in their order, with positions that begin anew at each.

    Args:
        documents: of ``input_ids`` and ``labels``, none longer than ``length``.
        length: tokens of a block at most.

    Example:
        >>> documents = [{"input_ids": [5] * n, "labels": [5] * n} for n in (2, 3, 4)]
        >>> [block["position_ids"] for block in packed(documents, length=6)]
        [[0, 1, 0, 1, 2], [0, 1, 2, 3]]
    """
    block: dict[str, list[int]] = {}
    for one in documents:
        more = {**one, "position_ids": list(range(len(one["input_ids"])))}
        if block and len(block["input_ids"]) + len(one["input_ids"]) > length:
            yield block
            block = {}
        block = {key: block.get(key, []) + more[key] for key in more}
    if block:
        yield block
