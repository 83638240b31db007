"""partition_config: your own rules for what DeepSpeed shards, read and checked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tp2d_lib.config import ConfigError, first_line
from tp2d_lib.validation import Preset, choices, rule_of, shown

EXAMPLE = (
    '{"layer_specs": [{"patterns": [".*o_proj.weight$"], "partition_type": "row"}]}'
)
MATCH_LIMIT_S = 10  # a sound pattern takes milliseconds
MATCH = """
import json, re, sys
pattern, names = json.load(sys.stdin)
for name in names:
    re.match(pattern, name)
"""


def expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"must be a regular expression ({error})") from error
    return value


class Rule(BaseModel):
    """DeepSpeed's TPLayerSpec."""

    model_config = ConfigDict(extra="forbid", strict=True)

    patterns: list[Annotated[str, AfterValidator(expression)]] = Field(min_length=1)
    partition_type: Literal["column", "row", "skip"] = "column"
    shape: list | None = None
    partition_dim: int | None = None
    gather_output: bool = False
    grad_allreduce: bool = False
    model_types: list[str] | None = None


class Rules(BaseModel):
    """DeepSpeed's ``preset_model`` and, on top of it or alone, ``partition_config``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    preset_model: Preset | None = None
    use_default_specs: bool = True
    layer_specs: list[Rule] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def not_empty(self):
        if not (self.preset_model or self.layer_specs):
            raise ValueError("must have layer_specs")
        return self


def read(value: dict | str | None) -> dict | None:
    """The rules as a dictionary: those given, of JSON text, a JSON file, or a preset.

    Raises:
        ConfigError: no such file, not JSON, an unknown key or value, an empty rule.
    """
    if value is None:
        return None
    if value in choices(Preset):
        return {"preset_model": value}
    if isinstance(value, str):
        try:
            is_text = value.lstrip().startswith("{")
            value = json.loads(value if is_text else Path(value).read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"partition_config={value!r} must be {', '.join(choices(Preset))}, a "
                f"JSON file or JSON text ({first_line(error)}); try {EXAMPLE}"
            ) from error
    try:
        return Rules.model_validate(value).model_dump(
            exclude_unset=True, exclude_none=True
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("partition_config", *first["loc"])))
        raise ConfigError(
            f"{place}={shown(first['input'])} {rule_of(first)}; try {EXAMPLE}"
        ) from error


def check_time(value: dict | None, names: Iterable[str]) -> None:
    """Match every pattern with the model's names where it can be stopped.

    DeepSpeed would match it with ``re``, which knows no limit; so a process of its own
    does the same first.

    Raises:
        ConfigError: a pattern that backtracks without end.
    """
    rules = (value or {}).get("layer_specs", ())
    for pattern in [pattern for rule in rules for pattern in rule["patterns"]]:
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", MATCH],
                input=json.dumps([pattern, list(names)]).encode(),
                timeout=MATCH_LIMIT_S,
                check=True,
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"patterns={[pattern]!r} of a rule of partition_config must match the "
                f"model's names within {MATCH_LIMIT_S} s, without nested repetitions; "
                "try '.*o_proj\\.weight$'"
            ) from None
