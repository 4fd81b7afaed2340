"""Is this a conversation that can be trained on, and how does it read in the roles of chat templates?

    (system) user (assistant (tool ...) user) ... assistant

Roles of ShareGPT and OpenAI become the four that templates know; tool calls' arguments become objects, as templates
expect them; a content in parts becomes one text. What has another order, or an assistant that says nothing, is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from copra_llm.errors import InputError, named, shown
from copra_llm.tasks.instruct.records import ROLES, Conversation

_ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_FOLLOWERS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Roles that may follow each role; None: the beginning."""


def conversation(
    raw: Any, place: str, *, tools: Any = None, system: str | None = None, prompt: int = 0
) -> Conversation:
    """Check and normalise a list of messages.

    Args:
        raw: the list, each an object with `role` and `content`, or `from` and `value`.
        place: file and line.
        tools: a list of JSON schemas, or the JSON text of one; None: none.
        system: text of a system message to put first; None: none.
        prompt: the first so many messages are context: no assistant message among them is trained.

    Raises:
        InputError: if a message is malformed, the roles are in another order, or nothing is left to train.
    """
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise InputError(f"{place}: the conversation is {_kind(raw)}, but must be a list of messages; mend it")
    untrained = set(range(prompt))
    messages = []
    for i, entry in enumerate(raw):
        read = _message(entry, f"{place}, message {i + 1}")
        if read.pop("weight", 1) == 0:
            untrained.add(i)
        messages.append(read)
    if system:
        if messages[0]["role"] == "system":
            raise InputError(f'{place}: a system message and a column "system" are both there; remove one of them')
        messages.insert(0, {"role": "system", "content": text(system, f'{place}, column "system"')})
        untrained = {i + 1 for i in untrained}
    _check_order(messages, place)
    assistants = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
    if assistants <= untrained:
        raise InputError(f"{place}: no assistant message is to be trained; remove the record")
    return Conversation(tuple(messages), _tools(tools, place), place, frozenset(assistants & untrained))


def text(value: Any, place: str) -> str:
    """`value`, if it is text that can be written as UTF-8.

    Raises:
        InputError: if it is not.
    """
    if not isinstance(value, str):
        raise InputError(f"{place} is {_kind(value)}, but must be text; mend it")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise InputError(f"{place} holds half a character ({half}), which no tokenizer reads; mend it") from None
    return value


def _message(entry: Any, place: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{place} is {_kind(entry)}, but must be an object with role and content; mend it")
    rest = {k: v for k, v in entry.items() if k not in ("role", "from", "content", "value") and v is not None}
    role = entry.get("role", entry.get("from"))
    content = entry.get("content", entry.get("value"))
    if not isinstance(role, str) or role not in _ROLE_NAMES:
        said = "no role" if role is None else f"the role {shown(role)}"
        raise InputError(f"{place} has {said}, but the roles are {', '.join(ROLES)} (or human and gpt); mend it")
    if role == "function_call":
        rest["tool_calls"] = [{"type": "function", "function": _json(content, place, "the function call")}]
        content = None
    if rest.get("tool_calls"):
        rest["tool_calls"] = [_tool_call(call, place) for call in _list(rest["tool_calls"], place, "tool_calls")]
    else:
        rest.pop("tool_calls", None)
    for name in ("thinking", "reasoning"):
        if name in rest:
            rest.setdefault("reasoning_content", rest.pop(name))
    said = "" if content is None and "tool_calls" in rest else _joined(content, place)
    role = _ROLE_NAMES[role]
    if not said.strip() and role in ("user", "assistant") and "tool_calls" not in rest:
        raise InputError(f"{place}, the {role}'s, is empty; fill it, or remove the record")
    return {"role": role, "content": said, **rest}


def _joined(content: Any, place: str) -> str:
    """A content in parts (`[{"type": "text", "text": ...}]`) is one text; parts of another kind are refused."""
    if not isinstance(content, list):
        return text(content, f"{place}: its content")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise InputError(f"{place} holds a part of type {named(kind)}, but only text can be trained on; remove it")
    return "".join(text(part.get("text"), f"{place}: a part of its content") for part in content)


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{place} has a tool call without a function's name; mend it")
    # OpenAI writes the arguments as JSON text; a template that writes JSON itself would quote that text again.
    given = function.get("arguments")
    arguments = {} if given is None else _json(given, place, f"the arguments of {function['name']}")
    outer = call if "function" in call else {"type": "function"}
    return {**outer, "function": {**function, "arguments": arguments}}


def _tools(tools: Any, place: str) -> tuple[dict[str, Any], ...]:
    if tools is None or tools == "":
        return ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InputError(f"{place}: the tools are text that is not JSON; mend them") from None
    for tool in _list(tools, place, "tools"):
        if not isinstance(tool, dict):
            raise InputError(f"{place}: a tool is {_kind(tool)}, but must be an object, its JSON schema; mend it")
    return tuple(tools)


def _json(value: Any, place: str, what: str) -> dict:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError(f"{place}: {what} is text that is not JSON; mend it") from None
    if not isinstance(value, dict):
        raise InputError(f"{place}: {what} is {_kind(value)}, but must be an object; mend it")
    return value


def _list(value: Any, place: str, what: str) -> list:
    if not isinstance(value, list):
        raise InputError(f"{place}: {what} is {_kind(value)}, but must be a list; mend it")
    return value


def _check_order(messages: list[dict[str, Any]], place: str) -> None:
    before = None
    for i, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _FOLLOWERS[before]:
            where = "begins with" if before is None else f"has after message {i - 1}, the {before}'s,"
            expected = " or ".join(_FOLLOWERS[before])
            raise InputError(
                f"{place} {where} a message of role {role}, but must go on with {expected}; mend the order"
            )
        before = role
    if before != "assistant":
        raise InputError(f"{place} ends with a message of role {before}, but must end with assistant; remove the rest")


_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing"}


def _kind(value: Any) -> str:
    if isinstance(value, (list, dict, str)) and not value:
        return "empty"
    return _KINDS.get(
        type(value), f"a number ({shown(value)})" if isinstance(value, (int, float)) else type(value).__name__
    )
