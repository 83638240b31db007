"""Documents: what of a record is trained on, and what only goes before it."""

from __future__ import annotations

import json
from typing import NamedTuple

CHAT = ("messages", "conversations")
INSTRUCTION = ("instruction", "output")
QUESTION = ("question", "answer")
PAIR = ("prompt", "completion")
# What belongs to a conversation, beside its messages.
OPTIONS = ("tools", "system", "chat_template_kwargs")
BESIDE = dict.fromkeys([*CHAT, "prompt"], OPTIONS)
BESIDE["instruction"] = ("input", "history", *OPTIONS)
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
ROLES |= {"function": "tool", "observation": "tool", "function_response": "tool"}
ROLES |= {"chatgpt": "assistant", "bing": "assistant"}
WEIGHTS = ("weight", "train", "loss_weight")  # of a turn: 0 is not trained on
THOUGHTS = ("reasoning", "thinking", "reasoning_content")  # keys, and types of parts


class Pair(NamedTuple):
    """Two texts, of which the second is trained on."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """A conversation, and of each message whether it may be trained on."""

    messages: list[dict]
    trains: list[bool]
    tools: list[dict] | None = None
    options: dict | None = None  # for the template


Document = str | Pair | Chat


def size_of(document: Document) -> int:
    """Characters, of a conversation about."""
    if isinstance(document, Chat):
        return sum(len(str(message["content"])) for message in document.messages)
    return len(document) if isinstance(document, str) else sum(map(len, document))


class Form(NamedTuple):
    """How a file's records become documents: by which columns, as what."""

    names: tuple[str, ...]
    kind: str  # text, chat, pair or instruction
    others: tuple[str, ...] = ()  # columns that are not used

    @property
    def wanted(self) -> set[str]:
        return {*self.names, *BESIDE.get(self.names[0], ())}


def document_of(form: Form, record: dict) -> Document | None:
    """What a record holds, or None if that is nothing.

    Raises:
        ValueError: a value is none of the kind that the form says.
    """
    if any(record.get(name) is None for name in form.names):
        return None
    if is_blank(record[form.names[-1]]):
        return None
    if form.names in (INSTRUCTION, QUESTION):
        return instruction(form, record)
    if form.kind == "chat":
        *before, messages = (messages_in(record, name) for name in form.names)
        return chat(messages, record, before[0] if before else [])
    texts = [text_in(record, name) for name in form.names]
    return texts[0] if form.kind == "text" else Pair(*texts)


def is_blank(value: object) -> bool:
    return not value.strip() if isinstance(value, str) else value in ([], {})


def text_in(record: dict, name: str, default: str | None = None) -> str:
    value = record.get(name, default)
    value = default if value is None else value
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise ValueError(f"holds {found} in {name!r} instead of text")
    return value


def parsed(value: object) -> object:
    """What a JSON text stands for, if it is an object or a list."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def instruction(form: Form, record: dict) -> Document:
    """Alpaca's records, and questions with their answers."""
    asked, answer = (text_in(record, name) for name in form.names)
    if form.names == QUESTION:
        record, prompt = {}, f"{asked}\n"
    else:
        prompt = alpaca(asked, text_in(record, "input", ""))
    more, system = (text_in(record, name, "") for name in ("input", "system"))
    history = [text for turn in parsed(record.get("history")) or [] for text in turn]
    if form.kind == "pair":
        if history:
            raise ValueError("holds a 'history', which only a chat template can write")
        return Pair(f"{system}\n\n{prompt}" if system else prompt, answer)
    turns = [*history, f"{asked}\n{more}" if more else asked]
    roles = ("user", "assistant")
    before = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return chat([{"role": "assistant", "content": answer}], record, before)


