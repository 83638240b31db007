"""Conversations: their tokens, by the tokenizer's template, and which are trained on.

Messages are text: what reads like a special token in one of them does not become it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tp2d_lib.config import ConfigError, TrainConfig, first_line

OPEN, CLOSE = "\ue0f0", "\ue0f1"  # of private use: around what is text nonetheless
Spans = list[tuple[int, int]]  # from, to: characters


def encode(
    config: TrainConfig,
    tokenizer,
    documents: list[tuple],
    tools: list,
    numbers: list[int],
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of conversations, or of prompts with completions, and their masks.

    Args:
        documents: of each, its messages; or a prompt and a completion, two texts or two
            lists of messages.
        numbers: of the documents in the dataset, for messages.

    Returns:
        For each, its ids, and for every id whether it is trained on.

    Raises:
        ConfigError: there is no template, or a document that it cannot be used for.
    """
    special = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)")
    rendered = []
    for document, own_tools, number in zip(documents, tools, numbers, strict=True):
        try:
            document = [mark(part, special) for part in document]
            if isinstance(document[0], str):
                rendered.append(render_pair(tokenizer, config.train_on, *document))
            else:
                rendered.append(
                    render_chat(tokenizer, config.train_on, document, own_tools or None)
                )
        except Exception as error:  # a template may raise anything
            raise ConfigError(
                f"dataset_name={config.dataset_name!r} must hold conversations that "
                f"the chat template of {config.model_name!r} can write, but not "
                f"document {number + 1} ({first_line(error)}); try a copy without it"
            ) from error
    return [
        encode_marked(tokenizer, text, spans, whole) for text, spans, whole in rendered
    ]


def check_template(config: TrainConfig, tokenizer) -> None:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model_name={config.model_name!r} must have a chat template, because the "
            f"documents of {config.dataset_name!r} are messages; try the instruction-"
            "tuned model, or put its chat_template.jinja into the folder"
        )


def special_tokens(tokenizer) -> list[str]:
    """Longest first: one may begin another."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted((t.content for t in added if t.special), key=len, reverse=True)


def mark(value, special: re.Pattern):
    """The same texts, with marks around what reads like a special token.

    Keys without a value are dropped: in a table each message has the keys of all, and
    templates ask whether a key is there.
    """
    if isinstance(value, str):
        value = re.sub(f"[{OPEN}{CLOSE}]", "", value)
        return special.sub(rf"{OPEN}\g<0>{CLOSE}", value)
    if isinstance(value, dict):
        return {k: mark(v, special) for k, v in value.items() if v is not None}
    return [mark(v, special) for v in value] if isinstance(value, list) else value


def render_pair(tokenizer, train_on: str, prompt: str, completion: str):
    """A prompt and its completion, the trained part, which the end token follows."""
    text = prompt + completion
    start = 0 if train_on == "all" else len(prompt)
    return text, [(start, len(text))], True


def render_chat(tokenizer, train_on: str, parts: list, tools: list | None):
    """What the template writes, and the spans of it to train on.

    Of a prompt and a completion, the messages of the latter are trained on.
    """
    messages = [message for part in parts for message in part]
    first = len(parts[0]) if len(parts) == 2 else 0
    template = tokenizer.get_chat_template(None, tools)
    if train_on == "all":
        text = render(tokenizer, messages, tools)
        return text, [(0, len(text))], False
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        text, spans = render_with_marks(tokenizer, template, messages, tools)
        before = render(tokenizer, messages[:first], tools) if first else ""
        spans = [span for span in spans if span[0] >= len(before)]
    else:
        text = render(tokenizer, messages, tools)
        wanted = [
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and number >= first
        ]
        wanted = wanted[-1:] if train_on == "last" else wanted
        spans = [span_of(tokenizer, text, messages, n, tools) for n in wanted]
    return text, spans[-1:] if train_on == "last" else spans, False


def render(tokenizer, messages: list, tools: list | None, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt
    )


def render_with_marks(tokenizer, template: str, messages: list, tools: list | None):
    """By a template that says itself what the assistant generates."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (spans,) = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text, spans


def span_of(
    tokenizer, text: str, messages: list, number: int, tools
) -> tuple[int, int]:
    """Where a turn of the assistant is in the text: what a model would generate there.

    It begins where the prompt for it ends, and it ends as it does when the conversation
    ends with it, without what the template writes only in one of the two cases, such
    as the thoughts of earlier turns, and without trailing white space.
    """
    prompt = render(tokenizer, messages[:number], tools, prompt=True)
    alone = render(tokenizer, messages[: number + 1], tools)
    rest = text.removeprefix(prompt)
    if len(rest) + len(prompt) != len(text) or not alone.startswith(prompt):
        raise ValueError(
            "it writes a turn in another way once others follow; try train_on='last'"
        )
    alone = alone.removeprefix(prompt)
    same = next(
        size
        for size in range(min(len(alone), len(rest)), -1, -1)
        if alone.endswith(rest[:size])
    )
    turn = rest[:same].rstrip()
    content = messages[number].get("content")
    if isinstance(content, str) and content.strip() not in alone:
        content = None  # the template changes it
    if not turn or (content and content.strip().splitlines()[-1] not in turn):
        raise ValueError(
            "it writes a turn in another way once others follow; try train_on='last'"
        )
    return len(prompt), len(prompt) + len(turn)


def encode_marked(tokenizer, text: str, spans: Spans, is_plain: bool):
    """Ids of a text with marks, and which of them lie in one of the spans.

    Args:
        is_plain: whether no template has written the tokens for begin and end.
    """
    ids, trained = [], []
    for number, (piece, start, is_text) in enumerate(pieces_of(text)):
        found = tokenizer(
            piece,
            add_special_tokens=is_plain and number == 0,
            split_special_tokens=is_text or is_plain,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids += found["input_ids"]
        trained += [
            any(start + a < end and start + b > begin for begin, end in spans)
            for a, b in found["offset_mapping"]
        ]
    if is_plain:
        ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
    return ids, trained


def pieces_of(text: str) -> Iterator[tuple[str, int, bool]]:
    """The parts of a text with marks, where each begins, and whether it is marked."""
    for found in re.finditer(f"{OPEN}([^{CLOSE}]*){CLOSE}|[^{OPEN}{CLOSE}]+", text):
        is_text = found[1] is not None
        yield found[found.lastindex or 0], found.start() + is_text, is_text
