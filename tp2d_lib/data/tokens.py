"""Tokens of a whole dataset: read, encoded, and written one after another."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data.chat import Template
from tp2d_lib.data.documents import THOUGHTS, Chat, Document, Form, document_of
from tp2d_lib.data.encode import Encoded, EncodeError, Encoder
from tp2d_lib.data.files import Dataset
from tp2d_lib.data.records import DataError

HELD_OUT, TRAINED_ON = "held out", "trained on"  # the two sides of eval_fraction
UNWRITTEN = "thoughts that the template does not write"
EMPTY, UNTRAINED = "empty left out", "without a trained token left out"
CHUNK = 500  # documents that are encoded together
MANY = 32 << 20  # bytes of conversations for which another process is worth its start


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
    masked = reading.is_masked
    names = ("tokens.ids", "tokens.trained")
    with open(folder / names[0], "wb") as ids, open(folder / names[1], "wb") as trained:
        bar = tqdm(desc="tokenise", unit=" documents", disable=not sys.stderr.isatty())
        for places, found in encoded(config, tokenizer, reading, documents):
            some = [each for each in found if each.trained is None or any(each.trained)]
            why[UNTRAINED] += len(found) - len(some)
            lengths.extend(len(each.ids) for each in some)
            every = chain.from_iterable(each.ids for each in some)
            np.fromiter(every, np.int32).tofile(ids)
            for each in some if masked else ():
                all_of_it = np.ones(len(each.ids), bool)
                mask = all_of_it if each.trained is None else each.trained
                mask.tofile(trained)
            bar.update(len(places))
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
        if faults and (good or len(faults) == CHUNK):
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


def encoded(
    config: TrainConfig,
    tokenizer,
    reading: Reading,
    documents: Iterator,
) -> Iterator[tuple[list[str], list[Encoded]]]:
    """The documents of some places and their tokens, in order."""
    given = (tokenizer, config.train_on, reading.parses, reading.day)
    waiting: deque = deque()
    with Workers(processes(config, reading), given) as workers:
        for chunk in chunks(documents):
            places, some = zip(*chunk, strict=True)
            waiting.append((places, workers.submit(list(some))))
            while len(waiting) > 2 * workers.count:
                yield result(config, *waiting.popleft())
        while waiting:
            yield result(config, *waiting.popleft())


def chunks(documents: Iterator) -> Iterator[list]:
    while chunk := list(islice(documents, CHUNK)):
        yield chunk


def result(config: TrainConfig, places, future) -> tuple[list[str], list[Encoded]]:
    try:
        return places, future()
    except EncodeError as error:
        where = places[error.number]
        advice = "a copy without it"
        if error.is_each:
            where = f"any of the {len(places)} documents from {where} on"
            advice = "another model's tokenizer and chat template"
        raise ConfigError(
            f"dataset_name={config.dataset_name!r} must hold documents that the "
            f"tokenizer and the chat template of {config.model_name!r} can write, but "
            f"not {where} ({error.why}); try {advice}"
        ) from error


class Workers:
    """Encoders in processes of their own, or one in this process.

    They are started, not forked: Ray's threads may run in this one.
    """

    def __init__(self, count: int, given: tuple):
        self.count, self.encoder, self.pool = count, None, None
        if count < 2:
            self.encoder = Encoder(*given)
        else:
            import loky  # here: most runs do without

            self.pool = loky.ProcessPoolExecutor(
                count,
                initializer=start,
                initargs=given,
                env={"TOKENIZERS_PARALLELISM": "false"},
            )

    def submit(self, documents: list[Document]) -> Callable[[], list[Encoded]]:
        if self.pool:
            return self.pool.submit(encode, documents).result
        return partial(self.encoder, documents)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        if self.pool:
            self.pool.shutdown(kill_workers=True)


def start(*given) -> None:
    """In a process of its own: keep an encoder for what comes."""
    global encoder
    encoder = Encoder(*given)


def encode(documents: list[Document]) -> list[Encoded]:
    return encoder(documents)


def processes(config: TrainConfig, reading: Reading) -> int:
    """As many as the cores that this process may use, where conversations are many.

    Texts are encoded by threads of the tokenizer's own.
    """
    wanted = config.preprocessing_num_workers or 1
    if reading.is_masked and not config.preprocessing_num_workers:
        wanted += sum(part.size() for part in reading.dataset.parts) // MANY
    if wanted == 1:
        return 1
    import loky  # here: most runs do without

    return min(wanted, loky.cpu_count())


def no_turn(config: TrainConfig, roles: Counter) -> ConfigError:
    found = ", ".join(map(repr, sorted(roles))) or "none"
    return ConfigError(
        f"dataset_name={config.dataset_name!r} must hold turns of 'assistant' to train "
        f"on, but the roles in it are {found}; try train_on='all', or name the role "
        "'assistant'"
    )
