"""Chats as text: the tokenizer's own template, guarded, with the opening of the assistant's turn at the end or with an answer.

Two kinds of failure are told apart. A template that is missing or broken is the model's fault, and no row will do. A template that
refuses a chat (`raise_exception`) leaves the other rows alone: that is the row's fault (`RefusedChat`), which `data.faults` may drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.errors import UserError

SHAPE = '[{"role": "user", "content": "…"}, …]'
BROKEN = (jinja2.TemplateSyntaxError, jinja2.TemplateRuntimeError, jinja2.TemplateNotFound)
"""What jinja raises of a template that cannot work; `raise_exception` raises a plain `TemplateError`."""


class RefusedChat(UserError):
    """A chat that the template refuses: the fault of its row, not of the model."""


def render_messages(messages: Any, tokenizer: PreTrainedTokenizerBase, *, where: str) -> str:
    """Renders a chat as the text the model continues: `checked_chat`, then `render` with the opening of the answer.

    Args:
        messages: list of `{"role", "content"}`, ending with somebody else than the assistant.
        tokenizer: gives the template.
        where: the row, for errors.

    Raises:
        UserError: malformed messages, or as `render`.
    """
    return render(checked_chat(messages, where), tokenizer, where=where, ask=True)


def render(chat: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, where: str, ask: bool) -> str:
    """A chat through the tokenizer's template.

    Args:
        chat: messages whose content is text.
        where: the row, for errors.
        ask: whether the opening of the assistant's turn stands at the end.

    Raises:
        RefusedChat: the template refuses this chat (for example roles that do not alternate).
        UserError: no chat template, or one that is broken.
    """
    template: Any = tokenizer.chat_template
    if not template or (isinstance(template, dict) and "default" not in template):
        fix = "use a chat model, save a chat_template with the tokenizer, or give the prompt as text"
        raise UserError("the row has messages, but the tokenizer has no chat template", where=where, fix=fix)
    try:
        return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=ask))
    except BROKEN as error:
        keys = ", or give the messages the keys that it reads" if isinstance(error, jinja2.UndefinedError) else ""
        fix = f"mend chat_template in the model folder{keys}"
        raise UserError(f"the chat template is broken: {_line(error)}", where=where, fix=fix) from None
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        fix = "order roles as the model expects them"
        raise RefusedChat(f"the chat template refuses the messages: {_line(error)}", where=where, fix=fix) from None


def render_answered(
    chat: Sequence[dict[str, Any]], answer: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, where: str, otherwise: str = ""
) -> tuple[str, int]:
    """A chat with its answer, and where in the text the answer begins: behind what the template asks for an answer with.

    Args:
        chat: the messages before the answer. answer: the assistant's message.
        where: the row, for errors.
        otherwise: what may be done beside mending the template where it hides the answer's beginning.

    Raises:
        RefusedChat: nothing stands before the answer; or as `render`.
        UserError: the answer's beginning cannot be told, because the template renders the chat otherwise once it is answered, or asks for
            answers with an opening that it does not write in front of them; or as `render`.
    """
    if not chat:
        fix = "order roles as the model expects them"
        raise RefusedChat("the dialogue begins with the assistant's turn, for which nothing asks", where=where, fix=fix)
    before, whole = render(chat, tokenizer, where=where, ask=True), render([*chat, answer], tokenizer, where=where, ask=False)
    if whole.startswith(before):
        return whole, len(before)
    unasked = render(chat, tokenizer, where=where, ask=False)
    if not (whole.startswith(unasked) and before.startswith(unasked)):
        fix = f"mend chat_template in the model folder so that it only appends{otherwise}"
        raise UserError("the chat template renders earlier turns anew, so the answer cannot be told apart", where=where, fix=fix)
    raise UserError(
        f"the chat template asks for an answer with {before[len(unasked) :]!r}, but renders this answer without that in front, "
        "so its beginning cannot be told",
        where=where,
        fix=f"mend chat_template in the model folder, or let the answers begin as it makes the model begin{otherwise}",
    )


def checked_chat(messages: Any, where: str) -> list[dict[str, Any]]:
    """Messages as templates take them.

    Content given as parts (`[{"type": "text", "text": …}]`) is joined; keys that are None are left out, because Arrow and Parquet
    write None where JSON has no key.

    Raises:
        UserError: malformed messages, or none that asks for an answer at the end.
    """
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
