"""Documents: from a dataset's rows to one list of token ids each."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from tp2d_lib.config import ConfigError, TrainConfig, closest, first_line
from tp2d_lib.data import chat
from tp2d_lib.data.sources import Source, fault

PAIR = ["prompt", "completion"]
KNOWN = (["messages"], ["conversations"], PAIR, ["text"])  # in this order
HELD_OUT, TRAINED_ON = "held out", "trained on"  # the two sides of eval_fraction
FEW = 2000  # documents for which starting a process takes longer than it saves


class Columns(NamedTuple):
    """Where a document is: in one column, or in two."""

    names: list[str]
    kind: str  # text, chat: a list of messages, or pair: a prompt and its completion


def load_tokenizer(config: TrainConfig):
    """The model's tokenizer.

    Raises:
        ConfigError: there is no tokenizer, it cannot be read, or has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.model_name, revision=config.model_revision, trust_remote_code=False
        )
        if not tokenizer("word")["input_ids"]:
            raise ValueError("there are none")
    except Exception as error:  # tokenizers raises nothing more specific
        raise ConfigError(
            f"model_name={config.model_name!r} must hold its tokenizer's files, such "
            f"as tokenizer.json ({first_line(error)}); write them there with the "
            "tokenizer's save_pretrained"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model_name={config.model_name!r} must have a tokenizer with an end "
            "token; set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def load_documents(config: TrainConfig, source: Source) -> list:
    """The documents to use: the first ``dataset_percentage`` percent of the split.

    Returns:
        A ``datasets.Dataset`` for each format of the source's files.

    Raises:
        ConfigError: a file cannot be read, the split does not exist or is too small.
    """
    from datasets import ReadInstruction  # here: slow, workers do not need it

    for builder in source.builders:
        try:
            builder.download_and_prepare()
        except Exception as error:  # each format is read by another library
            raise unreadable(config, source, error) from error
    split = config.dataset_split
    sizes = [
        builder.info.splits[split].num_examples if split in builder.info.splits else 0
        for builder in source.builders
    ]
    known = sorted({name for b in source.builders for name in b.info.splits})
    if split not in known:
        raise ConfigError(
            f"dataset_split={split!r} must be a split of {config.dataset_name!r}, "
            f"which has {', '.join(known)}; try {closest(split, known)!r}"
        )
    left = round(sum(sizes) * config.dataset_percentage / 100)
    if left == 0:
        raise ConfigError(
            f"dataset_percentage={config.dataset_percentage:g} must keep at least "
            f"one of the {sum(sizes)} documents of {config.dataset_name!r}; try 100"
        )
    documents = []
    for builder, size in zip(source.builders, sizes, strict=True):
        if kept := min(size, left):
            part = ReadInstruction(split, to=kept, unit="abs")
            documents.append(builder.as_dataset(split=part))
            left -= kept
    return documents


def unreadable(config: TrainConfig, source: Source, error: Exception) -> ConfigError:
    why = fault(source.files, None) or first_line(error.__cause__ or error)
    return ConfigError(
        f"dataset_name={config.dataset_name!r} must hold readable data ({why}); try a "
        "copy without it, or 'Salesforce/wikitext'"
    )


def find_columns(config: TrainConfig, documents, source: Source) -> Columns:
    """The columns that hold the documents: the one that is named, or a known one.

    Raises:
        ConfigError: there is no such column, or it holds something else.
    """
    given, has = config.text_column, documents.column_names
    names = [given] if given else next((n for n in KNOWN if {*n} <= {*has}), None)
    texts = [n for n, f in documents.features.items() if "string" in dtype(f)]
    where = f"{config.dataset_name!r}, which has {', '.join(has)}"
    if names is None:
        raise ConfigError(
            f"text_column must be given for {where}; try "
            f"{closest('text', texts or has)!r}"
        )
    if not {*names} <= {*has}:
        raise ConfigError(
            f"text_column={given!r} must be a column of {where}; "
            f"try {closest(given, has)!r}"
        )
    kinds = [kind_of(documents, name) for name in names]
    if kinds == ["text"] or kinds == ["chat"]:
        return Columns(names, kinds[0])
    if kinds in (["text", "text"], ["chat", "chat"]):
        return Columns(names, "pair")
    others = [text for text in texts if text not in names]
    why = fault(source.files, names[0]) if len(names) == 1 else None
    raise ConfigError(
        f"text_column={', '.join(names)!r} must hold text, or messages with role and "
        f"content, not {' and '.join(kinds)}{f' ({why})' if why else ''}; "
        f"try {', '.join(map(repr, others)) or 'another dataset'}"
    )


def dtype(feature) -> str:
    return getattr(feature, "dtype", type(feature).__name__.lower())


def kind_of(documents, name: str) -> str:
    """text, chat, or what else a column holds."""
    kind = dtype(documents.features[name])
    if kind in ("string", "large_string", "null"):
        return "text"
    some = documents.select(range(min(len(documents), 100)))[name]
    value = next((value for value in some if value), None)
    if isinstance(value, list) and isinstance(value[0], dict) and "role" in value[0]:
        return "chat"
    return kind


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
        extra = [c for c in ("tools",) if c in documents.column_names]
        kept = documents.select_columns([*each.names, *extra * (each.kind != "text")])
        kept.set_format(None)
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
    if not all(document) or not all(d.strip() for d in document if isinstance(d, str)):
        return "empty left out"
    if config.eval_fraction:
        content = json.dumps(document, sort_keys=True, default=str).encode()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        is_out = int.from_bytes(digest) < config.eval_fraction * 2**64
        if is_out != held_out:
            return HELD_OUT if is_out else TRAINED_ON
    return ""
