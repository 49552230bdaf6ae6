"""Chats into prompts: the tokenizer's own template, with the opening of the assistant's turn at the end."""

from __future__ import annotations

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.errors import UserError

SHAPE = '[{"role": "user", "content": "…"}, …]'


def render_messages(messages: Any, tokenizer: PreTrainedTokenizerBase, *, where: str) -> str:
    """Renders a chat as the text the model continues.

    Content given as parts (`[{"type": "text", "text": …}]`) is joined; keys that are None are left out, because Arrow and Parquet
    write None where JSON has no key.

    Args:
        messages: list of `{"role", "content"}`, ending with somebody else than the assistant.
        tokenizer: gives the template.
        where: the row, for errors.

    Raises:
        UserError: no chat template, malformed messages, or a template that refuses them (for example roles that do not alternate).
    """
    chat = _checked(messages, where)
    if not tokenizer.chat_template:
        raise UserError(
            "the row has messages, but the tokenizer has no chat template",
            where=where,
            fix="use a chat model, save a chat_template with the tokenizer, or give the prompt as text",
        )
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise UserError(
            f"the chat template refuses the messages: {error}", where=where, fix="order roles as the model expects them"
        ) from None


def _checked(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list with at least one message", where=where, fix=f"write {SHAPE}")
    chat = [_message(message, f"{where}, message {i + 1}") for i, message in enumerate(messages)]
    last = chat[-1]
    if last["role"] == "assistant":
        raise UserError(
            "the last message is the assistant's, so there is nothing to answer",
            where=where,
            fix="drop the last message, or end with the user's",
        )
    if not (last["content"] or "").strip():
        raise UserError("the last message is empty", where=where, fix="give it content, or remove the row")
    return chat


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"a message must be an object, not {type(message).__name__}", where=where, fix=f"write {SHAPE}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise UserError(f"the message has no role (its keys: {', '.join(map(str, message)) or 'none'})", where=where, fix=f"write {SHAPE}")
    given = {key: value for key, value in message.items() if value is not None}
    return given | {"role": role, "content": _content(given, where)}


def _content(message: dict[str, Any], where: str) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return None
    if isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
    ):
        return "".join(part["text"] for part in content)
    raise UserError(f"the content of the message is {_kind(content)}, not text", where=where, fix=f"write {SHAPE}")


def _kind(content: Any) -> str:
    return "missing" if content is None else type(content).__name__
