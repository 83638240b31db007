"""The settings that the net combines, in rows that cover every pair of values."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import fields
from itertools import combinations

from allpairspy import AllPairs

from tp2d_lib import autotp, fsdp
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.fsdp import plan

SEQ, GLOBAL_BATCH = 96, 4
# The first value of each is the usual one.
COMMON = {
    "mesh": ["2x2", "1x1", "2x1", "1x2", "4x1"],  # tp_size x dp_size
    "model": ["llama", "qwen2", "starcoder2", "windows"],
    "tied": [False, True],
    "data": ["text", "chats"],
    "pack": ["auto", "documents", "stream", "none"],
    "held_out": ["text", "nothing", "chats", "fraction"],
    "gradient_accumulation_steps": [1, 2],
    "optimizer": ["adamw", "sgd"],
    "decay": ["all", "matrices"],
    "max_grad_norm": [0.5, 1e6],
    "loss_chunk_tokens": [0, 100],
    "precision": ["float32", "bfloat16"],
    "activation_checkpointing": ["none", "full", "selective"],
    "attn_implementation": [None, "eager"],
    "compile": [False, True],
    "nonfinite": ["stop", "skip"],
    "frozen": ["nothing", "embedding", "layer"],
}
OWN = {
    "fsdp": {
        "mesh": [*COMMON["mesh"], "1x4/2", "2x2/2"],  # copies of the model: HSDP
        "precision": [*COMMON["precision"], "autocast"],
        "reshard_after_forward": [True, False],
        "sequence_parallel": ["auto", "never", "always"],
        "async_checkpoint": [False, True],
        "lora_rank": [0, 3],
        "smallest_group": [1, plan.SMALLEST_GROUP],  # each layer, or all at once
    },
    "autotp": {
        "zero_stage": [1, 2, 3, 0],
        "vocab_parallel_lm_head": [None, False],
    },
}
CHECKS = {
    "fsdp": fsdp.preflight.check_precision,
    "autotp": autotp.preflight.check_precision,
}
PRECISIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "autocast": {"autocast": True},
}
NAMES = {field.name for field in fields(TrainConfig)}
Case = dict[str, object]


def values_of(engine: str) -> dict[str, list]:
    return COMMON | OWN[engine]


def usual(engine: str) -> Case:
    return {name: values[0] for name, values in values_of(engine).items()}


def pairs_of(case: Case) -> set:
    """Every two of a case's values, each with its name."""
    return set(combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def all_pairs(engine: str) -> set:
    values = values_of(engine)
    return {
        ((a, x), (b, y))
        for a, b in combinations(sorted(values), 2)
        for x in values[a]
        for y in values[b]
    }


def settings_of(case: Case) -> dict:
    """The fields of a TrainConfig that a case sets, but for its model and its data."""
    size, _, copies = case["mesh"].partition("/")
    tp_size, dp_size = map(int, size.split("x"))
    settings = {name: value for name, value in case.items() if name in NAMES}
    return settings | {
        "tp_size": tp_size,
        "dp_size": dp_size,
        "dp_replicate_size": int(copies or 1),
        "batch_size_per_gpu": GLOBAL_BATCH // dp_size,
        "seq_length": SEQ,
        "device": "cpu",
        "learning_rate": learning_rate(case),
        "eval_every": int(case["held_out"] != "nothing"),
        "merge_adapter": case.get("lora_rank", 0) > 0,
        "eval_fraction": 0.2 if case["held_out"] == "fraction" else 0.0,
        **PRECISIONS[case["precision"]],
    }


def learning_rate(case: Case) -> float:
    """Large enough for weights to move far; SGD's gradient may be clipped or large."""
    clipped = case["max_grad_norm"] < 1
    return {"adamw": 1e-3, "sgd": 0.5 if clipped else 1e-3}[case["optimizer"]]


def rows_of(engine: str) -> list[Case]:
    """Cases that meet every pair of values which may meet, by values alone."""
    values = values_of(engine)

    def may_meet(row: list) -> bool:
        case = usual(engine) | dict(zip(values, row, strict=False))
        try:
            CHECKS[engine](TrainConfig(**settings_of(case)))
        except ConfigError:
            return False
        return True

    found = AllPairs(OrderedDict(values), filter_func=may_meet)
    return [row._asdict() for row in found]
