"""TrainConfig: every setting of a run; values only, no file or network access."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tp2d_lib import validation
from tp2d_lib.validation import ConfigError, closest, first_line

__all__ = ["ConfigError", "TrainConfig", "closest", "first_line"]


def setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its help text and, for a closed set, its choices."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """One frozen description of a training run.

    Creating one checks the types, ranges, choices and combinations of its fields and
    makes local paths absolute; no file is opened. What depends on the model, the
    dataset, the storage or the hardware is checked by an engine's ``check(config)``,
    in the driver, before any worker starts.

    Raises:
        ConfigError: one sentence: the field, the value, the rule, a value that works.
    """

    model_name: str = setting(
        "Qwen/Qwen2.5-0.5B", "model directory, or name on the Hugging Face Hub"
    )
    model_revision: str | None = setting(
        None, "commit, tag or branch that pins a Hub model"
    )
    attn_implementation: str | None = setting(
        None,
        "attention of transformers; if omitted, sdpa where the model has it; those of "
        "flash_attention and flex_attention need GPUs",
        (
            "sdpa",
            "eager",
            "flash_attention_2",
            "flash_attention_3",
            "flex_attention",
        ),
    )
    dataset_name: str = setting(
        "Salesforce/wikitext",
        "file, folder or glob, several with commas between them, or name on the Hub",
    )
    dataset_config: str | None = setting(
        None, "configuration of a Hub dataset, such as wikitext-2-raw-v1"
    )
    dataset_revision: str | None = setting(
        None, "revision of a Hub dataset: branch, tag or commit"
    )
    dataset_split: str = setting("train", "split of the dataset to train on")
    dataset_percentage: float = setting(
        100.0, "use the first p percent of the documents: train[:p%%]"
    )
    text_column: str | None = setting(
        None,
        "column that holds text or messages; if omitted, messages or conversations, "
        "instruction and output, prompt and completion, question and answer, or text",
    )
    special_tokens_in_text: str | None = setting(
        None,
        "what reads like a special token in a text; parse: is that token; text: stays "
        "text; if omitted, parse where most texts hold one",
        ("parse", "text"),
    )
    train_on: str = setting(
        "assistant",
        "tokens of a conversation that count in the loss: the assistant's, those of "
        "its last turn, or all",
        ("assistant", "last", "all"),
    )
    seq_length: int = setting(2048, "tokens in one row of a batch")
    pack: str = setting(
        "auto",
        "how documents share rows; documents: none looks into another; stream: all "
        "joined and cut; none: one padded row each; auto: stream for text, else "
        "documents",
        ("auto", "documents", "stream", "none"),
    )
    preprocessing_num_workers: int | None = setting(
        None, "processes that tokenise; if omitted, as many as are worth it"
    )
    prepared_data: str | None = setting(
        None, "folder of rows from data.prepare; if omitted, prepared before the run"
    )

    eval_dataset: str | None = setting(
        None, "held-out dataset directory or Hub name; if omitted, the training dataset"
    )
    eval_split: str = setting("validation", "split of the held-out data")
    eval_fraction: float = setting(
        0.0, "hold out this fraction of the training documents, chosen by their hash"
    )
    prepared_eval_data: str | None = setting(
        None, "folder of held-out rows; if omitted, prepared before the run"
    )

    tp_size: int = setting(1, "tensor-parallel size: ranks that share each layer")
    dp_size: int = setting(
        1, "data-parallel size: groups of ranks that read different rows"
    )
    dp_replicate_size: int = setting(
        1,
        "FSDP2: copies of the model over dp, each sharded over neighbouring dp ranks "
        "(HSDP)",
    )
    num_workers: int | None = setting(
        None, "number of ranks; if omitted, tp_size * dp_size"
    )
    min_dp_size: int | None = setting(
        None,
        "after a loss of nodes, go on with fewer dp ranks, but at least so many, and "
        "the same global batch, until there is room again; if omitted, wait instead",
    )
    tp_across_nodes: str = setting(
        "refuse",
        "TP groups that span nodes, where every layer waits for the network",
        ("refuse", "warn", "allow"),
    )

    sequence_parallel: str = setting(
        "auto",
        "FSDP2: between blocks each tp rank holds seq_length / tp_size positions, "
        "which saves memory; auto: unless the model's attention makes masks",
        ("auto", "always", "never"),
    )

    batch_size_per_gpu: int = setting(1, "rows per micro-batch on each dp rank")
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step")
    num_epochs: int = setting(3, "passes over the data")
    max_steps: int | None = setting(None, "stop after this many optimizer steps")
    optimizer: str = setting("adamw", "optimizer", ("adamw", "sgd"))
    learning_rate: float = setting(1e-5, "peak learning rate")
    adam_beta1: float = setting(0.9, "AdamW's decay of the mean of gradients")
    adam_beta2: float = setting(0.999, "AdamW's decay of the mean of their squares")
    adam_epsilon: float = setting(1e-8, "what AdamW adds to its denominator")
    lr_scheduler_type: str = setting(
        "cosine",
        "schedule after the linear warm-up",
        ("cosine", "linear", "constant"),
    )
    warmup_ratio: float = setting(0.03, "fraction of steps used for warm-up, 0 to 1")
    warmup_steps: int | None = setting(
        None, "steps used for warm-up; if omitted, by warmup_ratio"
    )
    min_lr_ratio: float = setting(
        0.0, "learning rate at the end, as a fraction of the peak, 0 to 1"
    )
    weight_decay: float = setting(0.01, "decoupled weight decay (SGD: L2)")
    decay: str = setting(
        "all",
        "what weight_decay shrinks: all, or matrices: no norms and no biases",
        ("all", "matrices"),
    )
    max_grad_norm: float = setting(1.0, "clip the global gradient norm to this")
    nonfinite: str = setting(
        "stop",
        "at a loss or gradient that is infinite or NaN: stop, or skip the update",
        ("stop", "skip"),
    )
    zero_stage: int = setting(
        1, "DeepSpeed: ZeRO stage, 0 to 3: what is partitioned over dp"
    )
    tp_preset: str | None = setting(
        None,
        "DeepSpeed: built-in rules for sharding over tp; if omitted, the model's own",
        ("llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"),
    )
    partition_config: dict | str | None = setting(
        None, "DeepSpeed: your own rules for sharding over tp, as JSON or a JSON file"
    )
    vocab_parallel_lm_head: bool = setting(
        True, "DeepSpeed: shard embedding, head and loss over the vocabulary"
    )
    seed: int = setting(42, "seed of the data order and of every rank")
    deterministic: bool = setting(
        False,
        "use deterministic algorithms only, so that a run on the same GPUs repeats bit "
        "for bit; slower",
    )
    device: str = setting(
        "auto",
        "where to train; auto: GPUs when the cluster has any, else CPUs",
        ("auto", "cuda", "cpu"),
    )
    dtype: str = setting(
        "auto",
        "compute type; auto: bfloat16 if the hardware supports it, else float32; "
        "float16 (DeepSpeed) uses loss scaling",
        ("auto", "bfloat16", "float32", "float16"),
    )
    autocast: bool = setting(
        False,
        "FSDP2: compute in bfloat16 with torch.autocast, norms and loss in float32; "
        "weights are communicated in float32",
    )
    compile: bool = setting(False, "torch.compile the attention and MLP of each layer")
    activation_checkpointing: str = setting(
        "none",
        "activations that are computed again in backward instead of being stored; "
        "selective: all but attention's output and, without compile, most matrix "
        "products",
        ("none", "selective", "full"),
    )
    reshard_after_forward: bool = setting(
        True,
        "FSDP2: free a layer's gathered weights after forward and gather them again in "
        "backward; without it weights are sent once, and each rank holds all of them",
    )
    loss_chunk_tokens: int | None = setting(
        None,
        "tokens whose logits exist at once, in head and loss; 0: those of a whole "
        "micro-batch; if omitted, 1024, on CPUs 256, where a rank would have over 4 "
        "million logits",
    )

    storage_path: str = setting(
        "/mnt/cluster_storage", "where runs are stored; every node must have access"
    )
    cache_dir: str | None = setting(
        None, "where tokenised rows are stored; if omitted, storage_path/data"
    )
    run_name: str | None = setting(
        None, "name of the run; if omitted, made from the time"
    )
    resume_from_checkpoint: str | None = setting(
        None, "checkpoint folder a new run starts from, written on any mesh"
    )
    eval_every: int = setting(
        0, "steps between validation losses, plus one at the end; 0: none"
    )
    checkpoint_every: int = setting(
        0, "steps between checkpoints; 0: by time only; there is always one at the end"
    )
    checkpoint_minutes: float = setting(
        15.0, "minutes of training between checkpoints; 0: by steps only"
    )
    async_checkpoint: bool = setting(
        False, "FSDP2: write checkpoints while training continues"
    )
    save_total_limit: int = setting(2, "checkpoints to keep")
    max_failures: int = setting(3, "restarts allowed after losing a worker")
    hang_timeout: int | None = setting(
        None,
        "seconds without a word from a rank, or without a step, before the attempt is "
        "ended; if omitted, five times the slowest step seen, at least two minutes",
    )
    log_interval: int = setting(10, "steps between log lines")
    export_to: str | None = setting(
        None, "write the trained model here as plain Hugging Face safetensors"
    )
    export_dtype: str = setting(
        "auto",
        "type of the weights that are exported; auto: that of the model's own files",
        ("auto", "float32", "bfloat16", "float16"),
    )

    def __post_init__(self):
        if isinstance(self.pack, bool):  # as it was once written
            object.__setattr__(self, "pack", "stream" if self.pack else "none")
        validation.check_types(self)
        validation.check_values(self)
        if self.num_workers is None:
            object.__setattr__(self, "num_workers", self.tp_size * self.dp_size)
        validation.check_combinations(self)
        validation.make_paths_absolute(self)
        if self.dataset_name == "wikitext":  # the Hub's old short name no longer loads
            object.__setattr__(self, "dataset_name", "Salesforce/wikitext")
        if self.dataset_name == "Salesforce/wikitext" and self.dataset_config is None:
            object.__setattr__(self, "dataset_config", "wikitext-2-raw-v1")

    @property
    def global_batch_size(self) -> int:
        """Rows in one optimizer step, over all dp ranks and micro-batches."""
        return self.dp_size * self.batch_size_per_gpu * self.gradient_accumulation_steps

    @property
    def data_dir(self) -> Path:
        """Folder of the tokenised rows, visible to every node."""
        return Path(self.cache_dir or os.path.join(self.storage_path, "data"))
