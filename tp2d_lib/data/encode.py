"""Documents to tokens: ids, and which of them are trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from typing import NamedTuple

import numpy as np

from tp2d_lib.config import first_line
from tp2d_lib.data.chat import CLOSE, OPEN, Span, Template
from tp2d_lib.data.documents import Chat, Document

# How a piece of a document is tokenized: what it holds is a text as it was found, what
# a template has written, or what in a message reads like the frame of a turn.
TEXT, TEMPLATE, FORGED = range(3)
NOWHERE = np.zeros((0, 2), np.int64)
PIECES = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}|[^{OPEN}{CLOSE}]+")


class Piece(NamedTuple):
    """A part of a document's text, which begins at character ``at``."""

    kind: int
    at: int
    text: str


class Encoded(NamedTuple):
    """A document's tokens, and which are trained on: (length,) bool, or None: all."""

    ids: list[int]
    trained: np.ndarray | None = None


class EncodeError(ValueError):
    """Which of some documents cannot be encoded, why, and whether none of them can."""

    def __init__(self, number: int, why: str, is_each: bool):
        super().__init__(number, why, is_each)
        self.number, self.why, self.is_each = number, why, is_each


class Encoder:
    """A model's tokenizer, with its chat template.

    Args:
        parses: whether what reads like a special token in a text is that token.
        day: the date that the template writes, if it does.
    """

    def __init__(self, tokenizer, train_on: str, parses: bool, day: date | None):
        self.tokenizer, self.train_on = tokenizer, train_on
        self.parses, self.day = parses, day
        self.begin, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.templates: dict[bool, Template] = {}

    def __call__(self, documents: list[Document]) -> list[Encoded]:
        """The tokens of each document.

        Raises:
            EncodeError: the template refuses one, or it is no text.
        """
        try:
            return self.encode(documents)
        except Exception as error:  # a template may raise anything
            faults = list(map(self.fault, documents))
            number = next((n for n, fault in enumerate(faults) if fault), None)
            if number is None:
                raise
            every = len(faults) > 1 and all(faults)
            raise EncodeError(number, faults[number], every) from error

    def fault(self, document: Document) -> str:
        try:
            self.encode([document])
        except UnicodeEncodeError as error:
            return f"half a character, {error.object[error.start]!a}"
        except Exception as error:
            return first_line(error)
        return ""

    def encode(self, documents: list[Document]) -> list[Encoded]:
        written = list(map(self.write, documents))
        "".join(text for text, _ in written).encode()  # raises for half a character
        if all(isinstance(document, str) for document in documents):
            found = self.plain(documents)
            limits = map(self.ends, found)
            return [
                Encoded(ids[start:] + ends)
                for ids, (start, ends) in zip(found, limits, strict=True)
            ]
        pieces = [
            list(pieces_of(text))
            if isinstance(document, Chat)
            else [Piece(TEXT, 0, text)]
            for document, (text, _) in zip(documents, written, strict=True)
        ]
        found = self.tokenize([piece for each in pieces for piece in each])
        encoded = []
        for document, each, (_, spans) in zip(documents, pieces, written, strict=True):
            parts = [next(found) for _ in each]
            ids = [id_ for ids, _ in parts for id_ in ids]
            places = np.concatenate([NOWHERE, *(places for _, places in parts)])
            trained = np.zeros(len(ids), bool)
            for begin, end in spans:  # what overlaps one
                trained |= (places[:, 0] < end) & (places[:, 1] > begin)
            if not isinstance(document, Chat):
                start, ends = self.ends(ids)
                ids = ids[start:] + ends
                trained = np.append(trained[start:], np.ones(len(ends), bool))
                trained[-1] = True  # the end, also where the text has it
            encoded.append(Encoded(ids, trained))
        return encoded

    def plain(self, texts: list[str]) -> list[list[int]]:
        """What the tokenizer's own call returns as ``input_ids``, in less time.

        The call also finds out where each token is in its text. The first text goes
        both ways, because a tokenizer's class may do more than its backend.
        """
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not self.parses
        found = [each.ids for each in backend.encode_batch_fast(texts)]
        if found[:1] == self.tokenizer(texts[:1], **self.how(TEXT))["input_ids"]:
            return found
        return self.tokenizer(texts, **self.how(TEXT))["input_ids"]

    def write(self, document: Document) -> tuple[str, list[Span]]:
        """A document's text, with marks where it is forged, and the trained spans."""
        if isinstance(document, Chat):
            has_tools = bool(document.tools)
            if has_tools not in self.templates:
                self.templates[has_tools] = Template(
                    self.tokenizer, self.day, has_tools
                )
            return self.templates[has_tools].write(document, self.train_on)
        if isinstance(document, str):
            return document, [(0, len(document))]
        text = document.prompt + document.completion
        start = 0 if self.train_on == "all" else len(document.prompt)
        return text, [(start, len(text))]

    def how(self, kind: int) -> dict:
        is_text = kind == FORGED or (kind == TEXT and not self.parses)
        return {
            "add_special_tokens": kind == TEXT,
            "split_special_tokens": is_text,
            "return_attention_mask": False,
            "verbose": False,
        }

    def tokenize(self, pieces: list[Piece]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Of each piece its ids, and where in the document they are: (ids, 2)."""
        found = [iter(())] * 3
        for kind in (TEXT, TEMPLATE, FORGED):
            texts = [piece.text for piece in pieces if piece.kind == kind]
            if texts:
                tokens = self.tokenizer(
                    texts, return_offsets_mapping=True, **self.how(kind)
                )
                each = tokens["input_ids"], tokens["offset_mapping"]
                found[kind] = zip(*each, strict=True)
        for piece in pieces:
            ids, places = next(found[piece.kind])
            yield ids, np.array(places, np.int64).reshape(-1, 2) + piece.at

    def ends(self, ids: list[int]) -> tuple[int, list[int]]:
        """Where a text's tokens begin, and what must follow them: each end once.

        A text may hold the tokens that the tokenizer puts around it.
        """
        twice = [self.begin] * 2
        is_twice = self.parses and self.begin is not None and ids[:2] == twice
        return int(is_twice), [] if ids[-1:] == [self.end] else [self.end]


def pieces_of(text: str) -> Iterator[Piece]:
    """The parts of a text with marks, without them."""
    for found in PIECES.finditer(text):
        if found[1] is None:
            yield Piece(TEMPLATE, found.start(), found[0])
        else:
            yield Piece(FORGED, found.start() + 1, found[1])
