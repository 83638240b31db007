"""The DeepSpeed engine: AutoTP tensor parallelism with ZeRO data parallelism."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel

if not torch.cuda.is_available():  # before the import, which looks for hardware
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.module_inject.layers import (
    SubParamLinearLayer,
    VocabParallelEmbedding,
    set_autotp_mode,
)
from deepspeed.utils import safe_get_full_grad

from tp2d_lib import model as models
from tp2d_lib import partition, rng, universal, weights
from tp2d_lib.config import TrainConfig
from tp2d_lib.data import build_dataloader, valid_tokens
from tp2d_lib.mesh import build_mesh
from tp2d_lib.plan import check_same_function, check_whole_gradients, probe
from tp2d_lib.zero import check_precision, cuts_vocabulary, deepspeed_config

TAG = "deepspeed"  # folder of DeepSpeed's own files inside a checkpoint
LAYOUT_FILE = "layout.json"


def check(config: TrainConfig) -> None:
    """Find in the driver what DeepSpeed could not cut or would compute wrongly.

    Raises:
        ConfigError: a precision that the ZeRO stage or the hardware does not allow.
        PlanError: rules that match nothing, or cut half of a pair.
    """
    check_precision(config)
    models.check_compiler(config)
    if config.tp_size > 1:
        partition.check(models.build_empty_model(config), config)


def train_step(
    engine: AutoTPEngine, batch: list[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over the micro-batches of a global batch.

    Returns the loss, a mean over the valid tokens of the global batch, and the gradient
    norm before clipping: 0-d tensors, the same on every rank.
    """
    dp, wrapped = engine.mesh["dp"], engine.wrapped
    valid = valid_tokens(batch).to(engine.device)
    dist.all_reduce(valid, group=dp.get_group())  # over the whole global batch
    total = torch.zeros((), device=engine.device)
    for micro in batch:
        loss = forward(engine, micro, valid)
        total += loss.detach()
        # DeepSpeed averages over dp and micro-batches; the sum is wanted.
        wrapped.backward(loss * dp.size() * len(batch))
        if wrapped.is_gradient_accumulation_boundary():
            engine.check_first_gradients()
            norm = plain_grad_norm(engine)
        wrapped.step()  # clips and updates after the last micro-batch
    dist.all_reduce(total, group=dp.get_group())
    if norm is None:
        norm = torch.as_tensor(wrapped.get_global_grad_norm())
    return total, norm


def forward(
    engine: AutoTPEngine, micro: dict[str, torch.Tensor], valid: torch.Tensor
) -> torch.Tensor:
    """The summed loss of a micro-batch, divided by ``valid`` tokens."""
    return engine.wrapped(
        input_ids=micro["input_ids"].to(engine.device, non_blocking=True),
        labels=micro["labels"].to(engine.device, non_blocking=True),
        use_cache=False,
        num_items_in_batch=valid,
    ).loss


def plain_grad_norm(engine: AutoTPEngine) -> torch.Tensor | None:
    """The norm at stage 0 in float32, where DeepSpeed clips but does not tell it."""
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        return None
    parts = torch.zeros(2, device=engine.device)  # cut over tp, whole on every rank
    for parameter in engine.model.parameters():
        parts[0 if is_cut(parameter) else 1] += parameter.grad.square().sum()
    dist.all_reduce(parts[0], group=engine.mesh.get_group("tp"))
    return parts.sum().sqrt()


def load_whole(config: TrainConfig) -> PreTrainedModel:
    """The whole model in float32, which AutoTP cuts in place."""
    return AutoModelForCausalLM.from_pretrained(
        weights.model_directory(config), dtype=torch.float32
    ).train()


