"""The DeepSpeed engine: AutoTP tensor parallelism with ZeRO data parallelism."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

if not torch.cuda.is_available():  # before the import, which looks for hardware
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.utils import safe_get_full_grad

from tp2d_lib import model as models
from tp2d_lib import rng
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data import build_dataloader, valid_tokens
from tp2d_lib.mesh import build_mesh
from tp2d_lib.plan import check_whole_gradients

TAG = "deepspeed"  # folder of DeepSpeed's own files inside a checkpoint


def check(config: TrainConfig, device_type: str) -> None:
    """Refuse, in the driver, what DeepSpeed would compute wrongly.

    Raises:
        ConfigError: stage 0 with bfloat16 on several tp ranks. DeepSpeed 0.19.8 then
            takes each tp rank's share of the gradient norm for the whole and clips too
            weakly.
    """
    dtype, _ = models.pick_dtype(config, device_type)
    if config.zero_stage == 0 and dtype == torch.bfloat16 and config.tp_size > 1:
        raise ConfigError(
            f"zero_stage=0 must not meet bfloat16 and tp_size={config.tp_size}: "
            "DeepSpeed then clips to a wrong gradient norm; try zero_stage=1"
        )


def deepspeed_config(config: TrainConfig, dtype: torch.dtype) -> dict:
    """The dictionary that DeepSpeed reads, in one place."""
    return {
        "train_micro_batch_size_per_gpu": config.batch_size_per_gpu,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "tensor_parallel": {"autotp_size": config.tp_size},
        "zero_optimization": {
            "stage": config.zero_stage,
            "stage3_gather_16bit_weights_on_model_save": True,  # for export
        },
        "bf16": {"enabled": dtype == torch.bfloat16},  # fp32 masters, fp32 reduction
        "zero_allow_untested_optimizer": True,  # torch's own AdamW and SGD
        "steps_per_print": 10**9,  # the loop prints
    }


def build_engine(config: TrainConfig, mesh: DeviceMesh) -> AutoTPEngine:
    """Load the model on every rank and let DeepSpeed cut it.

    A process keeps the first mesh it was given: DeepSpeed holds it globally.
    """
    check(config, mesh.device_type)  # also for who did not ask in the driver
    torch.manual_seed(config.seed + dist.get_rank())
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if mesh.device_type == "cpu":  # an optional kernel that needs a C++ compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dtype, _ = models.pick_dtype(config, mesh.device_type)
    model = AutoModelForCausalLM.from_pretrained(
        models.model_directory(config), dtype=torch.float32
    ).train()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config),
        config=deepspeed_config(config, dtype),
    )
    return AutoTPEngine(wrapped, mesh, config)


def build_optimizer(model: torch.nn.Module, config: TrainConfig):
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    return kind(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )


class AutoTPEngine:
    """What the loop drives: step, save, load, export."""

    def __init__(self, wrapped, mesh: DeviceMesh, config: TrainConfig):
        self.wrapped, self.mesh, self.config = wrapped, mesh, config
        self.model, self.optimizer = wrapped.module, wrapped.optimizer
        self.device = wrapped.device
        self.precision = models.pick_dtype(config, mesh.device_type)[1]
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
            check_whole_gradients(gradients, group)
            self.gradients_checked = True
        if self.config.zero_stage > 0 or self.wrapped.bfloat16_enabled():
            return None
        parts = torch.zeros(2, device=self.device)  # cut over tp, whole on every rank
        for parameter in self.model.parameters():
            parts[0 if is_cut(parameter) else 1] += parameter.grad.square().sum()
        dist.all_reduce(parts[0], group=group)
        return parts.sum().sqrt()

    def save(self, directory: str | Path) -> None:
        """Write DeepSpeed's checkpoint and this rank's generators; every rank calls."""
        directory = Path(directory)
        self.wrapped.save_checkpoint(str(directory), tag=TAG)
        torch.save(rng.states(self.device), directory / f"rng-{dist.get_rank()}.pt")
        dist.barrier()

    def load(self, directory: str | Path) -> None:
        """Read them back, on the same mesh; every rank calls."""
        directory = Path(directory)
        path, _ = self.wrapped.load_checkpoint(str(directory), tag=TAG)
        if path is None:
            raise FileNotFoundError(f"{directory} must hold a DeepSpeed checkpoint")
        own = directory / f"rng-{dist.get_rank()}.pt"
        rng.restore(torch.load(own, weights_only=True))

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
