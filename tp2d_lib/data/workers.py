"""Encoding documents in order: in this process, or in several where there are many."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data.documents import Document, size_of
from tp2d_lib.data.encode import Encoded, EncodeError, Encoder

CHUNK, SIZE = 500, 1 << 22  # documents, and their characters, that are encoded together
MANY = 16 << 20  # bytes for which another process is worth its start


def encode_all(
    config: TrainConfig, given: tuple, documents: Iterator, count: int
) -> Iterator[list[Encoded]]:
    """The tokens of documents, some at a time, in their order.

    Args:
        given: what an Encoder is made of.
        documents: each with its place, in words.
        count: of processes that encode.

    Raises:
        ConfigError: names the place of what cannot be encoded.
    """
    waiting: deque = deque()
    with workers(given, count) as submit:
        for chunk in chunks(documents):
            places, some = zip(*chunk, strict=True)
            waiting.append((places, submit(list(some))))
            while len(waiting) > 2 * count:
                yield result(config, *waiting.popleft())
        while waiting:
            yield result(config, *waiting.popleft())


def chunks(documents: Iterator[tuple[str, Document]]) -> Iterator[list]:
    """Documents in groups of bounded size, so that long ones take no more memory."""
    chunk, size = [], 0
    for place, document in documents:
        chunk.append((place, document))
        size += size_of(document)
        if len(chunk) == CHUNK or size > SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextmanager
def workers(given: tuple, count: int):
    """``submit(documents)``, which returns a function that returns their tokens.

    Processes are started, not forked: Ray's threads may run in this one.
    """
    if count < 2:
        yield partial(partial, Encoder(*given))
        return
    import loky  # here: most runs do without

    environment = {"TOKENIZERS_PARALLELISM": "false"}
    pool = loky.ProcessPoolExecutor(
        count, initializer=start, initargs=given, env=environment
    )
    try:
        yield lambda documents: pool.submit(encode, documents).result
    finally:
        pool.shutdown(kill_workers=True)


def start(*given) -> None:
    """In a process of its own: keep an encoder for what comes."""
    global encoder
    encoder = Encoder(*given)


def encode(documents: list[Document]) -> list[Encoded]:
    return encoder(documents)


def processes(size: int) -> int:
    """At most as many as the cores that this process may use, and one for little.

    Args:
        size: bytes of the dataset's files.
    """
    if size < MANY:
        return 1
    import loky  # here: most runs do without

    return min(1 + size // MANY, loky.cpu_count())


def result(config: TrainConfig, places: tuple[str, ...], future) -> list[Encoded]:
    try:
        return future()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"dataset_name={config.dataset_name!r} must leave each process memory to "
            "tokenize, but one has died; try fewer cores, with taskset --cpu-list 0"
        ) from error
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
