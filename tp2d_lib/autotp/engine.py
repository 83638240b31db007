"""The DeepSpeed engine: AutoTP tensor parallelism with ZeRO data parallelism."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch.distributed.device_mesh import DeviceMesh

from tp2d_lib import model as models
from tp2d_lib import store
from tp2d_lib.autotp import partition, rules, universal, vocabulary
from tp2d_lib.autotp.files import HashingCheckpointEngine, as_data
from tp2d_lib.autotp.layers import (
    is_sharded,
    set_local_heads,
    shard_untied_embedding,
    sizes_kept,
)
from tp2d_lib.autotp.loading import load_full_model
from tp2d_lib.autotp.preflight import check_precision
from tp2d_lib.autotp.step import forward, train_step
from tp2d_lib.autotp.zero import deepspeed_config, describe, shards_vocabulary
from tp2d_lib.checkpoint import rng
from tp2d_lib.config import TrainConfig
from tp2d_lib.data import build_dataloader
from tp2d_lib.mesh import build_mesh
from tp2d_lib.model import determinism, exports
from tp2d_lib.model.attention import attend_causally
from tp2d_lib.model.chunks import compute_loss_in_chunks
from tp2d_lib.model.guards import (
    check_replicated_gradients,
    check_same_function,
    probe,
)
from tp2d_lib.model.optimizer import build_optimizer, settings_kept


def build_engine(
    config: TrainConfig,
    mesh: DeviceMesh,
    deepspeed_config: Callable = deepspeed_config,
    train_step: Callable = train_step,
    load: Callable = load_full_model,
    build_optimizer: Callable = build_optimizer,
) -> AutoTPEngine:
    """Load the model on every rank and let DeepSpeed shard it.

    A process keeps its first mesh, because DeepSpeed stores it globally. A notebook
    passes its own ``deepspeed_config`` and ``train_step``; a dry run passes a ``load``
    that returns an empty model.
    """
    own_rules = rules.read(config.partition_config)
    config = replace(config, device=mesh.device_type, partition_config=own_rules)
    check_precision(config)  # for callers that did not check in the driver
    if config.deterministic:
        determinism.enforce()
    # The same dropout on all tp ranks: they replicate the residual stream.
    torch.manual_seed(config.seed + mesh["dp"].get_local_rank())
    init_deepspeed(mesh)
    model = load(config)
    attend_causally(model, config)
    config = vocabulary.decide(model, config)
    source, partition_config = partition.check(model, config)
    description = partition.describe(source, config)
    expected = None if source == partition.PUBLISHED else probe(model)
    if shards_vocabulary(config):
        shard_untied_embedding(model, mesh)
    models.checkpoint_activations(model, config)
    styles = partition.derived_styles(model) if source == partition.DERIVED else {}
    with sizes_kept(model, styles):
        wrapped, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config),
            config=deepspeed_config(replace(config, partition_config=partition_config)),
        )
    set_local_heads(wrapped.module, config.tp_size)
    if expected is not None:
        half = wrapped.bfloat16_enabled() or wrapped.fp16_enabled()
        allowed = 2e-2 if half else 1e-6
        check_same_function(expected, probe(wrapped), allowed, description)
    if config.compile:
        models.compile_blocks(wrapped.module, config.tp_size)
    if config.zero_stage < 3:  # whose weights exist only while their module runs
        compute_loss_in_chunks(wrapped.module, config)
    return AutoTPEngine(wrapped, mesh, config, train_step, description)


def init_deepspeed(mesh: DeviceMesh) -> None:
    """Let DeepSpeed use the existing process group, without printing."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if mesh.device_type == "cpu":  # turn off a kernel that needs a C++ compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)


