"""Which values the settings of a run may have, and the sentences that refuse others."""

from __future__ import annotations

import difflib
import functools
import glob
import math
import os
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError


class UserError(Exception):
    """Shown in a notebook as one sentence, as on the command line: no traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError, ValueError):
    """A value the user can correct: names the field, the value and the rule."""


SYNONYMS = {"gpu": "cuda"}  # what people type, not as similar as another choice
READ_BY = {  # field -> the setting that reads it, and its values that do
    "adam_beta1": ("optimizer", ["adamw"]),
    "adam_beta2": ("optimizer", ["adamw"]),
    "adam_epsilon": ("optimizer", ["adamw"]),
    "min_lr_ratio": ("lr_scheduler_type", ["cosine", "linear"]),
}
LORA = ("lora_alpha", "lora_dropout", "lora_target_modules", "merge_adapter")


def in_one_line(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    if not value.isprintable():
        raise ValueError("must be printable text in one line")
    return value


def run_name(value: str) -> str:
    """A run's name is a folder's, an actor's and part of a URL: plain characters."""
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise ValueError(
            "must begin with a letter or digit, hold only letters A to Z, digits and "
            "._-, and have at most 100 characters, like run-1"
        )
    return value


def folder(value: str) -> str:
    """A local path is made absolute: Ray starts workers in directories of their own."""
    return value if "://" in value else absolute(value)


def name(value: str) -> str:
    """A name on the Hub, or a path, made absolute; a list of them has commas.

    It is a path if it is written as one or if such a file exists, as in
    ``from_pretrained``. No file is opened.
    """
    if "://" in value:
        return value
    return ",".join(absolute(n) if is_path(n) else n for n in several(value))


def rules(value: str) -> str:
    is_text = value in get_args(Preset) or value.lstrip().startswith("{")
    return value if is_text else folder(in_one_line(value))


def pack(value: Any) -> Any:
    """As it was once written."""
    return ("stream" if value else "none") if isinstance(value, bool) else value