def build_engine(
    config: TrainConfig,
    mesh: DeviceMesh,
    deepspeed_config: Callable = deepspeed_config,
    train_step: Callable = train_step,
    load: Callable = load_whole,
) -> AutoTPEngine:
    """Load the model on every rank and let DeepSpeed cut it.

    A process keeps the first mesh it was given: DeepSpeed holds it globally. A notebook
    brings its own ``deepspeed_config`` and ``train_step``, a dry run an empty model.
    """
    config = replace(config, device=mesh.device_type)
    check_precision(config)  # also for who did not ask in the driver
    # A tp rank drops out what the others do: each holds the whole residual stream.
    torch.manual_seed(config.seed + mesh["dp"].get_local_rank())
    join(mesh)
    model = load(config)
    source = partition.check(model, config)
    described = partition.describe(source, config)
    expected = None if source == partition.PUBLISHED else probe(model)
    if cuts_vocabulary(config):
        cut_untied_embedding(model, mesh)
    if config.activation_checkpointing:
        models.checkpoint_activations(model)
    wrapped, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config),
        config=deepspeed_config(config),
    )
    give_fused_attention_its_heads(wrapped.module, config.tp_size)
    if expected is not None:
        half = wrapped.bfloat16_enabled() or wrapped.fp16_enabled()
        check_same_function(expected, probe(wrapped), 2e-2 if half else 1e-6, described)
    if config.compile:
        models.compile_blocks(wrapped.module)
    return AutoTPEngine(wrapped, mesh, config, train_step, described)


def join(mesh: DeviceMesh) -> None:
    """Let DeepSpeed use the process group that is there, without a word."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if mesh.device_type == "cpu":  # an optional kernel that needs a C++ compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)


def cut_untied_embedding(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cut an embedding over the vocabulary; AutoTP does so only for a tied one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        return
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

    def __init__(self, wrapped, mesh, config, train_step, described):
        self.wrapped, self.mesh, self.config = wrapped, mesh, config
        self.model, self.optimizer = wrapped.module, wrapped.optimizer
        self.device = wrapped.device
        self.step = partial(train_step, self)
        self.notice = f"{models.pick_dtype(config, mesh.device_type)[1]}; {described}"
        self.gradients_checked = False

    def check_first_gradients(self) -> None:
        """On the first step, compare whole gradients across the tp ranks."""
        if not self.gradients_checked:
            whole = {n: p for n, p in self.model.named_parameters() if not is_cut(p)}
            gradients = {name: safe_get_full_grad(p) for name, p in whole.items()}
            group = self.mesh.get_group("tp")
            self.gradients_checked = check_whole_gradients(gradients, group)

    def summed_loss(self, micro: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a micro-batch summed over its tokens, for a validation loss."""
        return forward(self, micro, torch.ones((), device=self.device))

    def save(self, directory: str | Path) -> None:
        """Write DeepSpeed's checkpoint and this rank's generators; every rank calls."""
        directory = Path(directory)
        self.wrapped.save_checkpoint(str(directory), tag=TAG)
        if self.mesh["tp"].get_local_rank() == 0:  # the others have the same
            torch.save(rng.states(self.device), directory / self.rng_file())
        if dist.get_rank() == 0:
            (directory / LAYOUT_FILE).write_text(
                json.dumps(universal.layout(self.config))
            )
        dist.barrier()

    def load(self, directory: str | Path) -> None:
        """Read them back, also on another mesh; every rank calls."""
        directory = Path(directory)
        stored = json.loads((directory / LAYOUT_FILE).read_text())
        if stored == universal.layout(self.config):
            self.load_deepspeed(directory, TAG)
        else:
            universal.check(stored, self.config, directory)
            with universal.converted(directory / TAG) as folder:
                self.wrapped._config.load_universal_checkpoint = True  # no public way
                self.load_deepspeed(folder, universal.TAG)
                self.wrapped._config.load_universal_checkpoint = False
        own = directory / self.rng_file()
        if own.exists():  # else there were fewer dp ranks
            rng.restore(torch.load(own, weights_only=True))

    def rng_file(self) -> str:
        return f"rng-{self.mesh['dp'].get_local_rank()}.pt"

    def load_deepspeed(self, directory: Path, tag: str) -> None:
        path, _ = self.wrapped.load_checkpoint(str(directory), tag=tag)
        if path is None:
            raise FileNotFoundError(f"{directory} must hold a DeepSpeed checkpoint")

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
            weights.export_gathered(state, self.config, Path(directory))
        dist.barrier()


def is_cut(parameter: torch.nn.Parameter) -> bool:
    """Whether AutoTP cut this parameter over the tp ranks."""
    return getattr(parameter, "tensor_model_parallel", False)


def train_func(config: TrainConfig) -> None:
    """What every worker runs."""
    from tp2d_lib import loop  # here: the loop needs Ray, the engine does not

    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = build_engine(config, mesh, deepspeed_config, train_step)
    loader = build_dataloader(config, mesh)
    loop.run(engine, loader, config)
