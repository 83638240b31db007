"""Forms: which columns of a file hold documents, and as what."""

from __future__ import annotations

from itertools import islice

from tp2d_lib.config import ConfigError, TrainConfig, closest
from tp2d_lib.data.documents import CHAT, INSTRUCTION, PAIR, QUESTION, Form, parsed
from tp2d_lib.data.records import HEAD, File, HubTable

KNOWN = (*((name,) for name in CHAT), INSTRUCTION, PAIR, QUESTION, ("text",))


def form_of(config: TrainConfig, part: File | HubTable, has_template: bool) -> Form:
    """The columns that hold a file's documents: the one that is named, or known ones.

    Args:
        has_template: whether the tokenizer can write conversations; instructions are
            texts without.

    Raises:
        ConfigError: there is no such column, or it is none to train on.
        DataError: the file is damaged at its beginning.
    """
    has = part.columns()
    names = names_of(config, part, has)
    kind = "text"
    if names[0] in CHAT or is_chat(part, names[-1]):
        kind = "chat"
    elif names in (INSTRUCTION, QUESTION):
        kind = "instruction" if has_template else "pair"
    elif names == PAIR:
        kind = "pair"
    form = Form(names, kind)
    return form._replace(others=tuple(name for name in has if name not in form.wanted))


def names_of(
    config: TrainConfig, part: File | HubTable, has: list[str]
) -> tuple[str, ...]:
    given = config.text_column
    shown = [*has[:8], *["..."] * (len(has) > 8)]
    where = f"{part.path!r}, which has {', '.join(shown)}"
    if given and given not in has:
        raise ConfigError(
            f"text_column={given!r} must be a column of {where}; "
            f"try {closest(given, has)!r}"
        )
    if given:
        return (given,)
    check_preferences(config, part, {*has})
    if names := next((names for names in KNOWN if {*names} <= {*has}), None):
        return names
    if text := longest(part, has):
        raise ConfigError(f"text_column must be given for {where}; try {text!r}")
    raise ConfigError(
        f"dataset_name={config.dataset_name!r} must hold documents, but there is no "
        f"text in {where}; try one of the forms that README.md shows"
    )


def head(part: File | HubTable, name: str) -> list:
    """The values of a column in the first records that have one."""
    found = (record.get(name) for _, record in islice(part.records({name}), HEAD))
    return [value for value in found if value is not None]


def is_chat(part: File | HubTable, name: str) -> bool:
    """Whether a column holds messages; as JSON text, unless it is called text."""
    value = next(filter(None, head(part, name)), None)
    value = value if name == "text" else parsed(value)
    return isinstance(value, list) and isinstance(value[0], dict)


def longest(part: File | HubTable, names: list[str]) -> str | None:
    """The column that a person would pick: the one with the most text, if any has."""
    sizes = {}
    for name in names:
        sizes[name] = sum(len(v) for v in head(part, name) if isinstance(v, str))
    most = max(sizes, key=sizes.get, default=None)
    return most if sizes.get(most) else None


def check_preferences(
    config: TrainConfig, part: File | HubTable, has: set[str]
) -> None:
    """Refuse what one document is better than another for."""
    found = [n for n in sorted(has) if n.split("_")[0] in ("chosen", "rejected")]
    trainer = "DPO"
    is_talk = has & {*CHAT, "prompt"}
    if "label" in has and is_talk and any(type(v) is bool for v in head(part, "label")):
        found, trainer = ["label"], "KTO"
    if len(found) > 1 or trainer == "KTO":
        raise ConfigError(
            f"dataset_name={config.dataset_name!r} must hold documents to imitate, but "
            f"{part.path} holds preferences ({' and '.join(map(repr, found))}), which "
            f"{trainer} trains, such as trl.{trainer}Trainer; try a dataset of messages"
        )
