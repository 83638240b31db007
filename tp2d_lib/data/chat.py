"""Conversations: their text, by the tokenizer's template, and what is trained on.

What frames the turns in a template cannot be forged: in a message it stays text. Other
special tokens, such as those around a thought, are what the tokenizer makes of them.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import date

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data.documents import Chat

# No characters, by Unicode: around what stays text, and in place of a turn's words.
OPEN, CLOSE, HERE = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]  # from, to: characters
CODES = "aAbBcdejmpuwUWVxyYGDFh"  # of strftime, for a day
# A template's macro hides the function of this name, which writes today's date.
DATED = (
    "{% macro strftime_now(format) %}{% set day = namespace(text=format) %}"
    "{% for code, value in date_codes.items() %}"
    "{% set day.text = day.text | replace(code, value) %}{% endfor %}"
    "{{ day.text }}{% endmacro %}{{ '' }}"
)
SPEAKS = {"role": "assistant", "content": HERE}
ASKS = {"role": "user", "content": "Q"}


def check_template(config: TrainConfig, tokenizer) -> None:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model_name={config.model_name!r} must have a chat template, because the "
            f"documents of {config.dataset_name!r} are messages; try the instruction-"
            "tuned model, or put its chat_template.jinja into the folder"
        )


def writes_date(tokenizer) -> bool:
    return "strftime_now" in str(tokenizer.chat_template)


class Template:
    """A tokenizer's chat template, and what it does with each form of a message.

    Args:
        day: the date that it writes, if it writes one.
        has_tools: whether tools are described; some tokenizers have a template for it.
    """

    def __init__(self, tokenizer, day: date, has_tools: bool):
        self.tokenizer, self.options = tokenizer, {}
        self.special = {*special_tokens(tokenizer)}
        self.source = tokenizer.get_chat_template(None, [{}] if has_tools else None)
        self.has_marks = bool(MARKS.search(self.source))
        if "strftime_now" in self.source:
            self.source = DATED + self.source
            codes = [f"%-{code}" for code in "dmj"] + [f"%{code}" for code in CODES]
            self.options = {"date_codes": {code: day.strftime(code) for code in codes}}
        self.takes_text = self.takes_parts = True  # each form, as it is given
        self.takes_null = self.takes_objects = True
        self.takes_text = HERE in self.tried([ASKS | {"content": HERE}])
        in_parts = self.tried([ASKS | {"content": [{"type": "text", "text": HERE}]}])
        self.takes_parts = HERE in in_parts and "'text'" not in in_parts
        self.headers, self.ends, frame = self.of_turns()
        fixed = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
        frame |= {*filter(None, fixed)}
        longest = sorted(map(re.escape, frame), key=len, reverse=True)
        self.frame = re.compile("|".join(longest) or "(?!)")
        self.takes_objects, self.takes_null = self.of_calls()
        thinks = {"role": "assistant", "content": "A", "reasoning_content": HERE}
        self.writes_thoughts = HERE in self.tried([ASKS, thinks])

    def tried(self, messages: list[dict], prompt: bool = False) -> str:
        """What comes of some messages; nothing where they are refused."""
        with suppress(Exception):  # a template may raise anything
            return self.render(list(map(self.form, messages)), prompt=prompt)
        return ""

    def of_turns(self) -> tuple[set[str], list[str], set[str]]:
        """What is written before and after turns, and the tokens of both.

        Before a turn stands what a prompt for it ends with, which may be other for the
        last one; after it, what ends a turn between others, or else the last one.
        """
        asked, prompt = self.tried([ASKS]), self.tried([ASKS], prompt=True)
        begin, _, last = self.tried([ASKS, SPEAKS]).partition(HERE)
        between, _, inside = self.tried([ASKS, SPEAKS, ASKS]).partition(HERE)
        headers = {header_of(start, asked, prompt) for start in (begin, between)}
        added = {t.content for t in self.tokenizer.added_tokens_decoder.values()}
        added = set(filter(str.strip, added))  # Gemma's has runs of newlines
        # Another turn begins as one of the assistant does, or where both ends differ.
        firsts = {t for t in added for h in headers if h.startswith(t)}
        size = common(last, inside)
        tokens = (m.span() for t in added for m in re.finditer(re.escape(t), inside))
        size = min([size, *(a for a, b in tokens if a < size < b)])  # no part of one
        size = min((inside.index(t) for t in firsts if t in inside), default=size)
        end = inside[:size]
        around = "".join([asked, end, last])
        written = around + "".join(headers)
        frame = {t for t in self.special if t in written or not begin}
        # Others may be what a prompt opens a thought with, such as <think>.
        frame |= {t for t in added if t in around or t in firsts}
        ends = [each for each in (end.rstrip(), last.rstrip()) if each]
        return headers, ends, frame

    def of_calls(self) -> tuple[bool, bool]:
        """Whether arguments may be objects, and whether content may be null."""
        function = {"name": "f", "arguments": {"key": HERE}}
        called = {"tool_calls": [{"type": "function", "function": function}]}
        empty = self.tried([ASKS, SPEAKS | {"content": ""} | called])
        null = self.tried([ASKS, SPEAKS | {"content": None} | called])
        takes_objects = HERE in empty and "{'key'" not in empty
        return takes_objects, bool(null) and "None" not in null

    def render(
        self, messages: list, tools: list | None = None, prompt=False, **options
    ) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=prompt,
            **self.options,
            **options,
        )

    def form(self, message: dict) -> dict:
        """A message in the form that this template takes."""
        content = message["content"]
        if content is None:
            content = None if self.takes_null else ""
        if isinstance(content, list) and not self.takes_parts:
            content = "".join(part["text"] for part in content)
        elif isinstance(content, str) and not self.takes_text and self.takes_parts:
            content = [{"type": "text", "text": content}]
        message = message | {"content": content}
        if "tool_calls" in message and not self.takes_objects:
            message["tool_calls"] = [as_text(call) for call in message["tool_calls"]]
        return message

    def write(self, chat: Chat, train_on: str) -> tuple[str, list[Span]]:
        """A conversation's text, and the spans of it to train on.

        Raises:
            ValueError: a turn cannot be found in it; or what the template raises.
        """
        messages = [self.mark(self.form(message)) for message in chat.messages]
        tools, options = self.mark(chat.tools), chat.options or {}
        if train_on == "all":
            text = self.render(messages, tools, **options)
            return text, [(0, len(text))]
        turns = [n for n, trains in enumerate(chat.trains) if trains]
        turns = turns[-1:] if train_on == "last" else turns
        if self.has_marks:
            text, spans = self.render_with_marks(messages, tools, options)
            said = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
            if len(said) != len(spans):
                raise ValueError(
                    f"it marks {len(spans)} of {len(said)} turns of the assistant; "
                    "try train_on='all'"
                )
            return text, [
                span for n, span in zip(said, spans, strict=True) if n in turns
            ]
        text = self.render(messages, tools, **options)
        return text, [self.span(text, messages, n, tools, options) for n in turns]

    def render_with_marks(self, messages: list, tools, options: dict):
        """By a template that says itself what the assistant generates."""
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), (spans,) = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
            **self.options,
            **options,
        )
        return text, spans

    def span(self, text: str, messages: list, number: int, tools, options) -> Span:
        """Where a turn of the assistant is: what a model would generate there.

        The conversation is written once more with other words in its place: what both
        texts begin and end with is not the turn's own. The turn begins behind what the
        template writes before any turn, and ends with what it writes after it.
        """
        other = [*messages[:number], self.form(SPEAKS), *messages[number + 1 :]]
        other = self.render(other, tools, **options)
        before, found, after = other.partition(HERE)
        end = next((end for end in self.ends if after.startswith(end)), "")
        after = after.removeprefix(end)
        starts = [len(before.rstrip())] * ("" in self.headers)
        for header in self.headers:
            if header and header in before:
                starts.append(before.rfind(header) + len(header))
        start = max((n for n in starts if text.startswith(before[:n])), default=None)
        size = len(text) - len(after)
        is_whole = found and HERE not in after and text.endswith(after)
        if not is_whole or start is None or start > size:
            raise ValueError(
                "it writes a turn of the assistant in another way where it has other "
                "words; try train_on='all', or a template with {% generation %}"
            )
        return start, len(text[:size].rstrip())

    def as_text(self, found: re.Match) -> str:
        """A token with marks; in two parts, where no setting splits it."""
        token = found[0]
        parts = [token] if token in self.special else [token[0], token[1:]]
        return "".join(f"{OPEN}{part}{CLOSE}" for part in parts)

    def mark(self, value):
        """The same values, with marks around what reads like a frame of turns."""
        if isinstance(value, str):
            value = re.sub(f"[{OPEN}{CLOSE}]", "", value)
            return self.frame.sub(self.as_text, value)
        if isinstance(value, dict):
            return {key: self.mark(each) for key, each in value.items()}
        return [self.mark(v) for v in value] if isinstance(value, list) else value


def header_of(start: str, asked: str, prompt: str) -> str:
    """What is written between a question and an answer, as far as prompts have it.

    Args:
        start: all that is written before the answer.
        asked: the question alone.
        prompt: the question with the beginning of an answer.
    """
    header = start[common(start, asked) : common(start, prompt)]
    if start.startswith(prompt):
        return header
    return header[: header.rfind("\n") + 1]  # a prompt may open a thought


def common(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def as_text(call: dict) -> dict:
    """A call whose arguments are JSON text."""
    function = dict(call["function"])
    if not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": function}


def special_tokens(tokenizer) -> list[str]:
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
