"""The DeepSpeed engine: AutoTP tensor parallelism with ZeRO data parallelism."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel

if not torch.cuda.is_available():  # before the import, which looks for hardware
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.layers import (
    SubParamLinearLayer,
    VocabParallelEmbedding,
    set_autotp_mode,
)
from deepspeed.utils import safe_get_full_grad

from tp2d_lib import model as models
from tp2d_lib import partition, rng, universal
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data import build_dataloader, valid_tokens
from tp2d_lib.mesh import build_mesh
from tp2d_lib.plan import check_whole_gradients

TAG = "deepspeed"  # folder of DeepSpeed's own files inside a checkpoint
LAYOUT_FILE = "layout.json"  # what decides the form of those files:
LAYOUT = ("tp_size", "dp_size", "zero_stage")
PLAN = ("tp_preset", "partition_config", "vocab_parallel_lm_head")


def check(config: TrainConfig) -> None:
    """Find in the driver what DeepSpeed could not cut or would compute wrongly.

    Raises:
        ConfigError: a precision that the ZeRO stage or the hardware does not allow.
        PlanError: rules that match nothing, or cut half of a pair.
    """
    on_gpu = config.device == "cuda" or (
        config.device == "auto" and torch.cuda.is_available()
    )
    check_precision(config, "cuda" if on_gpu else "cpu")
    if config.tp_size > 1:
        partition.check(models.build_empty_model(config), config)


def check_precision(config: TrainConfig, device_type: str) -> None:
    dtype, _ = models.pick_dtype(config, device_type)
    half = dtype in (torch.bfloat16, torch.float16)
    if config.zero_stage == 0 and half and config.tp_size > 1:
        # DeepSpeed 0.19.8 takes a tp rank's share of the norm for all of it.
        raise ConfigError(
            f"zero_stage=0 must not meet {config.dtype} and tp_size={config.tp_size}: "
            "DeepSpeed then clips to a wrong gradient norm; try zero_stage=1"
        )
    if config.bf16_master_weights and (
        dtype != torch.bfloat16 or config.zero_stage == 0
    ):
        raise ConfigError(
            f"bf16_master_weights=True must go with bfloat16 and ZeRO 1 to 3, not with "
            f"{dtype} and zero_stage={config.zero_stage}; try dtype='bfloat16' and "
            "zero_stage=1"
        )
    on_cpu = device_type == "cpu"
    if dtype == torch.float16 and on_cpu and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            "dtype='float16' must run on a GPU, or a CPU that computes in float16; "
            "try dtype='bfloat16'"
        )


def deepspeed_config(config: TrainConfig, dtype: torch.dtype, device_type: str) -> dict:
    """The dictionary that DeepSpeed reads, in one place."""
    on_gpu = device_type == "cuda"  # CPUs have no second stream to overlap with
    return {
        "train_micro_batch_size_per_gpu": config.batch_size_per_gpu,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "tensor_parallel": {
            "autotp_size": config.tp_size,
            "preset_model": config.tp_preset,
            "partition_config": config.partition_config,
            "vocab_parallel_lm_head": cuts_vocabulary(config),
            "tp_overlap_comm": True,  # with the gradient of the same weight
        },
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": on_gpu,
            "stage3_gather_16bit_weights_on_model_save": True,  # for export
        },
        "bf16": {  # fp32 masters and reduction, unless asked otherwise
            "enabled": dtype == torch.bfloat16,
            "bf16_master_weights_and_grads": config.bf16_master_weights,
            "bf16_optimizer_states": config.bf16_master_weights,
        },
        "fp16": {"enabled": dtype == torch.float16},  # with dynamic loss scaling
        "zero_allow_untested_optimizer": True,  # torch's own AdamW and SGD
        "steps_per_print": 10**9,  # the loop prints
    }


def build_engine(config: TrainConfig, mesh: DeviceMesh) -> AutoTPEngine:
    """Load the model on every rank and let DeepSpeed cut it.

    A process keeps the first mesh it was given: DeepSpeed holds it globally.
    """
    check_precision(config, mesh.device_type)
    torch.manual_seed(config.seed + dist.get_rank())
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if mesh.device_type == "cpu":  # an optional kernel that needs a C++ compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dtype, _ = models.pick_dtype(config, mesh.device_type)
    model = AutoModelForCausalLM.from_pretrained(
        models.model_directory(config), dtype=torch.float32
    ).train()
    described = partition.describe(model, config)
    if config.tp_size > 1:
        partition.check(model, config)  # also for who did not ask in the driver
    if cuts_vocabulary(config):
        cut_untied_embedding(model, mesh)
    if config.activation_checkpointing:
        models.checkpoint_activations(model)
    wrapped, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config),
        config=deepspeed_config(config, dtype, mesh.device_type),
    )
    give_fused_attention_its_heads(wrapped.module, config.tp_size)
    return AutoTPEngine(wrapped, mesh, config, described)


def cuts_vocabulary(config: TrainConfig) -> bool:
    return config.tp_size > 1 and config.vocab_parallel_lm_head


def cut_untied_embedding(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cut an embedding over the vocabulary; AutoTP does so only for a tied one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        return
    deepspeed.init_distributed(dist_init_required=False)
    set_autotp_mode(training=True)
    cut = VocabParallelEmbedding(embedding, mesh.get_group("tp"), name="embed_tokens")
    cut.replaced = True  # AutoTP leaves it as it is
    model.set_input_embeddings(cut)


def give_fused_attention_its_heads(model: PreTrainedModel, tp_size: int) -> None:
    """Let attention slice its part of a fused query, key and value.

    Phi-3 takes the number of heads from the configuration that all modules share.
    """
    for module in model.modules():
        fused = any(isinstance(part, SubParamLinearLayer) for part in module.children())
        if fused and hasattr(module, "num_key_value_groups"):
            module.config = copy.copy(module.config)
            module.config.num_attention_heads //= tp_size


def build_optimizer(model: torch.nn.Module, config: TrainConfig):
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    return kind(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )


class AutoTPEngine:
    """What the loop drives: step, save, load, export."""

    def __init__(self, wrapped, mesh: DeviceMesh, config: TrainConfig, described: str):
        self.wrapped, self.mesh, self.config = wrapped, mesh, config
        self.model, self.optimizer = wrapped.module, wrapped.optimizer
        self.device = wrapped.device
        self.notice = f"{models.pick_dtype(config, mesh.device_type)[1]}; {described}"
        self.gradients_checked = False

    def step(self, batch: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; returns the global loss and gradient norm, 0-d."""
        dp = self.mesh["dp"]
        valid = valid_tokens(batch).to(self.device)
        dist.all_reduce(valid, group=dp.get_group())
        total = torch.zeros((), device=self.device)
        for micro in batch:
            loss = self.wrapped(
                input_ids=micro["input_ids"].to(self.device),
                labels=micro["labels"].to(self.device),
                use_cache=False,
                num_items_in_batch=valid,
            ).loss
            total += loss.detach()
            # DeepSpeed averages over dp and micro-batches; the sum is wanted.
            self.wrapped.backward(loss * dp.size() * len(batch))
            if self.wrapped.is_gradient_accumulation_boundary():
                norm = self.before_update()
            self.wrapped.step()
        dist.all_reduce(total, group=dp.get_group())
        known = self.wrapped.get_global_grad_norm()
        return total, norm if known is None else torch.as_tensor(known)

    def before_update(self) -> torch.Tensor | None:
        """Check the first gradients; the norm where DeepSpeed does not tell it."""
        group = self.mesh.get_group("tp")
        if not self.gradients_checked:
            whole = {n: p for n, p in self.model.named_parameters() if not is_cut(p)}
            gradients = {name: safe_get_full_grad(p) for name, p in whole.items()}
            self.gradients_checked = check_whole_gradients(gradients, group)
        if self.config.zero_stage > 0 or self.wrapped.bfloat16_enabled():
            return None
        parts = torch.zeros(2, device=self.device)  # cut over tp, whole on every rank
        for parameter in self.model.parameters():
            parts[0 if is_cut(parameter) else 1] += parameter.grad.square().sum()
        dist.all_reduce(parts[0], group=group)
        return parts.sum().sqrt()

    def layout(self) -> dict:
        """What decides the form of DeepSpeed's files."""
        names = LAYOUT + (PLAN if self.config.tp_size > 1 else ())
        return {name: getattr(self.config, name) for name in names}

    def save(self, directory: str | Path) -> None:
        """Write DeepSpeed's checkpoint and this rank's generators; every rank calls."""
        directory = Path(directory)
        self.wrapped.save_checkpoint(str(directory), tag=TAG)
        torch.save(rng.states(self.device), directory / f"rng-{dist.get_rank()}.pt")
        if dist.get_rank() == 0:
            (directory / LAYOUT_FILE).write_text(json.dumps(self.layout()))
        dist.barrier()

    def load(self, directory: str | Path) -> None:
        """Read them back, also on another mesh; every rank calls."""
        directory = Path(directory)
        stored = json.loads((directory / LAYOUT_FILE).read_text())
        if stored == self.layout():
            self.load_deepspeed(directory, TAG)
        else:
            self.check_convertible(stored, directory)
            with universal.converted(directory / TAG) as folder:
                self.wrapped._config.load_universal_checkpoint = True  # no public way
                self.load_deepspeed(folder, universal.TAG)
                self.wrapped._config.load_universal_checkpoint = False
        own = directory / f"rng-{dist.get_rank()}.pt"
        if own.exists():  # else the world was smaller
            rng.restore(torch.load(own, weights_only=True))

    def load_deepspeed(self, directory: Path, tag: str) -> None:
        path, _ = self.wrapped.load_checkpoint(str(directory), tag=tag)
        if path is None:
            raise FileNotFoundError(f"{directory} must hold a DeepSpeed checkpoint")

    def check_convertible(self, stored: dict, directory: Path) -> None:
        """Universal Checkpoint knows AdamW's state, as ZeRO 1 and 2, or 3, write it."""
        before, now = stored["zero_stage"], self.config.zero_stage
        wrote = ", ".join(f"{name}={stored[name]}" for name in LAYOUT)
        if self.config.optimizer != "adamw":
            raise ConfigError(
                f"optimizer={self.config.optimizer!r} must be 'adamw' to load "
                f"{directory} in another layout than its own, {wrote}"
            )
        if not before or not now or (before == 3) != (now == 3):
            raise ConfigError(
                f"zero_stage={now} cannot load {directory}, written with {wrote}: "
                "Universal Checkpoint converts among stages 1 and 2, and 3 to 3; "
                f"try zero_stage={before or 0} on the same mesh"
            )

    def export(self, directory: str | Path) -> None:
        """Write plain safetensors, config and tokenizer; every rank calls.

        The weights are gathered on rank 0, in the type of the model they started from.
        """
        if self.config.tp_size > 1 or self.config.zero_stage == 3:
            # The public save_16bit_model gathers over dp (stage 3) but not over tp.
            state = self.wrapped._consolidated_16bit_state_dict()
        else:
            state = self.model.state_dict()
        if dist.get_rank() == 0:
            models.export_gathered(state, self.config, Path(directory))
        dist.barrier()


def is_cut(parameter: torch.nn.Parameter) -> bool:
    """Whether AutoTP cut this parameter over the tp ranks."""
    return getattr(parameter, "tensor_model_parallel", False)


def train_func(config: TrainConfig) -> None:
    """What every worker runs."""
    from tp2d_lib import loop  # here: the loop needs Ray, the engine does not

    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = build_engine(config, mesh)
    loader = build_dataloader(config, mesh)
    loop.run(engine, loader, config)