def alpaca(instruction: str, input_: str) -> str:
    """The prompt of Stanford's Alpaca, for models without a chat template."""
    task = "Below is an instruction that describes a task"
    if input_:
        task += ", paired with an input that provides further context"
        instruction += f"\n\n### Input:\n{input_}"
    return (
        f"{task}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def chat(messages: list[dict], record: dict, before: list[dict]) -> Chat | None:
    """A conversation; of the messages before, none is trained on."""
    every = [*before, *messages]
    if not isinstance(record.get("system", ""), str):
        raise ValueError("holds no text in 'system'")
    if record.get("system") and every[0].get("role") != "system":
        every.insert(0, {"role": "system", "content": record["system"]})
    trains = []
    for number, message in enumerate(every):
        is_ours = number >= len(every) - len(messages)
        weight = 1
        for name in WEIGHTS:
            given = message.pop(name, None)
            weight = weight if given is None else given
        if weight not in (0, 1):
            raise ValueError(f"gives a turn the weight {weight!r}, not 0 or 1")
        trains.append(is_ours and message["role"] == "assistant" and bool(weight))
    options = parsed(record.get("chat_template_kwargs")) or {}
    if not isinstance(options, dict):
        raise ValueError("holds no object in 'chat_template_kwargs'")
    return Chat(every, trains, tools_in(record), options)


def messages_in(record: dict, name: str) -> list[dict]:
    value = parsed(record.get(name)) or []
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise ValueError(f"holds no messages with role and content in {name!r}")
    return [message_of(message) for message in value]


def message_of(given: dict) -> dict:
    """A message as templates know it; those of ShareGPT have ``from`` and ``value``."""
    message = dict(given)
    if "role" not in message:
        if "from" not in message or "value" not in message:
            raise ValueError("holds a message without role and content")
        message["role"] = message.pop("from")
        message["content"] = message.pop("value")
    elif "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    role = message["role"]
    if not isinstance(role, str):
        raise ValueError(f"holds {type(role).__name__} as the role of a message")
    content, calls = message.get("content"), parsed(message.pop("tool_calls", None))
    if role == "function_call":
        content, role, calls = None, "assistant", parsed(content)
    if isinstance(content, list):
        content = list(map(part_of, content))
        thoughts = [part["text"] for part in content if part["type"] in THOUGHTS]
        if thoughts:
            message["reasoning_content"] = "\n".join(thoughts)
        calls = [p["text"] for p in content if p["type"] == "tool_call"] or calls
        content = [part for part in content if part["type"] == "text"] or None
    elif not isinstance(content, str | None):
        raise ValueError(f"holds {type(content).__name__} as content instead of text")
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = list(map(call_of, calls))
    message["role"] = ROLES.get(role, role)
    return without_nothing(message) | {"content": content}


def part_of(part: object) -> dict:
    """A part of a message's content: text, a thought, or the call of a tool as text."""
    part = part if isinstance(part, dict) else {"text": part}
    kind, text = part.get("type", "text"), part.get("text", part.get("value"))
    if kind not in ("text", "tool_call", *THOUGHTS) or not isinstance(text, str):
        raise ValueError(f"holds a part of type {kind!r}; only text is trained on")
    return {"type": kind, "text": text}


def call_of(call: object) -> dict:
    """A call of a tool: ``{"type": "function", "function": {name, arguments}}``."""
    call = parsed(call)
    if not isinstance(call, dict):
        raise ValueError(f"holds {call!r:.40} as the call of a tool")
    function = call.get("function", call)
    if not isinstance(function, dict) or "name" not in function:
        raise ValueError("holds the call of a tool without a name")
    function = without_nothing(function)
    function["arguments"] = parsed(function.get("arguments", {}))
    if "function" in call:
        return without_nothing(call) | {"function": function}
    return {"type": "function", "function": function}


def tools_in(record: dict) -> list[dict] | None:
    """The descriptions of tools, without keys that hold nothing."""
    tools = parsed(record.get("tools")) or []
    if not isinstance(tools, list):
        raise ValueError(f"holds {type(tools).__name__} in 'tools' instead of a list")
    found = []
    for tool in map(parsed, tools):
        if not isinstance(tool, dict):
            raise ValueError("holds a tool that is no object")
        is_whole = "function" in tool or "name" not in tool
        tool = tool if is_whole else {"type": "function", "function": tool}
        found.append(without_nothing(tool))
    return found or None


def without_nothing(value: object) -> object:
    """Without keys that have no value: in a table each object has the keys of all."""
    if isinstance(value, dict):
        return {k: without_nothing(v) for k, v in value.items() if v is not None}
    return [without_nothing(v) for v in value] if isinstance(value, list) else value
