"""Tokens: one list of ids for each document, and which of them are trained on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

from tp2d_lib.config import TrainConfig
from tp2d_lib.data import chat
from tp2d_lib.data.documents import Columns, find_columns, load_documents, unreadable
from tp2d_lib.data.sources import Source

HELD_OUT, TRAINED_ON = "held out", "trained on"  # the two sides of eval_fraction
FEW = 2000  # documents for which starting a process takes longer than it saves


def tokenize(
    config: TrainConfig, tokenizer, source: Source, tokens_file: Path, held_out: bool
):
    """Token ids, one row for each document of the dataset, also for those left out.

    Returns:
        A ``datasets.Dataset`` with ``input_ids``, ``length``, ``left_out`` (why, or
        empty) and, where not all are trained on, ``trained``, a bool for each token.
    """
    from datasets import (  # here: slow, workers do not need it
        Features,
        List,
        Value,
        concatenate_datasets,
        enable_progress_bars,
    )

    found = load_documents(config, source)
    columns = [find_columns(config, documents, source) for documents in found]
    masked = any(each.kind != "text" for each in columns)
    if sys.stderr.isatty():  # the one bar worth a line, and not in a file
        enable_progress_bars()
    kinds = {"input_ids": List(Value("int32")), "length": Value("int64")}
    kinds |= {"left_out": Value("string")}
    kinds |= {"trained": List(Value("bool"))} if masked else {}
    tokens = []
    for number, (documents, each) in enumerate(zip(found, columns, strict=True)):
        extra = ["tools"] * (each.kind != "text" and "tools" in documents.column_names)
        kept = documents.select_columns([*each.names, *extra])
        try:
            tokens.append(
                kept.map(
                    partial(encode, config, tokenizer, each, masked, held_out),
                    batched=True,
                    with_indices=True,
                    remove_columns=kept.column_names,
                    features=Features(kinds),
                    num_proc=processes(config, len(kept)),
                    load_from_cache_file=False,  # our own fingerprint decides
                    cache_file_name=str(tokens_file.with_stem(f"tokens-{number}")),
                    desc="tokenise",
                )
            )
        except UnicodeDecodeError as error:  # a text is not looked at before
            raise unreadable(config, source, error) from error
    return concatenate_datasets(tokens)


def processes(config: TrainConfig, documents: int) -> int | None:
    cores = os.cpu_count() or 1
    wanted = config.preprocessing_num_workers or min(cores, documents // FEW)
    workers = min(wanted, cores)
    return workers if workers > 1 else None


def encode(
    config: TrainConfig,
    tokenizer,
    columns: Columns,
    masked: bool,
    held_out: bool,
    batch: dict[str, list],
    numbers: list[int],
) -> dict[str, list]:
    """The tokens of some documents, as ``Dataset.map`` asks for them."""
    documents = list(zip(*(batch[name] for name in columns.names), strict=True))
    reasons = [why_left_out(config, each, held_out) for each in documents]
    kept = [number for number, reason in enumerate(reasons) if not reason]
    chosen = [documents[number] for number in kept]
    if columns.kind == "text":
        pairs = encode_texts(tokenizer, [text for (text,) in chosen])
    else:
        all_tools = batch.get("tools", [None] * len(documents))
        tools, numbers = ([each[n] for n in kept] for each in (all_tools, numbers))
        pairs = chat.encode(config, tokenizer, chosen, tools, numbers)
    ids, trained = ([[] for _ in documents] for _ in range(2))
    for number, (tokens, mask) in zip(kept, pairs, strict=True):
        if any(mask):
            ids[number], trained[number] = tokens, mask
        else:
            reasons[number] = "without a trained token left out"
    out = {"input_ids": ids, "length": list(map(len, ids)), "left_out": reasons}
    return out | {"trained": trained} if masked else out


def encode_texts(tokenizer, texts: list[str]) -> list[tuple[list[int], list[bool]]]:
    """A text that reads like a special token stays text; the end token comes last."""
    if not texts:
        return []
    found = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
    return [([*ids, tokenizer.eos_token_id], [True] * (len(ids) + 1)) for ids in found]


def why_left_out(config: TrainConfig, document: tuple, held_out: bool) -> str:
    """Why a document is none of these rows; empty if it is one of them.

    With ``eval_fraction``, a hash of its content decides on which side it is, so that
    it stays there in every run, and copies of it, too.
    """
    last = document[-1]  # of a pair, the completion
    blank = not (last.strip() if isinstance(last, str) else last)
    if blank or None in document:
        return "empty left out"
    if config.eval_fraction:
        content = json.dumps(document, sort_keys=True, default=str).encode()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        is_out = int.from_bytes(digest) < config.eval_fraction * 2**64
        if is_out != held_out:
            return HELD_OUT if is_out else TRAINED_ON
    return ""
