"""The PyTorch engine: DTensor tensor parallelism inside FSDP2 data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from tp2d_lib import model as models
from tp2d_lib import store
from tp2d_lib.checkpoint import rng
from tp2d_lib.config import TrainConfig
from tp2d_lib.data import build_dataloader
from tp2d_lib.fsdp.files import HashingWriter, PlainReader, copying_stager
from tp2d_lib.fsdp.plan import parallelize
from tp2d_lib.fsdp.preflight import check_precision, residual_stream
from tp2d_lib.fsdp.step import forward, train_step
from tp2d_lib.fsdp.whole import describe
from tp2d_lib.mesh import build_mesh, patient_group, split_dp
from tp2d_lib.model import determinism, exports, lora, weights
from tp2d_lib.model.attention import attend_causally
from tp2d_lib.model.blocks import STYLES, shardable
from tp2d_lib.model.chunks import compute_loss_in_chunks
from tp2d_lib.model.guards import check_replicated_gradients
from tp2d_lib.model.optimizer import build_optimizer, settings_kept

CPU = torch.device("cpu")


def build_engine(
    config: TrainConfig,
    mesh: DeviceMesh,
    parallelize: Callable = parallelize,
    train_step: Callable = train_step,
    load: Callable = weights.load_pretrained,
    build_optimizer: Callable = build_optimizer,
) -> FSDPEngine:
    """Build an empty model, shard it, and fill the shards from safetensors.

    No rank ever holds the full model. A notebook passes its own ``parallelize`` and
    ``train_step``; a dry run passes a ``load`` that reads nothing.
    """
    check_precision(config)
    if config.deterministic:
        determinism.enforce()
    on_gpu = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else CPU
    dtype, _ = models.pick_dtype(config, mesh.device_type)
    gathered = torch.float32 if config.autocast else dtype
    model = models.build_empty_model(config)
    if config.lora_rank:
        lora.store_base(model, gathered)
    stream = residual_stream(model, config)
    # The same dropout on all tp ranks if they hold the same hidden states.
    which = dist.get_rank() if stream.is_shard() else mesh["dp"].get_local_rank()
    torch.manual_seed(config.seed + which)
    attend_causally(model, config)
    models.checkpoint_activations(model, config)
    split = split_dp(mesh, config.dp_replicate_size)
    left = describe(model, shardable(model, STYLES)) * (config.tp_size > 1)
    model = parallelize(model, split, gathered, stream)
    if not config.reshard_after_forward:
        model.set_reshard_after_forward(False)
    load(model, config, device)
    if config.compile:
        models.compile_blocks(model, config.tp_size)
    shards = config.tp_size if stream.is_shard() else 1
    compute_loss_in_chunks(model, config, sequence_shards=shards)
    if config.autocast:
        model.forward = torch.autocast(mesh.device_type, dtype)(model.forward)
    # DTensor has no fused SGD.
    optimizer = build_optimizer(model, config, fused_sgd=False)
    engine = FSDPEngine(model, optimizer, mesh, config, device, train_step)
    if config.tp_size > 1 and not stream.is_shard():
        engine.notice += f"; each tp rank has all positions between blocks{left}"
    return engine


class FSDPEngine:
    """What the loop drives: step, save, load, export."""

    name = "fsdp"

    def __init__(self, model, optimizer, mesh, config, device, train_step):
        self.model, self.optimizer = model, optimizer
        self.mesh, self.config, self.device = mesh, config, device
        self.step = partial(train_step, self)
        self.notice = models.pick_dtype(config, device.type)[1]
        self.gradients_checked = False
        self.writing: Future | None = None
        if config.async_checkpoint:
            self.writers = patient_group()
            self.stager = copying_stager(device)

    def check_first_gradients(self) -> None:
        """On the first step, compare replicated gradients across the tp ranks."""
        if not self.gradients_checked:
            group = self.mesh.get_group("tp")
            named = self.replicated().items()
            trained = [(k, p.grad) for k, p in named if p.grad is not None]
            gradients = {k: gradient.to_local() for k, gradient in trained}
            self.gradients_checked = check_replicated_gradients(gradients, group)

    def replicated(self) -> dict[str, nn.Parameter]:
        """The parameters that are replicated over tp: the norms."""
        return {
            name: p
            for name, p in self.model.named_parameters()
            if "tp" in p.device_mesh.mesh_dim_names and p.placements[-1].is_replicate()
        }

    def local_weights(self) -> dict[str, torch.Tensor]:
        """This rank's shard of each parameter."""
        named = self.model.named_parameters()
        return {name: p.detach().to_local() for name, p in named}

    def replicas(self) -> list[tuple[DeviceMesh, dict[str, torch.Tensor]]]:
        """Groups of ranks, as 1D meshes, with the weights each of their ranks holds."""
        weights = self.local_weights()
        over_tp = (self.mesh["tp"], {name: weights[name] for name in self.replicated()})
        if self.config.dp_replicate_size == 1:
            return [over_tp]
        split = next(self.model.parameters()).device_mesh
        return [(split["dp_replicate"], weights), over_tp]

    def summed_loss(self, micro: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a micro-batch summed over its tokens, for a validation loss."""
        one = torch.ones((), device=self.device)
        with loss_parallel() if self.mesh["tp"].size() > 1 else nullcontext():
            loss = forward(self, micro, one)
        for module in self.model.modules():  # some stay gathered for a backward
            if isinstance(module, FSDPModule):
                module.reshard()
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    def state_dict(self) -> dict:
        held = lora.trained if self.config.lora_rank else weights.own_state
        return {
            "model": held(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            f"rng{dist.get_rank()}": rng.states(self.device),  # each rank its own
        }

    def save(self, directory: str | Path) -> Future | None:
        """Write model, optimizer and RNG state, sharded; every rank must call it.

        With ``async_checkpoint`` they are copied to memory that is kept for the next
        time, then written while training continues; the future is done when they are.
        Only one write runs at a time, because its collectives must run in the same
        order on all ranks.
        """
        writer = HashingWriter(str(directory))
        if not self.config.async_checkpoint:
            dcp.save(self.state_dict(), storage_writer=writer)
            return None
        if self.writing:
            self.writing.result()
        self.writing = dcp.async_save(
            self.state_dict(),
            storage_writer=writer,
            process_group=self.writers,
            async_stager=self.stager,
        )
        return self.writing

    def load(self, directory: str | Path) -> None:
        """Load a checkpoint, from this mesh or another one; every rank must call it."""
        state = self.state_dict()
        reader = PlainReader(str(directory))
        stored = reader.read_metadata()
        own = f"rng{dist.get_rank()}"
        for kind in list(state[own]):
            if f"{own}.{kind}" not in stored.state_dict_metadata:
                del state[own][kind]  # saved with fewer ranks, or without GPUs
        try:
            dcp.load(state, storage_reader=reader)  # weights and RNG in place
        except dcp.CheckpointException as error:  # no Exception: few would catch it
            raise next(cause for cause, _ in error.failures.values()) from error
        with settings_kept(self.optimizer):
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        rng.restore(state[own])

    def export(self, directory: str | Path) -> str:
        """Write plain safetensors, config and tokenizer; every rank must call it.

        ``AutoModelForCausalLM.from_pretrained`` reads the folder. Weights have the type
        ``export_dtype``. Each rank writes its shards; rank 0 joins them.

        Returns:
            What was written, for the user.
        """
        return exports.export(self.model, self.config, store.path(directory))


def train_func(config: TrainConfig) -> None:
    """What every worker runs."""
    from tp2d_lib.run import loop  # here: it needs Ray, an engine does not

    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = build_engine(config, mesh, parallelize, train_step)
    loader = build_dataloader(config, mesh)
    loop.run(engine, loader, config)
