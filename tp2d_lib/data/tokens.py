"""Tokens of a whole dataset: read, encoded, and written one after another."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from datetime import date
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data.chat import Template
from tp2d_lib.data.documents import THOUGHTS, Chat, Document, Form, document_of
from tp2d_lib.data.files import Dataset
from tp2d_lib.data.plain import DataError
from tp2d_lib.data.records import HEAD
from tp2d_lib.data.workers import encode_all, processes

HELD_OUT, TRAINED_ON = "held out", "trained on"  # the two sides of eval_fraction
UNWRITTEN = "thoughts that the template does not write"
EMPTY, UNTRAINED = "empty left out", "without a trained token left out"


class Reading(NamedTuple):
    """How a dataset is read."""

    dataset: Dataset
    forms: list[Form]  # of each part
    parses: bool  # whether special tokens in its texts are those tokens
    day: date | None = None  # that the template writes
    template: Template | None = None  # of conversations

    @property
    def is_masked(self) -> bool:
        return any(form.kind != "text" for form in self.forms)


class Tokens(NamedTuple):
    """The tokens of all documents, one after another.

    ``ids`` is (tokens,) int32; ``trained`` is (tokens,) bool, or None if all are;
    ``lengths`` is (documents,) int64. ``why`` counts what is left out, by the reason.
    """

    ids: np.ndarray
    trained: np.ndarray | None
    lengths: np.ndarray
    why: Counter


def tokenize(
    config: TrainConfig, tokenizer, reading: Reading, folder: Path, held_out: bool
) -> Tokens:
    """The tokens of a dataset, in two files of a folder.

    Raises:
        ConfigError: names the place of what cannot be read, or be encoded.
    """
    why, roles, lengths = Counter(), Counter(), array("q")
    documents = kept(config, reading, held_out, why, roles)
    given = (tokenizer, config.train_on, reading.parses, reading.day)
    masked = reading.is_masked
    count = processes(sum(part.size() for part in reading.dataset.parts))
    names = ("tokens.ids", "tokens.trained")
    with open(folder / names[0], "wb") as ids, open(folder / names[1], "wb") as trained:
        bar = tqdm(desc="tokenize", unit=" documents", disable=not sys.stderr.isatty())
        for found in encode_all(config, given, documents, count):
            some = [each for each in found if each.trained is None or any(each.trained)]
            why[UNTRAINED] += len(found) - len(some)
            lengths.extend(len(each.ids) for each in some)
            every = chain.from_iterable(each.ids for each in some)
            np.fromiter(every, np.int32).tofile(ids)
            for each in some if masked else ():
                all_of_it = np.ones(len(each.ids), bool)
                mask = all_of_it if each.trained is None else each.trained
                mask.tofile(trained)
            bar.update(len(found))
        bar.close()
    why = +why  # without what did not happen
    if not lengths and why[UNTRAINED]:
        raise no_turn(config, roles)
    if not lengths:
        return Tokens(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, int), why)
    ids = np.memmap(folder / names[0], np.int32, "r")
    trained = np.memmap(folder / names[1], bool, "r") if masked else None
    return Tokens(ids, trained, np.array(lengths), why)


def records(config: TrainConfig, reading: Reading) -> Iterator[tuple]:
    """Each record of a dataset with its form and its place, in words."""
    for part, form in zip(reading.dataset.parts, reading.forms, strict=True):
        try:
            for number, record in part.records(form.wanted):
                yield form, part.place(number), record
        except DataError as error:
            raise unreadable(config, error) from error


def unreadable(config: TrainConfig, error: object) -> ConfigError:
    return ConfigError(
        f"dataset_name={config.dataset_name!r} must hold readable data, but {error}; "
        "try a copy without it"
    )


def limit(config: TrainConfig, reading: Reading) -> int | None:
    """The number of documents that ``dataset_percentage`` leaves; None: all.

    Raises:
        ConfigError: it leaves none.
    """
    if config.dataset_percentage == 100:
        return None
    size = sum(1 for _ in records(config, reading))
    left = round(size * config.dataset_percentage / 100)
    if not left:
        raise ConfigError(
            f"dataset_percentage={config.dataset_percentage:g} must keep at least "
            f"one of the {size} documents of {config.dataset_name!r}; try 100"
        )
    return left


def kept(
    config: TrainConfig, reading: Reading, held_out: bool, why: Counter, roles: Counter
) -> Iterator[tuple[str, Document]]:
    """The documents to encode, each with its place.

    Counts the others in ``why``, by the reason, and messages in ``roles``.
    """
    faults, good = [], 0
    for form, place, record in islice(records(config, reading), limit(config, reading)):
        try:
            document = document_of(form, record)
            good += document is not None
        except ValueError as error:
            faults.append(f"{place} {error}")
        if faults and (good or len(faults) == HEAD):
            break
        if faults:
            continue  # is it the fault of all?
        if document is None:
            why[EMPTY] += 1
        elif config.eval_fraction and is_out(config, document) != held_out:
            why[TRAINED_ON if held_out else HELD_OUT] += 1
        else:
            for message in document.messages if isinstance(document, Chat) else ():
                roles[message["role"]] += 1
                has_thought = not {*THOUGHTS}.isdisjoint(message)
                why[UNWRITTEN] += has_thought and not reading.template.writes_thoughts
            yield place, document
    if faults and good:
        raise unreadable(config, faults[0])
    if faults:
        raise ConfigError(
            f"dataset_name={config.dataset_name!r} must hold documents to train on, "
            f"but none of the first {len(faults)} records can be used: {faults[0]}; "
            "try one of the forms that README.md shows"
        )


def is_out(config: TrainConfig, document: Document) -> bool:
    """Whether ``eval_fraction`` holds a document out.

    A hash of its content decides, so that it is the same in every run, and for copies.
    """
    content = json.dumps(document, sort_keys=True, default=str).encode()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") < config.eval_fraction * 2**64


def no_turn(config: TrainConfig, roles: Counter) -> ConfigError:
    found = ", ".join(map(repr, sorted(roles))) or "none"
    return ConfigError(
        f"dataset_name={config.dataset_name!r} must hold turns of 'assistant' to train "
        f"on, but the roles in it are {found}; try train_on='all', or name the role "
        "'assistant'"
    )