Preset = Literal["llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"]
INT64 = Field(lt=2**63)
Count = Annotated[int, Field(gt=0), INT64]
CountOr0 = Annotated[int, Field(ge=0), INT64]
Length = Annotated[int, Field(ge=2), INT64]  # each token predicts the next
Stage = Annotated[int, Field(ge=0, le=3)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Percent = Annotated[float, Field(gt=0, le=100)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Line = Annotated[str, AfterValidator(in_one_line)]
Folder = Annotated[Line, AfterValidator(folder)]
Name = Annotated[Line, AfterValidator(name)]
RunName = Annotated[str, AfterValidator(run_name)]
# A preset of DeepSpeed's, JSON text, or a JSON file.
Rules = Annotated[str, AfterValidator(rules)]
Pack = Annotated[Literal["auto", "documents", "stream", "none"], BeforeValidator(pack)]


def leaves(hint: Any) -> list:
    """The plain types that an annotation allows; of a Literal, its choices."""
    if get_origin(hint) is Literal or not get_args(hint):
        return list(get_args(hint)) or [hint]
    first, *others = get_args(hint)
    others = [] if get_origin(hint) is Annotated else others
    return [leaf for each in (first, *others) for leaf in leaves(each)]


def choices(hint: Any) -> list[str]:
    return [leaf for leaf in leaves(hint) if isinstance(leaf, str)]


def in_sentences(cls):
    """Make a dataclass of pydantic's raise ConfigError instead of its own errors."""
    make, known = cls.__init__, cls.__pydantic_fields__

    @functools.wraps(make)
    def __init__(self, *args, **values):
        try:
            make(self, *args, **values)
        except ValidationError as error:
            raise sentence(error.errors(include_url=False)[0], known) from None

    cls.__init__ = __init__
    return cls


def sentence(error: dict, known: dict) -> ConfigError:
    """One of pydantic's errors as the field, the value, the rule, a value that works.

    Args:
        known: pydantic's description of each field.
    """
    context = error.get("ctx", {})
    if isinstance(context.get("error"), ConfigError):  # of a combination
        return context["error"]
    name, value = error["loc"][0], error["input"]
    if name not in known:
        return ConfigError(
            f"{name}={shown(value)} must be a field of TrainConfig; "
            f"try {closest(name, known)}"
        )
    rule = rule_of(error)
    default, advice = known[name].default, "leave it out"
    if error["type"] == "literal_error":
        advice = f"try {closest(value, choices(known[name].annotation))!r}"
    elif default is not None:
        advice = f"try {default!r}"
    elif limit := {"gt", "ge"} & {*context}:
        advice = f"try {context[limit.pop()] + 1}"
    return ConfigError(f"{name}={shown(value)} {rule}; {advice}")


def rule_of(error: dict) -> str:
    """What one of pydantic's errors asks for: "must be ..."."""
    known = {"missing": "must be given", "extra_forbidden": "must be left out"}
    said = known.get(error["type"], error["msg"].replace("Input should", "must"))
    return str(error.get("ctx", {}).get("error", said))


def shown(value: Any) -> str:
    """A value as Python writes it, but for integers that are too long to be written."""
    is_long = type(value) is int and value.bit_length() > 63
    return f"(an integer of {value.bit_length()} bits)" if is_long else repr(value)


def check_combinations(config: Any) -> None:
    for name, (reader, values) in READ_BY.items():
        value, chosen = getattr(config, name), getattr(config, reader)
        if value != getattr(type(config), name) and chosen not in values:
            raise ConfigError(
                f"{name}={value:g} must be combined with {reader} "
                f"{' or '.join(values)}, because {chosen} does not read it; try "
                f"{reader}={values[0]!r}"
            )
    for name in LORA:
        value = getattr(config, name)
        if value != getattr(type(config), name) and not config.lora_rank:
            raise ConfigError(
                f"{name}={value!r} must be combined with lora_rank, because nothing "
                "else reads it; try lora_rank=8"
            )
    world_size = config.tp_size * config.dp_size
    if config.num_workers != world_size:
        raise ConfigError(
            f"num_workers={config.num_workers} must equal tp_size * dp_size = "
            f"{config.tp_size} * {config.dp_size}; try {world_size}"
        )
    if config.dp_size % config.dp_replicate_size:
        raise ConfigError(
            f"dp_replicate_size={config.dp_replicate_size} must divide "
            f"dp_size={config.dp_size}; "
            f"try {math.gcd(config.dp_size, config.dp_replicate_size)}"
        )
    fewest = config.min_dp_size or config.dp_size
    if fewest > config.dp_size:
        raise ConfigError(
            f"min_dp_size={fewest} must be at most dp_size={config.dp_size}; try 1"
        )
    if fewest < config.dp_size and config.dp_replicate_size > 1:
        raise ConfigError(
            f"min_dp_size={fewest} cannot be combined with "
            f"dp_replicate_size={config.dp_replicate_size}, whose copies a lost node "
            "would tear apart; try min_dp_size=None"
        )
    if config.loss_chunk_tokens and config.dtype == "float16":
        raise ConfigError(
            f"loss_chunk_tokens={config.loss_chunk_tokens} cannot be combined with "
            "dtype='float16', whose loss is scaled too late for gradients computed in "
            "the forward pass; try loss_chunk_tokens=0"
        )
    if config.eval_fraction and config.eval_dataset:
        raise ConfigError(
            f"eval_fraction={config.eval_fraction:g} cannot be combined with "
            f"eval_dataset={config.eval_dataset!r}, which is held out already; try "
            "eval_fraction=0"
        )
    if "://" in config.storage_path and config.cache_dir is None:
        raise ConfigError(
            f"cache_dir=None must name a folder every node sees when "
            f"storage_path={config.storage_path!r} is remote, because tokenized rows "
            "are memory-mapped; try cache_dir='/mnt/cluster_storage/data'"
        )
    for name in ("cache_dir", "prepared_data", "prepared_eval_data"):
        if "://" in (getattr(config, name) or ""):
            raise ConfigError(
                f"{name}={getattr(config, name)!r} must be a folder on a disk that "
                "every node sees, because rows of tokens are memory-mapped; try "
                f"{name}='/mnt/cluster_storage/data'"
            )


def several(value: str) -> list[str]:
    """The names in a list with commas; a path or a pattern may have some of its own."""
    is_one = os.path.exists(value) or glob.glob(os.path.expanduser(value))
    return [value] if is_one else [part.strip() for part in value.split(",")]


def is_path(name: str) -> bool:
    written_as_path = name.startswith((".", "~", "/")) or any(c in name for c in "*?[")
    return written_as_path or os.path.exists(name)


def absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def first_line(error: BaseException) -> str:
    """What an error says, in one line, to be put into a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def closest(value: Any, choices) -> str:
    """The choice most similar to a mistyped value; the first if none is similar."""
    lowered = {choice.lower(): choice for choice in reversed(list(choices))}
    given = value.lower() if isinstance(value, str) else ""
    matches = difflib.get_close_matches(SYNONYMS.get(given, given), lowered, n=1)
    return lowered[matches[0]] if matches else next(iter(choices))
