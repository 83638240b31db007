"""TrainConfig: everything a run needs, checked in the driver before anything starts."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlparse


class ConfigError(ValueError):
    """A value the user can correct: names the field, the value and the rule."""


def setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that carries its help text and, where closed, its choices."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """One frozen description of a training run.

    Making one checks it: sizes and choices first, then the model's own
    ``config.json`` (heads, longest sequence). What needs the rows themselves, such as
    the text column, is checked by ``data.prepare``, also before any worker starts.

    Raises:
        ConfigError: one sentence with the field, the value, the rule and a way out.
    """

    model_name: str = setting(
        "Qwen/Qwen2.5-0.5B", "model directory, or name on the Hugging Face Hub"
    )
    model_revision: str | None = setting(
        None, "commit, tag or branch that pins a Hub model"
    )
    dataset_name: str = setting(
        "Salesforce/wikitext", "dataset directory, or name on the Hub"
    )
    dataset_config: str | None = setting(
        None, "configuration of a Hub dataset, such as wikitext-2-raw-v1"
    )
    dataset_split: str = setting("train", "split of the dataset to train on")
    dataset_percentage: float = setting(
        100.0, "use the first p percent of the rows: train[:p%%]"
    )
    text_column: str = setting("text", "column that holds the text")
    seq_length: int = setting(2048, "tokens in one row of a batch")
    pack: bool = setting(
        True, "cut joined documents into full rows; off: one padded row a document"
    )
    preprocessing_num_workers: int = setting(1, "processes that tokenise")
    prepared_data: str | None = setting(
        None, "folder of rows made by data.prepare; left out: prepared before the run"
    )

    eval_dataset: str | None = setting(
        None, "held-out dataset directory or Hub name; left out: the dataset's own"
    )
    eval_split: str = setting("validation", "split of the held-out data")
    prepared_eval_data: str | None = setting(
        None, "folder of held-out rows; left out: prepared before the run"
    )

    tp_size: int = setting(1, "tensor-parallel size: ranks that share each layer")
    dp_size: int = setting(1, "data-parallel size: groups that read different rows")
    num_workers: int | None = setting(
        None, "number of ranks; left out: tp_size * dp_size"
    )

    batch_size_per_gpu: int = setting(1, "rows in one micro-batch of a dp rank")
    gradient_accumulation_steps: int = setting(1, "micro-batches in a step")
    num_epochs: int = setting(3, "passes over the data")
    max_steps: int | None = setting(None, "stop after this many optimizer steps")
    optimizer: str = setting("adamw", "optimizer", ("adamw", "sgd"))
    learning_rate: float = setting(1e-5, "peak learning rate")
    lr_scheduler_type: str = setting(
        "cosine", "shape after the linear warm-up", ("cosine", "constant")
    )
    warmup_ratio: float = setting(0.03, "share of the steps that warms up, 0 to 1")
    weight_decay: float = setting(0.01, "decoupled weight decay (SGD: L2)")
    max_grad_norm: float = setting(1.0, "clip the global gradient norm to this")
    zero_stage: int = setting(1, "DeepSpeed: what dp ranks share out, 0 to 3")
    tp_preset: str | None = setting(
        None,
        "DeepSpeed: built-in rules of what is cut over tp; left out: the model's own",
        ("llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"),
    )
    partition_config: dict | str | None = setting(
        None, "DeepSpeed: rules of your own of what is cut over tp, as a JSON file"
    )
    vocab_parallel_lm_head: bool = setting(
        True, "DeepSpeed: cut embedding, head and loss over the vocabulary"
    )
    seed: int = setting(42, "seed of the data order and of every rank")
    device: str = setting(
        "auto",
        "where to train; auto: GPUs when the cluster has any, else CPUs",
        ("auto", "cuda", "cpu"),
    )
    dtype: str = setting(
        "auto",
        "compute type; auto: bfloat16 where the hardware has it, else float32; "
        "float16 (DeepSpeed) scales the loss",
        ("auto", "bfloat16", "float32", "float16"),
    )
    autocast: bool = setting(
        False,
        "FSDP2: compute in bfloat16 by torch.autocast, norms and loss in float32; "
        "weights travel in float32",
    )
    compile: bool = setting(False, "torch.compile attention and MLP of each layer")
    bf16_master_weights: bool = setting(
        False,
        "DeepSpeed: bfloat16 masters and optimizer state; less memory, lost updates",
    )
    activation_checkpointing: bool = setting(
        False, "recompute each layer in backward instead of storing its activations"
    )

    storage_path: str = setting(
        "/mnt/cluster_storage", "where runs are kept; every node must see it"
    )
    cache_dir: str | None = setting(
        None, "where tokenised rows are kept; left out: storage_path/data"
    )
    run_name: str | None = setting(None, "name of the run; left out: made from time")
    resume_from_checkpoint: str | None = setting(
        None, "checkpoint folder a new run starts from, written on any mesh"
    )
    eval_every: int = setting(
        0, "steps between validation losses, one more at the end; 0: none"
    )
    checkpoint_every: int = setting(100, "steps between checkpoints; 0: only the last")
    async_checkpoint: bool = setting(
        False, "FSDP2: write checkpoints while training goes on"
    )
    save_total_limit: int = setting(2, "checkpoints to keep")
    max_failures: int = setting(3, "times a run restarts after losing a worker")
    log_interval: int = setting(10, "steps between log lines")
    report_to: str | None = setting(
        None, "log there too; TensorBoard is always written", ("mlflow",)
    )
    profile_steps: int = setting(
        0, "write a torch.profiler trace of so many steps, after the first, to the run"
    )
    export_to: str | None = setting(
        None, "write the trained model here as plain Hugging Face safetensors"
    )

    def __post_init__(self):
        check_types(self)
        check_values(self)
        if self.num_workers is None:
            object.__setattr__(self, "num_workers", self.tp_size * self.dp_size)
        check_mesh(self)
        if self.dataset_name == "wikitext":  # the Hub's old short name no longer loads
            object.__setattr__(self, "dataset_name", "Salesforce/wikitext")
        if self.dataset_name == "Salesforce/wikitext" and self.dataset_config is None:
            object.__setattr__(self, "dataset_config", "wikitext-2-raw-v1")
        from tp2d_lib import model, rules  # deferred: slow to import

        object.__setattr__(self, "partition_config", rules.read(self.partition_config))
        model.check_config(self)
        check_sequence(self)

    @property
    def global_batch_size(self) -> int:
        """Rows in one optimizer step, over all dp ranks and micro-batches."""
        return self.dp_size * self.batch_size_per_gpu * self.gradient_accumulation_steps

    @property
    def data_dir(self) -> Path:
        """Folder of the tokenised rows, seen by every node."""
        return Path(self.cache_dir or os.path.join(self.storage_path, "data"))


POSITIVE = {  # field -> a value that works
    "seq_length": 512,
    "preprocessing_num_workers": 1,
    "tp_size": 1,
    "dp_size": 1,
    "num_workers": 1,
    "batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "max_steps": 100,
    "learning_rate": 1e-5,
    "max_grad_norm": 1.0,
    "save_total_limit": 2,
    "log_interval": 10,
}
NOT_NEGATIVE = (
    "weight_decay",
    "eval_every",
    "checkpoint_every",
    "max_failures",
    "profile_steps",
    "seed",
)


def check_types(config: TrainConfig) -> None:
    """Each value has its field's type; an int is accepted where a float is asked."""
    hints = get_type_hints(TrainConfig)
    for f in fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        allowed = getattr(hint, "__args__", (hint,))  # `int | None` -> (int, NoneType)
        if float in allowed and type(value) is int:
            value = float(value)
            object.__setattr__(config, f.name, value)
        if type(value) not in allowed:
            names = " or ".join(
                "None" if t is type(None) else t.__name__ for t in allowed
            )
            raise ConfigError(
                f"{f.name}={value!r} must be {names}; its default is {f.default!r}"
            )