class AutoTPEngine:
    """What the loop drives: step, save, load, export."""

    name = "autotp"

    def __init__(self, wrapped, mesh, config, train_step, description):
        self.wrapped, self.mesh, self.config = wrapped, mesh, config
        wrapped.checkpoint_engine = HashingCheckpointEngine(wrapped._config)
        self.model, self.optimizer = wrapped.module, wrapped.optimizer
        self.device = wrapped.device
        self.step = partial(train_step, self)
        _, dtype = models.pick_dtype(config, mesh.device_type)
        self.notice = f"{dtype}; {description}{describe(config)}"
        self.gradients_checked = False

    def check_first_gradients(self) -> None:
        """On the first step, compare replicated gradients across the tp ranks."""
        if not self.gradients_checked:
            gradients = {
                name: safe_get_full_grad(p)
                for name, p in self.model.named_parameters()
                if p.requires_grad and not is_sharded(p)
            }
            group = self.mesh.get_group("tp")
            self.gradients_checked = check_replicated_gradients(gradients, group)

    def local_weights(self) -> dict[str, torch.Tensor]:
        """This rank's part of each parameter; of ZeRO 3's, its partition."""
        named = self.model.named_parameters()
        return {name: getattr(p, "ds_tensor", p).detach() for name, p in named}

    def replicas(self) -> list[tuple[DeviceMesh, dict[str, torch.Tensor]]]:
        """Groups of ranks, as 1D meshes, with the weights each of their ranks holds."""
        weights, named = self.local_weights(), self.model.named_parameters()
        over_tp = {name: weights[name] for name, p in named if not is_sharded(p)}
        over_dp = {} if self.config.zero_stage == 3 else weights
        return [(self.mesh["dp"], over_dp), (self.mesh["tp"], over_tp)]

    def summed_loss(self, micro: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a micro-batch summed over its tokens, for a validation loss."""
        return forward(self, micro, torch.ones((), device=self.device))

    def save(self, directory: str | Path) -> None:
        """Write DeepSpeed's checkpoint and the RNG states; every rank must call it."""
        directory = store.path(directory)
        with self.wrapped.checkpoint_engine.writing_to(directory) as local:
            self.wrapped.save_checkpoint(str(local), tag=universal.FILES)
        if self.mesh["tp"].get_local_rank() == 0:  # equal on the other tp ranks
            with (directory / self.rng_file()).open("wb") as file:
                torch.save(rng.states(self.device), file)
        if dist.get_rank() == 0:
            (directory / universal.LAYOUT_FILE).write_text(
                json.dumps(universal.layout(self.config))
            )
        dist.barrier()

    def load(self, directory: str | Path) -> None:
        """Load a checkpoint, from this mesh or another one; every rank must call it."""
        directory = store.path(directory)
        stored = json.loads((directory / universal.LAYOUT_FILE).read_text())
        universal.check(stored, self.config, directory)
        on_disk = universal.on_disk(directory, self.config)
        with as_data(on_disk):
            if universal.fits(stored, self.config):
                self.load_deepspeed(on_disk, universal.FILES)
            else:
                self.load_converted(directory)
            own = directory / self.rng_file()
            if own.is_file():  # missing if saved with fewer dp ranks
                with own.open("rb") as file:
                    rng.restore(torch.load(file, weights_only=True))

    def rng_file(self) -> str:
        return f"rng-{self.mesh['dp'].get_local_rank()}.pt"

    def load_converted(self, directory: Path) -> None:
        with universal.converted(directory, self.config) as folder:
            self.wrapped._config.load_universal_checkpoint = True  # no public API
            self.load_deepspeed(folder, universal.TAG)
            self.wrapped._config.load_universal_checkpoint = False
        if self.config.zero_stage == 3:
            # DeepSpeed 0.19.8 gives all parts of the weights the same tensor with the
            # number of steps, which each of them would then count up.
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    def load_deepspeed(self, directory: Path, tag: str) -> None:
        with settings_kept(self.optimizer):
            path, _ = self.wrapped.load_checkpoint(str(directory), tag=tag)
        if path is None:
            raise FileNotFoundError(f"{directory} must hold a DeepSpeed checkpoint")

    def export(self, directory: str | Path) -> str:
        """Write plain safetensors, config and tokenizer; every rank must call it.

        The weights are gathered on rank 0, which writes them as ``export_dtype``.

        Returns:
            What was written, for the user; nothing on other ranks.
        """
        said = ""
        if self.config.tp_size > 1 or self.config.zero_stage == 3:
            # The public save_16bit_model gathers over dp (stage 3) but not over tp.
            state = self.wrapped._consolidated_16bit_state_dict()
        else:
            state = self.model.state_dict()
        if dist.get_rank() == 0:
            kept = self.model.state_dict().keys()  # buffers too, if files hold them
            state |= {k: b for k, b in self.model.named_buffers() if k in kept}
            said = exports.export_gathered(state, self.config, store.path(directory))
        dist.barrier()
        return said


def train_func(config: TrainConfig) -> None:
    """What every worker runs."""
    from tp2d_lib.run import loop  # here: it needs Ray, an engine does not

    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = build_engine(config, mesh, deepspeed_config, train_step)
    loader = build_dataloader(config, mesh)
    loop.run(engine, loader, config)
