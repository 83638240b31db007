"""Documents: from a dataset's files to one list of token ids each."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from filelock import FileLock
from transformers import AutoTokenizer

from tp2d_lib import store
from tp2d_lib.config import ConfigError, TrainConfig, closest, first_line


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


def load_builder(config: TrainConfig):
    """The dataset's builder, which describes the dataset before any row is read."""
    from datasets import load_dataset_builder  # here: slow, workers do not need it

    try:
        name = on_disk(config)
        return load_dataset_builder(name, config.dataset_config)
    except Exception as error:  # each format is read by another library
        where = config.dataset_name
        if config.dataset_config:
            where += f" ({config.dataset_config})"
        raise ConfigError(
            f"dataset_name={where!r} must be a folder with data files or a dataset on "
            f"the Hub; try 'Salesforce/wikitext' ({first_line(error)})"
        ) from error


def on_disk(config: TrainConfig) -> str:
    """The dataset's name, or of one in a store a copy, which later runs find again."""
    if not config.dataset_name.startswith(("s3://", "gs://")):
        return config.dataset_name
    folder = store.path(config.dataset_name)
    found = [(i.path, i.size, i.mtime_ns) for i in store.listing(folder)]
    if not found:
        raise FileNotFoundError("there is no such folder")
    name = hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16]
    target = config.data_dir / "fetched" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        return str(target if target.exists() else store.fetch(folder, target))


def load_documents(config: TrainConfig, builder):
    """The documents to use: the first ``dataset_percentage`` percent of the split."""
    from datasets import ReadInstruction  # here: slow, workers do not need it

    try:
        builder.download_and_prepare()
    except Exception as error:  # each format is read by another library
        raise ConfigError(
            f"dataset_name={config.dataset_name!r} must hold readable data "
            f"({first_line(error.__cause__ or error)}); try 'Salesforce/wikitext'"
        ) from error
    split = config.dataset_split
    if split not in builder.info.splits:
        raise ConfigError(
            f"dataset_split={split!r} must be a split of {config.dataset_name!r}, "
            f"which has {', '.join(builder.info.splits)}; "
            f"try {closest(split, list(builder.info.splits))!r}"
        )
    documents = builder.info.splits[split].num_examples
    kept = round(documents * config.dataset_percentage / 100)
    if kept == 0:
        raise ConfigError(
            f"dataset_percentage={config.dataset_percentage:g} must keep at least "
            f"one of the {documents} documents of {config.dataset_name!r}; try 100"
        )
    return builder.as_dataset(split=ReadInstruction(split, to=kept, unit="abs"))


def check_column(config: TrainConfig, documents) -> None:
    """Check that the text column exists and holds text."""
    if config.text_column not in documents.column_names:
        raise ConfigError(
            f"text_column={config.text_column!r} must be a column of "
            f"{config.dataset_name!r}, which has {', '.join(documents.column_names)}; "
            f"try {closest(config.text_column, documents.column_names)!r}"
        )
    kind = getattr(documents.features[config.text_column], "dtype", "list")
    if kind not in ("string", "large_string", "null"):
        texts = [
            name
            for name, feature in documents.features.items()
            if "string" in getattr(feature, "dtype", "")
        ]
        raise ConfigError(
            f"text_column={config.text_column!r} must hold text, not {kind}; "
            f"try {', '.join(map(repr, texts)) or 'another dataset'}"
        )


def tokenize(config: TrainConfig, tokenizer, builder, tokens_file: Path):
    """One list of token ids per document, end token last; drops empty documents."""
    documents = load_documents(config, builder)
    check_column(config, documents)

    def encode(batch):
        texts = [text for text in batch[config.text_column] if text and text.strip()]
        ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        ids = [[*document, tokenizer.eos_token_id] for document in ids]
        return {"input_ids": ids, "length": [len(document) for document in ids]}

    workers = min(config.preprocessing_num_workers, os.cpu_count() or 1)
    return documents.map(
        encode,
        batched=True,
        remove_columns=documents.column_names,
        num_proc=workers if workers > 1 else None,
        load_from_cache_file=False,  # our own fingerprint decides what to reuse
        cache_file_name=str(tokens_file),
    )
