"""partition_config: your own rules for what DeepSpeed shards, read and checked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tp2d_lib.config import ConfigError, closest

RULE_KEYS = {  # of DeepSpeed's TPLayerSpec, with the type of each value
    "patterns": list,
    "partition_type": str,
    "shape": list,
    "partition_dim": int,
    "gather_output": bool,
    "grad_allreduce": bool,
    "model_types": list,
}
KINDS = ("column", "row", "skip")
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


def read(value: dict | str | None) -> dict | None:
    """The rules as a dictionary, from a dictionary, JSON text or a JSON file.

    Raises:
        ConfigError: no such file, not JSON, an unknown key or value, an empty rule.
    """
    if isinstance(value, str):
        try:
            is_text = value.lstrip().startswith("{")
            value = json.loads(value if is_text else Path(value).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"partition_config={value!r} must be a JSON file or JSON text "
                f"({error}); try {EXAMPLE}"
            ) from error
    if value is not None:
        check_keys("partition_config", value, ("use_default_specs", "layer_specs"))
        for rule in value.get("layer_specs") or [None]:
            check_rule(rule)
    return value


def check_rule(rule: Any) -> None:
    """One entry of ``layer_specs``: known keys, right types, patterns that compile."""
    check_keys("a rule of partition_config", rule, RULE_KEYS)
    for key, value in rule.items():
        if type(value) is not RULE_KEYS[key]:
            raise ConfigError(
                f"{key}={value!r} of a rule of partition_config must be "
                f"{RULE_KEYS[key].__name__}; try {EXAMPLE}"
            )
    kind = rule.get("partition_type", "column")
    if kind not in KINDS:
        raise ConfigError(
            f"partition_type={kind!r} of a rule of partition_config must be one of "
            f"{', '.join(KINDS)}; try {closest(kind, KINDS)!r}"
        )
    for pattern in rule.get("patterns") or [None]:
        try:
            re.compile(pattern)
        except (TypeError, re.error) as error:
            raise ConfigError(
                f"patterns={rule.get('patterns')!r} of a rule of partition_config must "
                f"be regular expressions ({error}); try '.*o_proj\\.weight$'"
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


def check_keys(what: str, value: Any, known) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be an object, not {value!r}; try {EXAMPLE}")
    for key in value:
        if key not in known:
            raise ConfigError(
                f"{key!r} in {what} must be one of {', '.join(known)}; "
                f"try {closest(key, known)!r}"
            )
