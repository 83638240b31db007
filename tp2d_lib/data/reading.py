"""What will be read, and how: decided before any document is tokenized, and told."""

from __future__ import annotations

from datetime import date
from itertools import islice

from transformers import AutoTokenizer

from tp2d_lib.config import ConfigError, TrainConfig, first_line
from tp2d_lib.data.chat import Template, check_template, special_tokens, writes_date
from tp2d_lib.data.files import listed, open_dataset
from tp2d_lib.data.forms import form_of
from tp2d_lib.data.plain import DataError
from tp2d_lib.data.records import HEAD
from tp2d_lib.data.tokens import Reading, records, unreadable

MEDIA = ("image", "video", "audio")
FORMAT = 1  # of the rows that this code makes of the same content


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


def open_reading(config: TrainConfig, tokenizer) -> Reading:
    """The dataset, and the form of each of its parts.

    Raises:
        ConfigError: it cannot be found or read, or holds no documents to train on.
    """
    dataset = open_dataset(config)
    has_template = bool(tokenizer.chat_template)
    try:
        forms = [form_of(config, part, has_template) for part in dataset.parts]
    except DataError as error:
        raise unreadable(config, error) from error
    is_chat = any(form.kind in ("chat", "instruction") for form in forms)
    if is_chat:
        check_template(config, tokenizer)
    day = date.today() if is_chat and writes_date(tokenizer) else None
    template = Template(tokenizer, day, has_tools=False) if is_chat else None
    reading = Reading(dataset, forms, False, day, template)
    return reading._replace(parses=parses(config, tokenizer, reading))


def parses(config: TrainConfig, tokenizer, reading: Reading) -> bool:
    """Whether special tokens in texts are those tokens: where most texts hold some."""
    if config.special_tokens_in_text:
        return config.special_tokens_in_text == "parse"
    special, texts, holding = special_tokens(tokenizer), 0, 0
    for form, _, record in islice(records(config, reading), HEAD):
        if form.kind in ("text", "pair"):
            text = "".join(str(record.get(name)) for name in form.names)
            texts += 1
            holding += any(token in text for token in special)
    return 2 * holding > texts


def notes(config: TrainConfig, reading: Reading) -> list[str]:
    """What is told about a reading: what was decided, and what is not used."""
    found = []
    if reading.parses:
        found.append("special tokens in texts are those tokens")
    if reading.template and not reading.template.ends:
        found.append("the template ends no turn, so that no end is trained on")
    if reading.day:
        found.append(f"the template's date is {reading.day}")
    columns = sorted({column for form in reading.forms for column in form.others})
    if columns:
        found.append(f"columns not used: {listed(columns)}")
    if any(word in column for column in columns for word in MEDIA):
        some = (str(record) for *_, record in islice(records(config, reading), HEAD))
        marks = {mark for text in some for mark in MEDIA if f"<{mark}>" in text}
        found += [f"texts hold <{mark}>, of which nothing is read" for mark in marks]
    if reading.dataset.left_out:
        found.append(f"files not read: {listed(reading.dataset.left_out)}")
    return found
