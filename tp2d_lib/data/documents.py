"""Documents: the rows of a dataset that are to be used, and the columns they are in."""

from __future__ import annotations

from typing import NamedTuple

from transformers import AutoTokenizer

from tp2d_lib.config import ConfigError, TrainConfig, closest, first_line
from tp2d_lib.data.sources import Source, fault

PAIR = ["prompt", "completion"]
KNOWN = (["messages"], ["conversations"], PAIR, ["text"])  # in this order


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