def check_values(config: TrainConfig) -> None:
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value} must be positive; try {POSITIVE[name]}")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        if not value >= 0:
            raise ConfigError(f"{name}={value} must not be negative; try 0")
    if config.seq_length < 2:
        raise ConfigError(
            "seq_length=1 must be at least 2, because each token predicts the next; "
            "try 512"
        )
    if config.zero_stage not in range(4):
        raise ConfigError(f"zero_stage={config.zero_stage} must be 0, 1, 2 or 3; try 1")
    if not 0 < config.dataset_percentage <= 100:
        raise ConfigError(
            f"dataset_percentage={config.dataset_percentage:g} must be above 0 and at "
            "most 100; try 100"
        )
    if not 0 <= config.warmup_ratio <= 1:
        raise ConfigError(
            f"warmup_ratio={config.warmup_ratio:g} must be from 0 to 1; try 0.03"
        )
    for f in fields(config):
        choices, value = f.metadata["choices"], getattr(config, f.name)
        if choices and value is not None and value not in choices:
            raise ConfigError(
                f"{f.name}={value!r} must be one of {', '.join(choices)}; "
                f"try {closest(value, choices)}"
            )


def check_mesh(config: TrainConfig) -> None:
    world_size = config.tp_size * config.dp_size
    if config.num_workers != world_size:
        raise ConfigError(
            f"num_workers={config.num_workers} must equal tp_size * dp_size = "
            f"{config.tp_size} * {config.dp_size}; try {world_size}"
        )
    if urlparse(config.storage_path).scheme and config.cache_dir is None:
        raise ConfigError(
            f"cache_dir=None must name a folder every node sees when "
            f"storage_path={config.storage_path!r} is remote, because tokenised rows "
            "are memory-mapped; try cache_dir='/mnt/cluster_storage/data'"
        )


def check_sequence(config: TrainConfig) -> None:
    if config.seq_length % config.tp_size:
        fits = max(config.seq_length // config.tp_size, 1) * config.tp_size
        raise ConfigError(
            f"seq_length={config.seq_length} must be divisible by "
            f"tp_size={config.tp_size}, because each tp rank keeps an equal share of "
            f"the activations; try {fits}"
        )


def closest(value: str, choices) -> str:
    """The choice a typing mistake most likely meant."""
    lowered = {choice.lower(): choice for choice in reversed(list(choices))}
    matches = difflib.get_close_matches(str(value).lower(), lowered, n=1)
    return lowered[matches[0]] if matches else next(iter(choices))
