"""TrainConfig: every setting of a run; values only, no file or network access."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from tp2d_lib import validation
from tp2d_lib.validation import (
    Below1,
    ConfigError,
    Count,
    CountOr0,
    Folder,
    Length,
    Line,
    Name,
    NotNegative,
    Pack,
    Percent,
    Positive,
    Ratio,
    Rules,
    RunName,
    Stage,
    closest,
    first_line,
)

__all__ = ["FIELDS", "ConfigError", "TrainConfig", "closest", "first_line"]


@validation.in_sentences
@dataclass(
    frozen=True,
    config=ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # the help of the commands' flags
    ),
)
class TrainConfig:
    """One frozen description of a training run.

    Creating one checks the types, ranges, choices and combinations of its fields and
    makes local paths absolute; no file is opened. What depends on the model, the
    dataset, the storage or the hardware is checked by an engine's ``check(config)``,
    in the driver, before any worker starts.

    Raises:
        ConfigError: one sentence: the field, the value, the rule, a value that works.
    """

    model_name: Name = "Qwen/Qwen2.5-0.5B"
    """model directory, or name on the Hugging Face Hub"""
    model_revision: Line | None = None
    """commit, tag or branch that pins a Hub model"""
    attn_implementation: (
        Literal[
            "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
        ]
        | None
    ) = None
    """attention of transformers; if omitted, sdpa if the model has it; flash and flex
    attention need GPUs"""
    dataset_name: Name = "Salesforce/wikitext"
    """file, folder or glob, several with commas between them, or name on the Hub"""
    dataset_config: Line | None = None
    """configuration of a Hub dataset, such as wikitext-2-raw-v1"""
    dataset_revision: Line | None = None
    """revision of a Hub dataset: branch, tag or commit"""
    dataset_split: Line = "train"
    """split of the dataset to train on"""
    dataset_percentage: Percent = 100.0
    """use the first p percent of the documents: train[:p%]"""
    text_column: Line | None = None
    """column that holds text or messages; if omitted, messages or conversations,
    instruction and output, prompt and completion, question and answer, or text"""
    special_tokens_in_text: Literal["parse", "text"] | None = None
    """what reads like a special token in a text; parse: is that token; text: stays
    text; if omitted, parse where most texts hold one"""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """tokens of a conversation that count in the loss: the assistant's, those of its
    last turn, or all"""
    seq_length: Length = 2048
    """tokens in one row of a batch"""
    pack: Pack = "auto"
    """how documents share rows; documents: none looks into another; stream: all joined
    and cut; none: one padded row each; auto: stream for text, else documents"""
    prepared_data: Folder | None = None
    """folder of rows from data.prepare; if omitted, prepared before the run"""

    eval_dataset: Name | None = None
    """held-out dataset directory or Hub name; if omitted, the training dataset"""
    eval_split: Line = "validation"
    """split of the held-out data"""
    eval_fraction: Below1 = 0.0
    """hold out this fraction of the training documents, chosen by their hash"""
    prepared_eval_data: Folder | None = None
    """folder of held-out rows; if omitted, prepared before the run"""

    tp_size: Count = 1
    """tensor-parallel size: ranks that share each layer"""
    dp_size: Count = 1
    """data-parallel size: groups of ranks that read different rows"""
    dp_replicate_size: Count = 1
    """FSDP2: copies of the model over dp, each sharded over neighboring dp ranks
    (HSDP)"""
    num_workers: Count | None = None
    """number of ranks; if omitted, tp_size * dp_size"""
    min_dp_size: Count | None = None
    """smallest dp_size to continue with after losing nodes, with the same global
    batch, until they are back; if omitted, wait for them"""
    tp_across_nodes: Literal["refuse", "warn", "allow"] = "refuse"
    """TP groups that span nodes, where every layer waits for the network"""

    sequence_parallel: Literal["auto", "always", "never"] = "auto"
    """FSDP2: between blocks each tp rank holds seq_length / tp_size positions, which
    saves memory; auto: unless the model's attention makes masks"""

    batch_size_per_gpu: Count = 1
    """rows per micro-batch on each dp rank"""
    gradient_accumulation_steps: Count = 1
    """micro-batches per optimizer step"""
    num_epochs: Count = 3
    """passes over the data"""
    max_steps: Count | None = None
    """stop after this many optimizer steps"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """optimizer"""
    learning_rate: Positive = 1e-5
    """peak learning rate"""
    adam_beta1: Below1 = 0.9
    """AdamW's decay of the mean of gradients"""
    adam_beta2: Below1 = 0.999
    """AdamW's decay of the mean of their squares"""
    adam_epsilon: Positive = 1e-8
    """what AdamW adds to its denominator"""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """schedule after the linear warm-up"""
    warmup_steps: NotNegative = 0.03
    """steps of a linear warm-up; below 1, a fraction of all steps"""
    min_lr_ratio: Ratio = 0.0
    """learning rate at the end, as a fraction of the peak, 0 to 1"""
    weight_decay: NotNegative = 0.01
    """decoupled weight decay (SGD: L2)"""
    decay: Literal["all", "matrices"] = "all"
    """what weight_decay shrinks: all, or matrices: no norms and no biases"""
    max_grad_norm: Positive = 1.0
    """clip the global gradient norm to this"""
    nonfinite: Literal["stop", "skip"] = "stop"
    """at a loss or gradient that is infinite or NaN: stop, or skip the update"""
    zero_stage: Stage = 1
    """DeepSpeed: ZeRO stage, 0 to 3: what is partitioned over dp"""
    partition_config: Rules | dict | None = None
    """DeepSpeed: rules for sharding over tp, as JSON, a JSON file or a preset, such as
    llama or phi3; if omitted, the model's own"""
    vocab_parallel_lm_head: bool | None = None
    """DeepSpeed: shard embedding, head and loss over the vocabulary; if omitted, where
    DeepSpeed can"""
    seed: CountOr0 = 42
    """seed of the data order and of every rank"""
    deterministic: bool = False
    """use deterministic algorithms only, so that a run on the same GPUs repeats bit for
    bit; slower"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to train; auto: GPUs when the cluster has any, else CPUs"""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """compute type; auto: bfloat16 if the hardware supports it, else float32; float16
    (DeepSpeed) uses loss scaling"""
    autocast: bool = False
    """FSDP2: compute in bfloat16 with torch.autocast, norms and loss in float32;
    weights are communicated in float32"""
    compile: bool = False
    """torch.compile the attention and MLP of each layer"""
    lora_rank: CountOr0 = 0
    """FSDP2: train low-rank adapters of this rank beside linear layers, which stay as
    they are (LoRA); 0: train the model"""
    lora_alpha: Positive | None = None
    """FSDP2: adapters count lora_alpha / lora_rank times; if omitted, twice"""
    lora_dropout: Below1 = 0.0
    """FSDP2: share of an adapter's inputs that are dropped"""
    lora_target_modules: Line | None = None
    """FSDP2: names of the layers with adapters, as q_proj,v_proj; if omitted, all
    linear layers that tp shards"""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """activations that are computed again in backward instead of being stored;
    selective: all but attention's output and, without compile, most matrix products"""
    reshard_after_forward: bool = True
    """FSDP2: free a layer's gathered weights after forward and gather them again in
    backward; without it weights are sent once, and each rank holds all of them"""
    loss_chunk_tokens: CountOr0 | None = None
    """tokens whose logits exist at once, in head and loss; 0: those of a whole
    micro-batch; if omitted, 1024, on CPUs 256, where a rank would have over 4 million
    logits"""

    storage_path: Folder = "/mnt/cluster_storage"
    """where runs are stored; every node must have access"""
    cache_dir: Folder | None = None
    """where tokenized rows are stored; if omitted, storage_path/data"""
    run_name: RunName | None = None
    """name of the run; if omitted, made from the time"""
    resume_from_checkpoint: Folder | None = None
    """checkpoint folder a new run starts from, written on any mesh"""
    eval_every: CountOr0 = 0
    """steps between validation losses, plus one at the end; 0: none"""
    checkpoint_every: CountOr0 = 0
    """steps between checkpoints; 0: by time only; there is always one at the end"""
    checkpoint_minutes: NotNegative = 15.0
    """minutes of training between checkpoints; 0: by steps only"""
    async_checkpoint: bool = False
    """FSDP2: write checkpoints while training continues"""
    save_total_limit: Count = 2
    """checkpoints to keep"""
    max_failures: CountOr0 = 3
    """restarts allowed after losing a worker"""
    hang_timeout: Count | None = None
    """seconds without a word from a rank, or without a step, before the attempt is
    ended; if omitted, five times the slowest step seen, at least two minutes"""
    log_interval: Count = 10
    """steps between log lines"""
    export_to: Folder | None = None
    """write the trained model here as plain Hugging Face safetensors"""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """type of the weights that are exported; auto: that of the model's own files, of
    adapters float32"""
    merge_adapter: bool = False
    """FSDP2: export the whole model with its adapters added, instead of the adapters"""

    def __post_init__(self):
        if self.num_workers is None:
            object.__setattr__(self, "num_workers", self.tp_size * self.dp_size)
        validation.check_combinations(self)
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
        """Folder of the tokenized rows, visible to every node."""
        return Path(self.cache_dir or os.path.join(self.storage_path, "data"))


FIELDS = TrainConfig.__pydantic_fields__  # what each may be, and its description
